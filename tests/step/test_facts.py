"""The teacher's facts: made by hand, in chunks, and carried to rows of another tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from settings import TestLoss, make_paired_setting, make_setting, make_side
from torch import Tensor

from kdzoo import Batch, Chunk, Head, Needs, NoParams, Terms, View, Visit
from kdzoo.step.facts import FACTS, carry_by_spans, facts_of, judge

LOGITS = torch.tensor([[0.0, 0.0, math.log(2.0)], [1.0, 0.0, -torch.inf]])
LABELS = torch.tensor([2, 1])


def found(*wanted: str) -> dict[str, Tensor]:
    return facts_of(LOGITS, LABELS, frozenset(wanted), lambda tau: (LOGITS / tau).log_softmax(-1))


def test_facts_by_hand():
    facts = found(*FACTS)
    assert facts["teacher.top1"].tolist() == [2, 0]
    assert facts["teacher.correct"].tolist() == [True, False]
    p = 1 / (1 + math.exp(1))  # of the second row's token 1
    assert facts["teacher.label_logprob"].tolist() == pytest.approx([math.log(0.5), math.log(p)])
    entropy = [0.5 * math.log(2) + 0.5 * math.log(4), -p * math.log(p) - (1 - p) * math.log(1 - p)]
    assert facts["teacher.entropy"].tolist() == pytest.approx(entropy)


@pytest.mark.parametrize("fact", FACTS)
def test_only_what_is_wanted_is_made(fact):
    assert found(fact).keys() == {fact}


def test_a_row_is_correct_on_a_student_row_where_its_whole_span_is():
    student = make_side([6], 9, span=torch.tensor([0, 1, 1, 2, -1, 3]))
    teacher = make_side([7], 9, span=torch.tensor([0, 0, 1, 2, 2, -1, 4]))
    facts = {
        "teacher.correct": torch.tensor([True, False, True, True, True, False, False]),
        "teacher.label_logprob": torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0]),
        "teacher.entropy": torch.tensor([1.0, 3.0, 4.0, 6.0, 9.0, 32.0, 64.0]),
        "teacher.top1": torch.arange(7),
    }
    carried = carry_by_spans(facts, student, teacher)
    # Span 3 has no teacher row and row 4 no span: nothing is known against the teacher there.
    assert carried["teacher.correct"].tolist() == [False, True, True, True, True, True]
    assert carried["teacher.label_logprob"].tolist() == [-3, -4, -4, -24, 0, 0]
    assert carried["teacher.entropy"].tolist() == [2, 4, 4, 7.5, 0, 0]
    assert "teacher.top1" not in carried  # it names a token of another vocabulary


@pytest.mark.parametrize("rows", [([0], [0]), ([3], [0]), ([0], [3])])
def test_facts_are_carried_from_and_to_no_rows(rows):
    student, teacher = make_side(rows[0], 9), make_side(rows[1], 9)
    carried = carry_by_spans({"teacher.correct": torch.zeros(len(teacher), dtype=torch.bool)}, student, teacher)
    assert carried["teacher.correct"].tolist() == [True] * len(student)


class Asking(TestLoss):
    """Keeps every fact that a chunk carries."""

    name = "asking"
    streams_seen = ("student",)

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        facts = tuple(fact for fact in FACTS if same_tokens or "teacher" in cls.streams_seen or fact != "teacher.top1")
        return Needs(visits=(Visit("look", cls.streams_seen, kind="rows", facts=facts),), facts=facts)

    def over_vocab(self, visit: str, chunk: Chunk) -> Mapping[str, Tensor]:
        return dict(chunk.facts) | {"shape": chunk.logits(self.streams_seen[0])[:, 0]}

    def combine(
        self,
        batch: Batch,
        student: View,
        teacher: View,
        facts: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
    ) -> Terms:
        self.in_chunks = {name.removeprefix("look."): value for name, value in rows.items()}
        self.in_combine = facts
        return Terms().add("nothing", rows["look.shape"].sum() * 0)


class AskingTheTeacher(Asking):
    name = "asking_the_teacher"
    streams_seen = ("teacher",)


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
@pytest.mark.parametrize("same_tokens", [True, False])
def test_a_visit_carries_the_facts_of_its_rows(chunk_rows, same_tokens):
    setting = make_setting() if same_tokens else make_paired_setting()
    logits, labels = setting.teacher_logits().detach(), setting.batch.teacher.labels
    of_teacher = facts_of(logits, labels, frozenset(FACTS), lambda tau: (logits / tau).log_softmax(-1))
    of_student = of_teacher if same_tokens else carry_by_spans(of_teacher, setting.batch.student, setting.batch.teacher)
    asking, asking_teacher = setting.make(Asking), setting.make(AskingTheTeacher)
    setting.run({"asking": (asking, 1.0), "teacher": (asking_teacher, 1.0)}, chunk_rows)
    for name, fact in of_student.items():
        torch.testing.assert_close(asking.in_chunks[name], fact)
        torch.testing.assert_close(asking.in_combine[name], fact)
        torch.testing.assert_close(asking_teacher.in_combine[name], fact)  # on student rows, always
    for name, fact in of_teacher.items():
        torch.testing.assert_close(asking_teacher.in_chunks[name], fact)


def test_a_judgement_does_not_depend_on_chunks():
    setting = make_setting(bias=True, soft_cap=2.0)
    head = Head(setting.head.weight, setting.head.bias, soft_cap=2.0)
    few, many = (judge(setting.hidden, head, setting.batch.student.labels, size) for size in (1, 2**20))
    logits = setting.logits()
    for judged in (few, many):
        torch.testing.assert_close(
            judged["teacher.label_logprob"],
            logits.log_softmax(-1).gather(1, setting.batch.student.labels[:, None])[:, 0].detach(),
        )
        assert (judged["teacher.correct"] == (logits.argmax(-1) == setting.batch.student.labels)).all()
