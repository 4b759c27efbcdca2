from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recordings import assert_same, make_models
from torch import Tensor

from kdzoo import Heads, KdzooError, ModelInfo, ModelPair, RecipeError, Side, ops
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_attention_relations import AttentionRelations

OURS, THEIRS = Heads(4, 2, 3), Heads(4, 1, 6)
"""Grouped heads: two query heads, and all four, share one key and value."""
LAYERS = 2, 3
FULL = ("query", "attention_query", "attention_key")
KINDS = (*FULL, "key", "value")


class Models:
    """Random vectors of some blocks; two sequences have padding, one a single token."""

    def __init__(self, ours: Heads = OURS, theirs: Heads = THEIRS) -> None:
        self.student, self.teacher = make_models(True)
        self.heads = {"student": ours, "teacher": theirs}
        self.mask = torch.ones_like(self.student.labels)
        self.mask[1, -3:] = 0
        self.mask[0, -1] = 0
        self.sites = {
            model: {
                f"{kind}.{block}": torch.randn(*self.mask.shape, (h.query if kind in FULL else h.key_value) * h.size)
                .double()
                .requires_grad_(model == "student")
                for kind in KINDS
                for block in range(layers)
            }
            for (model, h), layers in zip(self.heads.items(), LAYERS, strict=True)
        }

    def run(self, **params: Any) -> Replay:
        def recorded(name: str, model: Any, layers: int) -> Recorded:
            return Recorded(
                model.labels,
                hidden=model.hidden.detach(),
                head=model.head.detach(),
                attention_mask=self.mask,
                sites={site: value.detach() for site, value in self.sites[name].items()},
                layers=layers,
                heads=self.heads[name],
            )

        models = recorded("student", self.student, LAYERS[0]), recorded("teacher", self.teacher, LAYERS[1])
        return replay({"kd": (AttentionRelations, params, 1.0)}, *models, same_tokens=True)

    def leaves(self) -> dict[str, Tensor]:
        return {f"student_{site}": value for site, value in self.sites["student"].items()}

    def scores(self, model: str, relation: str, block: int, b: int, heads: int) -> Tensor:
        """[heads, T, T] of one sequence, by loops over heads."""
        of, sites = self.heads[model], self.sites[model]
        if relation == "attention":
            query, key = sites[f"attention_query.{block}"][b], sites[f"attention_key.{block}"][b]
            parts = [slice(h * of.size, (h + 1) * of.size) for h in range(of.query)]
            return torch.stack([query[:, part] @ key[:, part].T for part in parts])
        x = sites[f"{relation}.{block}"][b]
        if relation != "query":
            group = of.query // of.key_value
            x = torch.cat([x[:, (h // group) * of.size :][:, : of.size] for h in range(of.query)], 1)
        width = x.shape[1] // heads
        split = [x[:, h * width : (h + 1) * width] for h in range(heads)]
        return torch.stack([part @ part.T / math.sqrt(width) for part in split])

    def row(self, relation: str, blocks: tuple[int, int], b: int, i: int, heads: int, causal: bool, how: str) -> Tensor:
        """One position's distance, head by head and position by position."""
        keys = [j for j in range(self.mask.shape[1]) if self.mask[b, j] and (j <= i or not causal)]
        found = []
        ours, theirs = (
            self.scores(model, relation, block, b, heads)
            for model, block in zip(("student", "teacher"), blocks, strict=True)
        )
        for s, t in zip(ours[:, i, keys], theirs[:, i, keys], strict=True):
            q, p = s.softmax(0), t.softmax(0)
            values = {"kl": (p * (p / q).log()).sum(), "mse": (s - t).pow(2).mean()}
            found.append(values.get(how, (q - p).pow(2).mean()))
        return torch.stack(found).mean()


CASES = [
    ("query", {}),
    ("key", {"heads": 6}),
    ("value", {"heads": 3, "distance": "mse"}),
    ("value", {"distance": "mse_of_softmax", "causal": False}),
    ("attention", {}),
    ("attention", {"distance": "mse", "causal": False}),
]


@pytest.mark.parametrize("rows", ["response", "all"])
@pytest.mark.parametrize(("relation", "params"), CASES)
def test_it_is_the_formula_in_value_and_gradient(relation, params, rows):
    models = Models()
    found = models.run(relations={relation: 0.5}, pairs=[[0, 1], [-1, -1]], rows=rows, **params)
    total = torch.zeros(()).double()
    causal = params.get("causal", True) or relation == "attention"
    for blocks in ((0, 1), (1, 2)):
        of_sequences = []
        for b in range(len(models.student)):
            chosen = models.student.rows(b) if rows == "response" else models.mask[b].bool()
            where = chosen.nonzero()[:, 0].tolist()
            heads = params.get("heads", OURS.query)
            how = params.get("distance", "kl")
            of_sequences.append(torch.stack([models.row(relation, blocks, b, i, heads, causal, how) for i in where]))
        if rows == "response":
            value = torch.cat(of_sequences).mean()
        else:
            value = torch.stack([of_sequence.mean() for of_sequence in of_sequences]).mean()
        torch.testing.assert_close(found.terms[f"kd/{relation}_{blocks[0]}_to_{blocks[1]}"], 0.5 * value.detach())
        total = total + 0.5 * value
    assert_same(found, total, models.leaves())


def test_relations_add_up_with_their_weights():
    models = Models()
    weights = {"query": 1.0, "value": 0.25, "attention": 2.0}
    found = models.run(relations=weights, pairs=[[1, 2]])
    alone = {name: models.run(relations={name: 1.0}, pairs=[[1, 2]]).loss for name in weights}
    torch.testing.assert_close(found.loss, sum(weight * alone[name] for name, weight in weights.items()))


@pytest.mark.parametrize("distance", ["kl", "mse", "mse_of_softmax"])
def test_equal_relations_are_at_distance_0(distance):
    models = Models(theirs=OURS)
    for site, value in models.sites["student"].items():
        models.sites["teacher"][site] = value.detach()
    everything = dict.fromkeys(("query", "key", "value", "attention"), 1.0)
    found = models.run(relations=everything, pairs=[[0, 0]], distance=distance)
    assert found.loss.abs() < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in found.gradients.values())


def test_queries_turned_within_a_relation_head_have_the_same_relations():
    models = Models(theirs=OURS)
    turned, _ = torch.linalg.qr(torch.randn(3, 3).double())
    query = models.sites["student"]["query.0"].detach()
    models.sites["teacher"]["query.0"] = (query.unflatten(-1, (4, 3)) @ turned).flatten(-2)
    assert models.run(relations={"query": 1.0}, pairs=[[0, 0]]).loss.abs() < 1e-12
    assert models.run(relations={"query": 1.0}, pairs=[[0, 0]], heads=6).loss > 1e-3


def relations(side: Side, heads: int, seed: int) -> ops.Relation:
    torch.manual_seed(seed)
    shape = side.input_ids.numel(), heads, 3
    return ops.Relation(*(torch.randn(shape).double().requires_grad_() for _ in "qk"))


@pytest.mark.parametrize("distance", ["kl", "mse", "mse_of_softmax"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_blocks_of_rows_change_nothing(distance, everywhere):
    ids = torch.randint(9, (3, 7))
    labels = torch.full_like(ids, -100)
    labels[0, 2:6] = labels[2, 1:7] = 1
    at = (labels != -100).flatten().nonzero()[:, 0]
    nothing = torch.full_like(at, -1)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    side = Side(ids, mask, at, labels.flatten()[at], ids.flatten()[at], at // 7, nothing)
    rows = side.every_token() if everywhere else side
    found = []
    for block_bytes in (1, 2 * 3 * 7 * 2 * 8 * 2, 2**20):  # rows one by one, by twos, all at once
        ours, theirs = relations(side, 2, 0), relations(side, 2, 1)
        value = ops.relation_distance(ours, theirs, rows, distance, causal=True, block_bytes=block_bytes)
        gradients = torch.autograd.grad((value * torch.arange(len(value))).sum(), [*ours])
        found.append((value.detach(), *gradients))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_without_tokens_there_are_no_rows_and_the_gradient_is_0():
    none = torch.zeros(0, dtype=torch.long)
    ids = torch.zeros(1, 4, dtype=torch.long)
    side = Side(ids, torch.ones_like(ids), none, none, none, none, none)
    ours, theirs = relations(side, 2, 0), relations(side, 2, 1)
    values = ops.relation_distance(ours, theirs, side, "kl", causal=True)
    everywhere = ops.relation_distance(ours, theirs, side.every_token(), "kl", causal=True)
    means = ops.means_of_sequences(everywhere, side.every_token(), side)
    assert values.shape == (0,) and means.tolist() == [0.0]
    gradients = torch.autograd.grad(values.sum() + means.sum(), [*ours])
    assert not any(gradient.any() for gradient in gradients)


def pair_of(student: Heads | None, teacher: Heads | None, same: bool = True) -> ModelPair:
    ours, theirs = ModelInfo(5, 9, 2, "gpt2", heads=student), ModelInfo(6, 9, 4, "foo", heads=teacher)
    return ModelPair(ours, theirs, same)


@pytest.mark.parametrize(
    ("params", "teacher", "said"),
    [
        (
            {"relations": {"attention": 1.0}},
            Heads(2, 2, 6),
            "relations: 'attention' compares head by head, and the student has 4 heads and the teacher 2; "
            "take 'query', 'key' and 'value'",
        ),
        ({"heads": 5}, THEIRS, "heads: 5 does not divide the widths 12 and 24; take another"),
        ({}, Heads(3, 3, 3), "heads: 4 does not divide the widths 12 and 9; take another"),
        ({}, None, "relations: the model adapter of 'foo' names no attention; add it"),
        (
            {"pairs": [[2, 0]]},
            THEIRS,
            "pairs: the student has 2 blocks, counted from 0 or from the end, not 2; name one from 0 to 1",
        ),
    ],
)
def test_what_these_models_do_not_have_is_refused(params, teacher, said):
    with pytest.raises(RecipeError) as raised:
        AttentionRelations.needs_of(AttentionRelations.Params.model_validate(params), pair_of(OURS, teacher))
    assert str(raised.value) == said


def test_maps_of_attention_need_no_common_width():
    params = AttentionRelations.Params(relations={"attention": 1.0}, heads=7, pairs="uniform")
    needs = AttentionRelations.needs_of(params, pair_of(OURS, THEIRS))
    assert needs.student == {f"attention_{kind}.{block}@all" for kind in ("query", "key") for block in (0, 1)}
    assert needs.teacher == {f"attention_{kind}.{block}@all" for kind in ("query", "key") for block in (1, 3)}


def test_it_is_for_one_tokenizer():
    assert AttentionRelations.needs(AttentionRelations.Params(), same_tokens=False).tokenizers == "same"


@pytest.mark.parametrize("relations", [{}, {"query": 0.0}, {"output": 1.0}])
def test_a_relation_is_known_and_has_a_weight(relations):
    with pytest.raises(KdzooError, match="relations"):
        Models().run(relations=relations)


def test_a_preset_is_what_its_code_does():
    models = Models()
    models.mask = torch.ones_like(models.mask)
    ours = models.run(preset="minilmv2.bb@0d78e20", pairs=[[1, 2]], heads=6, relations={"key": 1.0})
    torch.testing.assert_close(
        ours.loss, models.run(rows="all", causal=False, pairs=[[1, 2]], heads=6, relations={"key": 1.0}).loss
    )
