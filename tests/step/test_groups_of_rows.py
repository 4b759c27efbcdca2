"""Own streams that a visit sees group beside group: whole groups in every chunk, however it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from settings import Setting, TestLoss, make_paired_setting, make_setting
from torch import Tensor

from kdzoo import Batch, Chunk, Needs, NoParams, Own, OwnStream, Terms, View, Visit, ops

CHUNKS = pytest.mark.parametrize("chunk_rows", [1, 2, 7, None])


@pytest.fixture(params=[None, 2], ids=["whole chunks", "tiles of two rows"], autouse=True)
def tile(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr("kdzoo.step.vocabulary.TILE_BYTES", 4 * 11 * request.param)


class SpanProduct(TestLoss):
    """|probability of a span's last token under the student, times those of its others - the teacher's|, weighted."""

    name = "span_product"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(
            student=frozenset({"hidden.last"}),
            teacher=frozenset({"hidden.last"}),
            streams=(OwnStream("q", "own", head="student", learns_head=True), OwnStream("p", "own", head="teacher")),
            visits=(Visit("spans", ("q", "p")),),
        )

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> Mapping[str, Own]:
        q, p = student.side.span >= 0, teacher.side.span >= 0
        weight = 1.0 + student.sample[q].double().requires_grad_()  # of which nothing must come back
        group, theirs = student.side.span[q], teacher.side.span[p]
        return {
            "q": Own(student["hidden.last"][q], student.labels[q], group, {"weight": weight}),
            "p": Own(teacher["hidden.last"][p], teacher.labels[p], theirs),
        }

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        totals = []
        for stream in ("q", "p"):
            gold = -ops.cross_entropy(chunk.logprobs(stream), chunk.labels(stream))
            group = chunk.group(stream)
            assert len(group) == len(gold)
            assert sorted(set(group.tolist())) == list(range(chunk.groups))
            totals.append(gold.new_zeros(chunk.groups).index_add(0, group, gold).exp())
        last = torch.searchsorted(chunk.group("q"), torch.arange(chunk.groups), right=True) - 1
        weight = chunk.values("q")["weight"][last]
        assert not weight.requires_grad
        return Terms().add("distance", (weight * (totals[0] - totals[1]).square()).sum(), per="sequences")


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
def test_groups_are_whole_in_every_chunk(chunk_rows):
    setting = make_paired_setting()
    found = setting.run({"x": (setting.make(SpanProduct), 0.7)}, chunk_rows)
    found.assert_close(setting.naive(lambda: 0.7 * formula(setting)))


@pytest.mark.parametrize("rows", [([0, 0], [0, 0]), ([2, 1], [0, 0])])
def test_no_group_at_all(rows):
    setting = make_setting(same_tokens=False, rows=rows)
    found = setting.run({"x": (setting.make(SpanProduct), 1.0)})
    assert found.loss == 0
    assert found.terms.keys() == {"x/distance"}
    assert all((gradient == 0).all() for gradient in found.gradients.values())


class WithoutGroups(SpanProduct):
    name = "without_groups"

    def streams(self, *args: Any) -> Mapping[str, Own]:
        return {name: replace(own, group=None) for name, own in super().streams(*args).items()}


class NotASum(SpanProduct):
    name = "not_a_sum"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return replace(super().needs(params, same_tokens), visits=(Visit("spans", ("q", "p"), kind="rows"),))


@pytest.mark.parametrize("loss", [WithoutGroups, NotASum])
def test_own_streams_stand_side_by_side_by_groups_and_in_sums_alone(loss):
    setting = make_paired_setting()
    with pytest.raises(AssertionError, match=r"^the visit 'x\.spans' puts rows of \['x/p', 'x/q'\] side by side"):
        setting.run({"x": (setting.make(loss), 1.0)})


class Descending(SpanProduct):
    name = "descending"

    def streams(self, *args: Any) -> Mapping[str, Own]:
        return {
            name: replace(own, group=None if own.group is None else own.group.flip(0))
            for name, own in super().streams(*args).items()
        }


def test_groups_out_of_order_are_refused():
    setting = make_paired_setting()
    with pytest.raises(AssertionError, match=r"^groups of rows must be ascending"):
        setting.run({"x": (setting.make(Descending), 1.0)})
