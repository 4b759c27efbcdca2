"""The teacher's facts: made by hand, in chunks, and carried to tokens of another tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from settings import TestLoss, make_paired_setting, make_setting, make_side
from torch import Tensor

from kdzoo import Head, KdzooError, Logits, Needs, NoParams, Step, Terms, visit
from kdzoo.api.facts import FACTS, carry_by_spans
from kdzoo.step.facts import facts_of, predictions

LOGITS = torch.tensor([[0.0, 0.0, math.log(2.0)], [1.0, 0.0, -torch.inf]])
LABELS = torch.tensor([2, 1])


def found(*wanted: str) -> dict[str, Tensor]:
    return facts_of(LOGITS, LABELS, frozenset(wanted), lambda tau: (LOGITS / tau).log_softmax(-1))


def test_facts_by_hand():
    facts = found(*FACTS)
    assert facts["teacher.top1"].tolist() == [2, 0]
    assert facts["teacher.correct"].tolist() == [True, False]
    p = 1 / (1 + math.exp(1))  # of the second token's token 1
    assert facts["teacher.label_logprob"].tolist() == pytest.approx([math.log(0.5), math.log(p)])
    entropy = [0.5 * math.log(2) + 0.5 * math.log(4), -p * math.log(p) - (1 - p) * math.log(1 - p)]
    assert facts["teacher.entropy"].tolist() == pytest.approx(entropy)


@pytest.mark.parametrize("fact", FACTS)
def test_only_what_is_wanted_is_made(fact):
    assert found(fact).keys() == {fact}


def test_a_token_is_correct_on_a_student_token_where_its_whole_span_is():
    student = make_side([6], 9, span=torch.tensor([0, 1, 1, 2, -1, 3]))
    teacher = make_side([7], 9, span=torch.tensor([0, 0, 1, 2, 2, -1, 4]))
    facts = {
        "teacher.correct": torch.tensor([True, False, True, True, True, False, False]),
        "teacher.label_logprob": torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0]),
        "teacher.entropy": torch.tensor([1.0, 3.0, 4.0, 6.0, 9.0, 32.0, 64.0]),
        "teacher.top1": torch.arange(7),
    }
    carried = carry_by_spans(facts, student, teacher)
    # Span 3 has no teacher token and token 4 no span: nothing is known against the teacher there.
    assert carried["teacher.correct"].tolist() == [False, True, True, True, True, True]
    assert carried["teacher.label_logprob"].tolist() == [-3, -4, -4, -24, 0, 0]
    assert carried["teacher.entropy"].tolist() == [2, 4, 4, 7.5, 0, 0]
    assert "teacher.top1" not in carried  # it names a token of another vocabulary


@pytest.mark.parametrize("tokens", [([0], [0]), ([3], [0]), ([0], [3])])
def test_facts_are_carried_from_and_to_no_tokens(tokens):
    student, teacher = make_side(tokens[0], 9), make_side(tokens[1], 9)
    carried = carry_by_spans({"teacher.correct": torch.zeros(len(teacher), dtype=torch.bool)}, student, teacher)
    assert carried["teacher.correct"].tolist() == [True] * len(student)


class Asking(TestLoss):
    """Keeps every fact that its visit can read of the student's tokens."""

    name = "asking"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(facts=frozenset(fact for fact in FACTS if same_tokens or fact != "teacher.top1"))

    @visit(kind="tokens")
    def look(self, student: Logits) -> Mapping[str, Tensor]:
        return self.asked(student)

    def asked(self, seen: Logits) -> Mapping[str, Tensor]:
        facts = self.needs(self.params, self.pair.same_tokens).facts
        return {fact: seen.fact(fact) for fact in facts} | {"shape": seen.logits[:, 0]}

    def finish(self, step: Step) -> Terms:
        self.in_chunks = {name.removeprefix("look."): value for name, value in step.values.items()}
        self.in_finish = step.facts
        return Terms().add("nothing", step.values["look.shape"] * 0)


class AskingTheTeacher(Asking):
    """The same of the teacher's tokens."""

    name = "asking_the_teacher"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(facts=frozenset(FACTS))

    @visit(kind="tokens")
    def look(self, teacher: Logits) -> Mapping[str, Tensor]:
        return self.asked(teacher)


@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
@pytest.mark.parametrize("same_tokens", [True, False])
def test_a_visit_reads_the_facts_of_its_tokens(chunk_tokens, same_tokens):
    setting = make_setting() if same_tokens else make_paired_setting()
    logits, labels = setting.teacher_logits().detach(), setting.batch.teacher.labels
    of_teacher = facts_of(logits, labels, frozenset(FACTS), lambda tau: (logits / tau).log_softmax(-1))
    of_student = of_teacher if same_tokens else carry_by_spans(of_teacher, setting.batch.student, setting.batch.teacher)
    asking, asking_teacher = setting.make(Asking), setting.make(AskingTheTeacher)
    setting.run({"asking": (asking, 1.0), "teacher": (asking_teacher, 1.0)}, chunk_tokens)
    for name, fact in of_student.items():
        torch.testing.assert_close(asking.in_chunks[name], fact)
        torch.testing.assert_close(asking.in_finish[name], fact)
        torch.testing.assert_close(asking_teacher.in_finish[name], fact)  # on student tokens, always
    for name, fact in of_teacher.items():
        torch.testing.assert_close(asking_teacher.in_chunks[name], fact)


def test_predictions_do_not_depend_on_chunks():
    setting = make_setting(bias=True, soft_cap=2.0)
    head = Head(setting.head.weight, setting.head.bias, soft_cap=2.0)
    few, many = (predictions(setting.hidden, head, setting.batch.student.labels, size) for size in (1, 2**20))
    logits = setting.logits()
    for found in (few, many):
        torch.testing.assert_close(
            found["teacher.label_logprob"],
            logits.log_softmax(-1).gather(1, setting.batch.student.labels[:, None])[:, 0].detach(),
        )
        assert (found["teacher.correct"] == (logits.argmax(-1) == setting.batch.student.labels)).all()


class AskingForMore(Asking):
    """Reads a fact that it does not declare."""

    name = "asking_for_more"
    reads = "teacher.entropy"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(facts=frozenset({"teacher.correct"}))

    def asked(self, seen: Logits) -> Mapping[str, Tensor]:
        return {"asked": seen.fact(self.reads)}


class AskingInVain(AskingForMore):
    name = "asking_in_vain"
    reads = "teacher.entropi"


@pytest.mark.parametrize("same_tokens", [True, False])
@pytest.mark.parametrize(
    ("loss", "said"),
    [(AskingForMore, "'teacher.entropy'"), (AskingInVain, "'teacher.entropi', did you mean 'teacher.entropy'?")],
)
def test_a_fact_that_is_not_declared_is_refused_in_one_line_whatever_others_declare(same_tokens, loss, said):
    setting = make_setting(same_tokens)
    with pytest.raises(KdzooError) as caught:
        setting.run({"asking": (setting.make(Asking), 1.0), "more": (setting.make(loss), 1.0)})
    fact, _, hint = said.partition(",")
    assert str(caught.value) == (
        f"a visit reads the fact {fact} of the stream 'student'{hint and ',' + hint}; facts here: teacher.correct; "
        "declare it in 'needs', and read it of a model's tokens"
    )


class Keeping(Asking):
    """Declares one fact, and keeps those that it is given."""

    name = "keeping"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(facts=frozenset({"teacher.correct"}))

    def carry_facts(self, step: Step) -> Mapping[str, Tensor]:
        self.to_carry = step.facts
        return super().carry_facts(step)


@pytest.mark.parametrize("same_tokens", [True, False])
def test_a_loss_is_given_the_facts_that_it_declares_and_no_other(same_tokens):
    setting = make_setting(same_tokens)
    keeping = setting.make(Keeping)
    setting.run({"asking": (setting.make(Asking), 1.0), "keeping": (keeping, 1.0)})
    assert keeping.in_finish.keys() == {"teacher.correct"}
    assert same_tokens or keeping.to_carry.keys() == {"teacher.correct"}


class DeclaringNothing(Keeping):
    """Declares no fact, and would fail if it were to carry any."""

    name = "declaring_nothing"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs()


def test_a_loss_without_facts_carries_none():
    setting = make_setting(same_tokens=False)
    nothing = setting.make(DeclaringNothing)
    setting.run({"asking": (setting.make(Asking), 1.0), "nothing": (nothing, 1.0)})
    assert not hasattr(nothing, "to_carry")
    assert not nothing.in_finish
