"""Visits of kind "scan": whole sequences are summed up before anything else is seen."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from settings import Outcome, Setting, TestLoss, make_setting
from torch import Tensor

from kdzoo import KdzooError, Logits, Needs, NoParams, Side, Step, Terms, ops, visit
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL

CHUNKS = pytest.mark.parametrize("chunk_tokens", [1, 3, None])
BOTH = pytest.mark.parametrize("same_tokens", [True, False])


@pytest.fixture(params=[None, 2], ids=["whole chunks", "tiles of two tokens"], autouse=True)
def tile(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr("kdzoo.step.chunks.TILE_BYTES", 4 * 11 * request.param)


class Apart(TestLoss):
    """How far each token's probabilities are from their mean over the sequence, on both sides.

    The last token is no part of the student's mean.
    """

    name = "apart"

    @visit
    def mine(self, student: Logits) -> Terms:
        return Terms().add("mine", self.distance(student))

    @visit(kind="scan")
    def my_mean(self, student: Logits) -> Mapping[str, Tensor]:
        q = student.logprobs().exp()
        assert student.side is not None
        kept = ops.is_followed(student.side)[student.at].to(q.dtype)
        return {"total": q * kept[:, None], "count": kept}

    @visit(kind="scan")
    def their_mean(self, teacher: Logits) -> Mapping[str, Tensor]:
        q = teacher.logprobs().exp()
        return {"total": q, "count": torch.ones_like(q[:, 0])}

    @visit(kind="tokens")
    def theirs(self, teacher: Logits) -> Mapping[str, Tensor]:
        return {"distance": self.distance(teacher)}

    def distance(self, seen: Logits) -> Tensor:
        return (seen.logprobs().exp() - seen.scanned[seen.stream][seen.sequence]).square().sum(-1)

    def scan(self, step: Step) -> Mapping[str, Tensor]:
        assert not torch.is_grad_enabled()
        return {
            stream: step.sums[f"{visit}.total"] / step.sums[f"{visit}.count"].clamp_min(1)[:, None]
            for stream, visit in (("student", "my_mean"), ("teacher", "their_mean"))
        }

    def finish(self, step: Step) -> Terms:
        return Terms().watch("theirs", step.values["theirs.distance"], len(step.teacher))


def distances(logits: Tensor, side: Side, skip: int) -> Tensor:
    """[tokens], sequence by sequence; no gradient through the mean."""
    found = []
    for b in range(side.sequences):
        q = logits[side.sample == b].softmax(-1)
        mean = q[: len(q) - skip].sum(0) / max(len(q) - skip, 1)
        found.append((q - mean.detach()).square().sum(-1))
    return torch.cat(found)


def apart(setting: Setting) -> Tensor:
    return distances(setting.logits(), setting.batch.student, 1).sum() / setting.batch.counts["tokens"]


@CHUNKS
@BOTH
def test_other_visits_see_what_was_made_of_the_sums_over_each_sequence(chunk_tokens, same_tokens):
    setting = make_setting(same_tokens, bias=True, soft_cap=4.0)
    found = setting.run({"apart": (setting.make(Apart), 0.7)}, chunk_tokens)
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
@pytest.mark.parametrize("tokens", [([0], [0]), ([0, 0], [0, 0])])
def test_no_tokens_are_scanned_to_zeros(same_tokens, tokens):
    setting = make_setting(same_tokens, tokens)
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


class ScansBoth(Apart):
    name = "scans_both"

    @visit(kind="scan")
    def both(self, student: Logits, teacher: Logits) -> Mapping[str, Tensor]:
        raise AssertionError("it is never seen")


def test_a_scan_is_of_one_models_tokens():
    setting = make_setting()
    with pytest.raises(AssertionError, match=r"^the scan 'x\.both' is of one model's tokens"):
        setting.run({"x": (setting.make(ScansBoth), 1.0)})


class ScansFacts(Apart):
    name = "scans_facts"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(facts=frozenset({"teacher.correct"}))

    @visit(kind="scan")
    def my_mean(self, student: Logits) -> Mapping[str, Tensor]:
        return {"total": student.logprobs(), "count": student.fact("teacher.correct")}


@BOTH
def test_a_scan_is_before_all_facts(same_tokens):
    setting = make_setting(same_tokens)
    with pytest.raises(KdzooError, match=r"^a visit reads the fact 'teacher\.correct' of the stream 'student'; facts"):
        setting.run({"x": (setting.make(ScansFacts), 1.0)})


class Products(TestLoss):
    """Values of both models' tokens, each by itself."""

    name = "products"

    def build(self, *_models: object) -> None:
        self.seen: list[str] = []

    @visit(kind="tokens")
    def theirs(self, teacher: Logits) -> Mapping[str, Tensor]:
        self.seen.append("theirs")
        return {"nll": ops.cross_entropy(teacher.logprobs(), teacher.labels)}

    @visit(kind="tokens")
    def mine(self, student: Logits) -> Mapping[str, Tensor]:
        self.seen.append("mine")
        return {"nll": ops.cross_entropy(student.logprobs(), student.labels)}

    def finish(self, step: Step) -> Terms:
        return Terms().add("nll", step.values["mine.nll"].sum() * step.values["theirs.nll"].sum().detach())


def test_tokens_of_a_model_that_does_not_train_are_not_computed_again():
    setting = make_setting(False)
    products = setting.make(Products)
    losses = {"products": (products, 1.0)}
    loss, _ = setting.score(losses, 3)
    assert set(products.seen) == {"theirs", "mine"}
    products.seen.clear()
    loss.backward()
    assert set(products.seen) == {"mine"}
    found = Outcome(loss.detach(), setting.gradients(losses))

    def formula() -> Tensor:
        mine, theirs = (
            torch.nn.functional.cross_entropy(logits, side.labels, reduction="sum")
            for logits, side in (
                (setting.logits(), setting.batch.student),
                (setting.teacher_logits(), setting.batch.teacher),
            )
        )
        return mine * theirs / setting.batch.counts["tokens"]

    found.assert_close(setting.naive(formula))
