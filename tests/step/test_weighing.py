"""Any loss beside any token weights: the weighted mean, however the step is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kdzoo import Batch, Loss, TokenWeights, WeighedTokens, Weights, ops
from kdzoo.errors import KdzooError
from kdzoo.step.distiller import Aim, Distiller
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Report
from kdzoo.step.weighing import Weighed, refuse_invalid, weigh_step
from kdzoo.testing.promises.ranks import two_ranks
from kdzoo.testing.promises.rearrange import rearranged
from kdzoo.testing.promises.world import SLOT, Outcome, Subject, World, outcome, registry

KINDS = (
    "cross_entropy",
    "forward_kl",
    "alm",
    "dskd",
    "dskd_v2",
    "multilevel_ot",
    "residual",
    "uld",
)
"""A loss for each kind of visit and stream."""
WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "column": ("column", {}),
    "soft verdict": ("verdict", {"indicator": "soft"}),
    "share of the step": ("top_share", {"among": "step", "share": 0.6}),
    "temperatures": ("adaptive", {}),
}
PARTS = ([0, 1], [2], [3])


class Two(TokenWeights):
    """2 on every token."""

    name = "two"
    paper = formula = "none"

    def weigh(self, tokens: WeighedTokens) -> Weights:
        return Weights(torch.full((len(tokens),), 2.0, dtype=torch.float64))


def subject(loss: str, weights: type[TokenWeights] | None = None, **given: Any) -> Subject:
    params = None if weights is None else weights.Params.model_validate(given)
    return replace(Subject.of(registry().of(Loss)[loss]), weights=weights, weights_params=params)


def named(loss: str, name: str) -> Subject:
    weights, given = WEIGHTS[name]
    return subject(loss, registry().of(TokenWeights)[weights], **given)


def fitting() -> list[tuple[str, str, bool]]:
    """Each loss by each weights, with one tokenizer, and with two where both take two."""
    return [
        (loss, name, same)
        for loss in KINDS
        for name in WEIGHTS
        for same in (True, False)
        if same or named(loss, name).fits_two_tokenizers
    ]


def step(world: World, term: LossTerm, batches: Sequence[Batch]) -> tuple[Outcome, list[Weighed]]:
    """An optimizer step over these micro-batches: what they give together, and what their tokens weigh."""
    distiller = Distiller(world.student, world.model_adapters[0], world.heads["student"], [term])
    given = [
        {"batch": batch, "teacher": world.teacher_sites([term], batch), "teacher_head": world.heads["teacher"]}
        for batch in batches
    ]
    weighed = weigh_step([term], batches, [distiller(**inputs, aim=None) for inputs in given])
    report, leaves = Report(), {n: p for n, p in distiller.named_parameters() if p.requires_grad}
    losses = [
        distiller(**inputs, aim=Aim({SLOT: 1.0}, report, mine)) for inputs, mine in zip(given, weighed, strict=True)
    ]
    return outcome(torch.stack(losses).sum(), report, leaves), [mine.get(SLOT) for mine in weighed]


@cache
def world_of(loss: str, name: str, same: bool) -> World:
    return World(named(loss, name), same)


@pytest.mark.parametrize(("loss", "name", "same"), fitting())
def test_the_parts_of_a_step_add_up_to_the_whole(loss, name, same):
    world = world_of(loss, name, same)
    term, batch = world.term(), world.batch()
    whole, (weighed,) = step(world, term, [batch])
    assert whole.loss.isfinite() and whole.loss != World(subject(loss), same).whole.loss
    assert all(g is None or g.isfinite().all() for g in whole.gradients.values())
    assert whole.watched[f"{SLOT}/token_weight"] == pytest.approx(float(weighed.weights.values.mean()))
    parts, weights = step(world, term, [rearranged(batch, part) for part in PARTS])
    assert whole.difference(parts) == ""
    torch.testing.assert_close(torch.cat([part.weights.values for part in weights]), weighed.weights.values)


@pytest.mark.parametrize("same", [True, False], ids=["one tokenizer", "two tokenizers"])
@pytest.mark.parametrize("loss", KINDS)
def test_a_weight_that_all_have_changes_nothing_unless_it_is_divided_by_tokens(loss, same):
    if not (same or subject(loss).fits_two_tokenizers):
        pytest.skip("needs one tokenizer")
    alone = World(subject(loss), same).whole
    by_weights = World(subject(loss, Two), same).whole
    assert alone.difference(replace(by_weights, watched=alone.watched)) == ""
    by_tokens = World(subject(loss, Two, divide_by="tokens"), same).whole
    assert alone.plus(alone).difference(by_tokens) == ""


@pytest.mark.sweep
def test_two_ranks_of_zero_weigh_losses_of_every_kind_as_one_process_does():
    tried = [(loss, "share of the step", True) for loss in KINDS]
    tried += [(loss, "column", False) for loss in KINDS if named(loss, "column").fits_two_tokenizers]
    faults = two_ranks([(named(loss, name), same) for loss, name, same in tried])
    assert {each: fault for each, fault in zip(tried, faults, strict=True) if fault} == {}


def logits(world: World, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of both models [N, V], from the models themselves."""
    found = []
    for model, side in ((world.student, batch.student), (world.teacher, batch.teacher)):
        assert side is not None
        out = model(input_ids=side.input_ids, attention_mask=side.attention_mask).logits
        found.append(out.flatten(0, 1)[side.positions])
    return found[0], found[1].detach()


@pytest.mark.parametrize("divide_by", ["weights", "tokens"])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
def test_it_is_the_weighted_mean_in_value_and_in_all_gradients(loss, name, divide_by):
    kind, given = WEIGHTS[name]
    world = World(subject(loss, registry().of(TokenWeights)[kind], divide_by=divide_by, **given), same_tokens=True)
    batch = world.batch()
    found, (weighed,) = step(world, world.term(), [batch])
    weights, tau = weighed.weights.values, weighed.weights.temperatures
    z, z_teacher = logits(world, batch)
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(batch.student.labels):
        t = 1.0 if tau is None else float(tau[i])
        log_q, log_p = torch.log_softmax(z[i] / t, -1), torch.log_softmax(z_teacher[i] / t, -1)
        value = -log_q[label] if loss == "cross_entropy" else (log_p.exp() * (log_p - log_q)).sum()
        total = total + float(weights[i]) * t**2 * value
    total = total / (float(weights.sum()) if divide_by == "weights" else len(weights))
    torch.testing.assert_close(found.loss, total.detach())
    own = {n: p for n, p in world.student.named_parameters() if p.requires_grad}
    for (parameter, _), gradient in zip(own.items(), torch.autograd.grad(total, list(own.values())), strict=True):
        torch.testing.assert_close(
            found.gradients[f"student.{parameter}"], gradient, msg=lambda m, n=parameter: f"{n}: {m}"
        )


@pytest.mark.parametrize("same", [True, False], ids=["one tokenizer", "two tokenizers"])
@pytest.mark.parametrize("loss", [kind for kind in KINDS if kind not in ("dskd_v2",)])
def test_a_row_whose_column_is_0_is_as_if_it_were_not_there(loss, same):
    if not (same or subject(loss).fits_two_tokenizers):
        pytest.skip("needs one tokenizer")
    world = World(subject(loss, registry().of(TokenWeights)["column"]), same)
    batch = world.batch()
    weight = torch.where(batch.student.sample == 1, 0.0, 1.0)
    batch = replace(batch, columns={"weight": weight})
    with_zero, _ = step(world, world.term(), [batch])
    others = rearranged(batch, [0, 2, 3])
    others = replace(others, counts=others.local_counts(), columns={})
    without, _ = step(World(subject(loss), same), World(subject(loss), same).term(), [others])
    assert with_zero.difference(without) == ""
    in_parts, _ = step(world, world.term(), [rearranged(batch, part) for part in ([0, 2], [1], [3])])
    assert in_parts.difference(without) == ""


def test_a_step_in_which_all_tokens_weigh_0_is_0():
    world = World(subject("cross_entropy", registry().of(TokenWeights)["column"]), same_tokens=True)
    batch = world.batch()
    found, (weighed,) = step(world, world.term(), [replace(batch, columns={"weight": torch.zeros(len(batch.student))})])
    assert found.loss == 0 and set(weighed.counts.values()) == {0.0}
    assert not any(g is not None and g.any() for g in found.gradients.values())


def test_weights_of_another_shape_are_one_line():
    class Short(Two):
        name = "short"

        def weigh(self, tokens: WeighedTokens) -> Weights:
            return Weights(torch.ones(3))

    with pytest.raises(KdzooError, match=r"^losses\.loss\.weights: the weights are \[3\], of 14 tokens; return"):
        _ = World(subject("cross_entropy", Short), same_tokens=True).whole


def test_what_is_not_made_of_weights_is_one_line():
    class Bare(Two):
        name = "bare"

        def weigh(self, tokens: WeighedTokens) -> Weights:
            return torch.ones(len(tokens))

    with pytest.raises(
        KdzooError, match=r"^losses\.loss\.weights: 'weigh' of 'bare' returns a Tensor; return Weights\("
    ):
        _ = World(subject("cross_entropy", Bare), same_tokens=True).whole


@pytest.mark.parametrize(
    ("weight", "temperature", "told"),
    [
        (-0.5, None, "2 of them are negative or not finite; each is at least 0"),
        (float("nan"), 1.0, "2 of them are negative or not finite; each is at least 0"),
        (1.0, 0.0, "2 of their temperatures are not above 0 or not finite; each divides logits"),
    ],
)
def test_weights_that_no_loss_can_be_divided_by_are_one_line(weight, temperature, told):
    world = World(subject("cross_entropy", Two), same_tokens=True)
    batch, weights = world.batch(), torch.ones(len(world.batch().student))
    tau = None if temperature is None else torch.ones_like(weights)
    weights[:2] = weight
    if tau is not None:
        tau[:2] = temperature
    with pytest.raises(KdzooError, match=rf"^losses\.loss\.weights: {told}"):
        refuse_invalid([{SLOT: Weighed(batch, Weights(weights, tau))}])


def test_means_by_place_leave_out_what_has_none():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert ops.mean_by(values, torch.tensor([0, 2, 0, -1, 3]), 3, otherwise=1.0).tolist() == [2.5, 1.0, 2.0]
    assert ops.mean_by(values[:0], torch.zeros(0, dtype=torch.long), 2, otherwise=1.0).tolist() == [1.0, 1.0]
