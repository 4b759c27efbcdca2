"""Own streams that a visit sees group beside group: whole groups in every chunk, however it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from settings import Setting, TestLoss, make_paired_setting, make_setting
from torch import Tensor

from kdzoo import Logits, Needs, NoParams, Step, Stream, Terms, ops, visit

CHUNKS = pytest.mark.parametrize("chunk_tokens", [1, 2, 7, None])


@pytest.fixture(params=[None, 2], ids=["whole chunks", "tiles of two tokens"], autouse=True)
def tile(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr("kdzoo.step.chunks.TILE_BYTES", 4 * 11 * request.param)


class SpanProduct(TestLoss):
    """|probability of a span's last token under the student, times those of its others - the teacher's|, weighted."""

    name = "span_product"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"hidden.last"}), teacher=frozenset({"hidden.last"}))

    def streams(self, step: Step) -> Mapping[str, Stream]:
        student, teacher = step.student, step.teacher
        q, p = student.side.span >= 0, teacher.side.span >= 0
        return {
            "q": Stream(
                student["hidden.last"][q],
                "student",
                labels=student.labels[q],
                learns_head=True,
                group=student.side.span[q],
                # Of which nothing must come back.
                values={"weight": 1.0 + student.sample[q].double().requires_grad_()},
            ),
            "p": Stream(teacher["hidden.last"][p], "teacher", labels=teacher.labels[p], group=teacher.side.span[p]),
        }

    @visit
    def spans(self, q: Logits, p: Logits) -> Terms:
        totals = []
        for seen in (q, p):
            gold = -ops.cross_entropy(seen.logprobs(), seen.labels)
            assert seen.group is not None and len(seen.group) == len(gold)
            assert sorted(set(seen.group.tolist())) == list(range(seen.groups))
            totals.append(gold.new_zeros(seen.groups).index_add(0, seen.group, gold).exp())
        last = torch.searchsorted(q.group, torch.arange(q.groups), right=True) - 1
        weight = q.values["weight"][last]
        assert not weight.requires_grad
        return Terms().add("distance", weight * (totals[0] - totals[1]).square(), per="sequences")


def formula(setting: Setting) -> Tensor:
    student, teacher = setting.batch.student, setting.batch.teacher
    assert student is not None and teacher is not None
    log_q, log_p = setting.logits().log_softmax(-1), setting.teacher_logits().log_softmax(-1)
    total = torch.zeros(()).double()
    for span in set(student.span.tolist()) - {-1}:
        q, p = (student.span == span).nonzero()[:, 0], (teacher.span == span).nonzero()[:, 0]
        difference = log_q[q, student.labels[q]].sum().exp() - log_p[p, teacher.labels[p]].sum().exp()
        total = total + (1 + student.sample[q[0]]) * difference.square()
    return total / setting.batch.counts["sequences"]


@CHUNKS
def test_groups_are_whole_in_every_chunk(chunk_tokens):
    setting = make_paired_setting()
    found = setting.run({"x": (setting.make(SpanProduct), 0.7)}, chunk_tokens)
    found.assert_close(setting.naive(lambda: 0.7 * formula(setting)))


@pytest.mark.parametrize("tokens", [([0, 0], [0, 0]), ([2, 1], [0, 0])])
def test_no_group_at_all(tokens):
    setting = make_setting(same_tokens=False, tokens=tokens)
    found = setting.run({"x": (setting.make(SpanProduct), 1.0)})
    assert found.loss == 0
    assert found.terms.keys() == {"x/distance"}
    assert all((gradient == 0).all() for gradient in found.gradients.values())


class WithoutGroups(SpanProduct):
    name = "without_groups"

    def streams(self, step: Step) -> Mapping[str, Stream]:
        return {name: replace(stream, group=None) for name, stream in super().streams(step).items()}


class NotASum(SpanProduct):
    name = "not_a_sum"

    @visit(kind="tokens")
    def spans(self, q: Logits, p: Logits) -> Mapping[str, Tensor]:
        raise AssertionError("it is never seen")


@pytest.mark.parametrize("loss", [WithoutGroups, NotASum])
def test_own_streams_stand_side_by_side_by_groups_and_in_sums_alone(loss):
    setting = make_paired_setting()
    with pytest.raises(AssertionError, match=r"^the visit 'x\.spans' puts tokens of \['x/p', 'x/q'\] side by side"):
        setting.run({"x": (setting.make(loss), 1.0)})


class Descending(SpanProduct):
    name = "descending"

    def streams(self, step: Step) -> Mapping[str, Stream]:
        return {
            name: replace(stream, group=None if stream.group is None else stream.group.flip(0))
            for name, stream in super().streams(step).items()
        }


def test_groups_out_of_order_are_refused():
    setting = make_paired_setting()
    with pytest.raises(AssertionError, match=r"^groups must be ascending"):
        setting.run({"x": (setting.make(Descending), 1.0)})


class SeveralTogether(SpanProduct):
    """Beside those two, one more that brings groups and is seen by itself."""

    name = "several_together"

    def streams(self, step: Step) -> Mapping[str, Stream]:
        found = super().streams(step)
        return {**found, "again": found["q"]}

    @visit
    def alone(self, again: Logits) -> Terms:
        assert again.group is not None and sorted(set(again.group.tolist())) == list(range(again.groups))
        return Terms().add("alone", ops.cross_entropy(again.logprobs(), again.labels))


@CHUNKS
def test_a_stream_with_groups_may_be_seen_alone(chunk_tokens):
    setting = make_paired_setting()
    student = setting.batch.student
    assert student is not None

    def alone() -> Tensor:
        nll = ops.cross_entropy(setting.logits().log_softmax(-1), student.labels)
        return nll[student.span >= 0].sum() / setting.batch.counts["tokens"]

    found = setting.run({"x": (setting.make(SeveralTogether), 0.7)}, chunk_tokens)
    found.assert_close(setting.naive(lambda: 0.7 * (formula(setting) + alone())))
