"""Streams of a loss's own in the pass: what is missing, or stands where it cannot, is said; what only watches waits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from settings import Gold, OnWrong, TestLoss, make_setting

from kdzoo import KdzooError, Logits, Needs, NoParams, Step, Stream, Terms, ops, visit

BOTH = pytest.mark.parametrize("same_tokens", [True, False])


class Twice(TestLoss):
    """Twice the student's state, under one name."""

    name = "twice"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"hidden.last"}))

    def streams(self, step: Step) -> Mapping[str, Stream]:
        return {"twice": Stream(2 * step.student["hidden.last"], "student", beside="student")}


class Misspelt(Twice):
    name = "misspelt"

    @visit
    def look(self, student: Logits, twise: Logits) -> Terms:
        raise AssertionError("it is never seen")


class MisspeltModel(Twice):
    name = "misspelt_model"

    @visit
    def look(self, studnet: Logits) -> Terms:
        raise AssertionError("it is never seen")


class MisspeltLater(OnWrong):
    name = "misspelt_later"

    @visit
    def look(self, shiftet: Logits) -> Terms:
        raise AssertionError("it is never seen")


@BOTH
@pytest.mark.parametrize(
    ("loss", "stream", "meant"),
    [(Misspelt, "twise", "twice"), (MisspeltModel, "studnet", "student"), (MisspeltLater, "shiftet", "shifted")],
)
def test_a_misspelt_stream_is_one_line_with_advice(same_tokens, loss, stream, meant):
    setting = make_setting(same_tokens)
    with pytest.raises(KdzooError) as caught:
        setting.run({"kd": (setting.make(loss), 1.0), "sft": (setting.make(Gold), 1.0)})
    assert str(caught.value) == (
        f"kd: the visit 'look' sees a stream '{stream}' that 'streams' does not make, did you mean '{meant}'?"
    )


class Each(Twice):
    """Sees as many of its streams as are made."""

    name = "each"

    @visit(each=("twice", "thrice"))
    def look(self, seen: Logits) -> Terms:
        return Terms().add(seen.stream, ops.cross_entropy(seen.logprobs(), seen.labels))


@BOTH
def test_each_stream_is_seen_as_far_as_it_is_made(same_tokens):
    setting = make_setting(same_tokens)
    assert setting.run({"kd": (setting.make(Each), 1.0)}).terms.keys() == {"kd/twice"}


class Watching(Twice):
    """Learns from one stream, and measures another one."""

    name = "watching"

    @visit
    def gold(self, student: Logits) -> Terms:
        return Terms().add("nll", ops.cross_entropy(student.logprobs(), student.labels))

    @visit(measured_only=True)
    def agreement(self, student: Logits, twice: Logits) -> Terms:
        assert not torch.is_grad_enabled()
        return Terms().watch("agreement", student.logits.argmax(-1) == twice.logits.argmax(-1), len(student))


@BOTH
def test_what_is_only_measured_is_not_seen_in_training(same_tokens):
    setting = make_setting(same_tokens)
    losses = {"kd": (setting.make(Watching), 1.0)}
    assert not setting.run(losses).report.watched
    with torch.no_grad():
        _, inputs = setting.score(losses)
    total, count = inputs.report.watched["kd/agreement"]
    assert total == count == setting.batch.counts["tokens"]


class BesideTooLate(Twice):
    name = "beside_too_late"

    def streams_after_facts(self, step: Step) -> Mapping[str, Stream]:
        return self.streams(step)


class NoLabels(Twice):
    name = "no_labels"

    def streams(self, step: Step) -> Mapping[str, Stream]:
        return {"twice": Stream(step.student["hidden.last"], "student")}


class TooFew(Twice):
    name = "too_few"

    def streams(self, step: Step) -> Mapping[str, Stream]:
        return {"twice": Stream(step.student["hidden.last"][1:], "student", beside="student")}


class GroupsBeside(Twice):
    name = "groups_beside"

    def streams(self, step: Step) -> Mapping[str, Stream]:
        return {"twice": Stream(step.student["hidden.last"], "student", "student", group=step.student.sample)}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (BesideTooLate, r"^streams of 'kd' after facts"),
        (NoLabels, r"^the stream 'kd/twice' stands beside no model and brings no labels"),
        (TooFew, r"^the stream 'kd/twice' has 10 tokens, not 11"),
        (GroupsBeside, r"^the stream 'kd/twice' stands beside a model"),
    ],
)
def test_a_stream_that_cannot_be_placed_is_refused(loss, message):
    setting = make_setting()
    with pytest.raises(AssertionError, match=message):
        setting.run({"kd": (setting.make(loss), 1.0)})
