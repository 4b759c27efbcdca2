"""Visits of kind "scan": whole sequences are summed up before anything else is seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from settings import Outcome, Setting, TestLoss, make_setting
from torch import Tensor

from kdzoo import Batch, Chunk, Needs, NoParams, Side, Terms, Visit, ops
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL

CHUNKS = pytest.mark.parametrize("chunk_rows", [1, 3, None])
BOTH = pytest.mark.parametrize("same_tokens", [True, False])


@pytest.fixture(params=[None, 2], ids=["whole chunks", "tiles of two rows"], autouse=True)
def tile(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr("kdzoo.step.vocabulary.TILE_BYTES", 4 * 11 * request.param)


class Apart(TestLoss):
    """How far each row's probabilities are from their mean over the sequence, on both sides; the last row is no part
    of the student's mean."""

    name = "apart"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(
            visits=(
                Visit("mine", ("student",)),
                Visit("my_mean", ("student",), kind="scan"),
                Visit("their_mean", ("teacher",), kind="scan"),
                Visit("theirs", ("teacher",), kind="rows"),
            )
        )

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms | Mapping[str, Tensor]:
        stream = "student" if visit.startswith("m") else "teacher"
        side, rows = chunk.side(stream), chunk.rows(stream)
        q = chunk.logprobs(stream).exp()
        if visit == "my_mean":
            kept = ops.is_followed(side)[rows].to(q.dtype)
            return {"total": q * kept[:, None], "count": kept}
        if visit == "their_mean":
            return {"total": q, "count": torch.ones_like(q[:, 0])}
        distance = (q - chunk.scanned[stream][side.sample[rows]]).square().sum(-1)
        return Terms().add("mine", distance.sum()) if visit == "mine" else {"distance": distance}

    def scan(self, batch: Batch, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert not torch.is_grad_enabled()
        return {
            stream: sums[f"{visit}.total"] / sums[f"{visit}.count"].clamp_min(1)[:, None]
            for stream, visit in (("student", "my_mean"), ("teacher", "their_mean"))
        }

    def combine(self, batch, student, teacher, facts, rows) -> Terms:
        return Terms().watch("theirs", rows["theirs.distance"].sum(), len(teacher))


def distances(logits: Tensor, side: Side, skip: int) -> Tensor:
    """[rows], sequence by sequence; no gradient through the mean."""
    found = []
    for b in range(side.sequences):
        q = logits[side.sample == b].softmax(-1)
        mean = q[: len(q) - skip].sum(0) / max(len(q) - skip, 1)
        found.append((q - mean.detach()).square().sum(-1))
    return torch.cat(found)


def apart(setting: Setting) -> Tensor:
    return distances(setting.logits(), setting.batch.student, 1).sum() / setting.batch.counts["rows"]


@CHUNKS
@BOTH
def test_other_visits_see_what_was_made_of_the_sums_over_each_sequence(chunk_rows, same_tokens):
    setting = make_setting(same_tokens, bias=True, soft_cap=4.0)
    found = setting.run({"apart": (setting.make(Apart), 0.7)}, chunk_rows)
    found.assert_close(setting.naive(lambda: 0.7 * apart(setting)))
    theirs = distances(setting.teacher_logits(), setting.batch.teacher, 0)
    torch.testing.assert_close(found.report.watched["apart/theirs"][0], theirs.sum())


@BOTH
def test_a_scan_leaves_other_losses_as_they_are(same_tokens):
    setting = make_setting(same_tokens)
    others = {"sft": (setting.make(CrossEntropy), 0.5)}
    if same_tokens:
        others["kl"] = (setting.make(ForwardKL), 0.5)
    alone = setting.run(others, 3)
    beside = setting.run(others | {"apart": (setting.make(Apart), 0.0), "again": (setting.make(Apart), 0.0)}, 3)
    beside.assert_close(alone)


def test_sequences_do_not_depend_on_their_neighbours():
    setting = make_setting(False)
    whole = setting.run({"apart": (setting.make(Apart), 1.0)}, 3)
    parts = [setting.part([0]), setting.part([1, 2])]
    loss = sum(part.score({"apart": (part.make(Apart), 1.0)}, 3)[0].detach() for part in parts)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("rows", [([0], [0]), ([0, 0], [0, 0])])
def test_no_rows_are_scanned_to_zeros(same_tokens, rows):
    setting = make_setting(same_tokens, rows)
    found = setting.run({"apart": (setting.make(Apart), 1.0)})
    assert found.loss == 0
    assert found.terms.keys() == {"apart/mine"}
    assert all((gradient == 0).all() for gradient in found.gradients.values())


def test_without_gradients_the_values_are_the_same():
    setting = make_setting()
    losses = {"apart": (setting.make(Apart), 1.0)}
    expected = setting.run(losses)
    with torch.no_grad():
        found, _ = setting.score(losses, 3)
    torch.testing.assert_close(found, expected.loss)


@pytest.mark.parametrize(
    "visit",
    [
        Visit("both", ("student", "teacher"), kind="scan"),
        Visit("mine", ("student",), kind="scan", facts=("teacher.correct",)),
    ],
)
def test_a_scan_is_of_one_models_rows_and_before_all_facts(visit):
    class Misplaced(Apart):
        @classmethod
        def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
            return replace(super().needs(params, same_tokens), visits=(visit,))

    setting = make_setting()
    with pytest.raises(AssertionError, match=r"^the scan 'x\.\w+' is of one model's rows, and before all facts"):
        setting.run({"x": (setting.make(Misplaced), 1.0)})


class Products(TestLoss):
    """Values of both models' rows, each by itself."""

    name = "products"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("theirs", ("teacher",), kind="rows"), Visit("mine", ("student",), kind="rows")))

    def over_vocab(self, visit: str, chunk: Chunk) -> Mapping[str, Tensor]:
        stream = "teacher" if visit == "theirs" else "student"
        return {"nll": ops.cross_entropy(chunk.logprobs(stream), chunk.labels(stream))}

    def combine(self, batch, student, teacher, facts, rows) -> Terms:
        return Terms().add("nll", rows["mine.nll"].sum() * rows["theirs.nll"].sum().detach())


def test_rows_of_a_model_that_does_not_train_are_not_computed_again(monkeypatch):
    seen: list[str] = []
    over_vocab = Products.over_vocab

    def watched(self: Products, visit: str, chunk: Chunk) -> Mapping[str, Tensor]:
        seen.append(visit)
        return over_vocab(self, visit, chunk)

    monkeypatch.setattr(Products, "over_vocab", watched)
    setting = make_setting(False)
    losses = {"products": (setting.make(Products), 1.0)}
    loss, _ = setting.score(losses, 3)
    assert set(seen) == {"theirs", "mine"}
    seen.clear()
    loss.backward()
    assert set(seen) == {"mine"}
    found = Outcome(loss.detach(), setting.gradients(losses))

    def formula() -> Tensor:
        mine, theirs = (
            torch.nn.functional.cross_entropy(logits, side.labels, reduction="sum")
            for logits, side in (
                (setting.logits(), setting.batch.student),
                (setting.teacher_logits(), setting.batch.teacher),
            )
        )
        return mine * theirs / setting.batch.counts["rows"]

    found.assert_close(setting.naive(formula))
