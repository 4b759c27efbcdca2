"""What a loss may see of heads: whole weights before the first step, and in its streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from settings import Gold, TestLoss, make_paired_setting, make_setting
from torch import Tensor

from kdzoo import KdzooError, Logits, Needs, NoParams, Step, Stream, Terms, visit
from kdzoo.step.distiller import start_from_heads
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.vocabulary_pass import _Run


class Projected(TestLoss):
    """Teacher states in the student's space: through W_T and back through W_S."""

    name = "projected"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"head.weight"}), teacher=frozenset({"head.weight", "hidden.last"}))

    def start_from_heads(self, heads: Mapping[str, Tensor]) -> None:
        self.heads = {name: weight.clone() for name, weight in heads.items()}

    def streams(self, step: Step) -> Mapping[str, Stream]:
        ours, theirs = step.student["head.weight"], step.teacher["head.weight"]
        moved = step.teacher["hidden.last"] @ theirs[: len(ours)].T @ ours
        return {"moved": Stream(moved, head="student", beside="teacher")}

    @visit
    def products(self, student: Logits, moved: Logits) -> Terms:
        return Terms().add("product", (student.logits * moved.logits).sum(-1))


class ReadsLate(Projected):
    name = "reads_late"

    def finish(self, step: Step) -> Terms:
        return Terms().add("late", step.student["head.weight"].sum())


class StudentOnly(Projected):
    name = "student_only"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"head.weight"}))


class Nothing(Projected):
    name = "nothing"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs()


def test_streams_read_both_heads_as_they_are_and_without_gradient():
    setting = make_setting()
    losses = {"kd": (setting.make(Projected), 1.0)}
    n = setting.batch.counts["tokens"]

    def formula() -> Tensor:
        head = setting.head.weight.detach()
        moved = setting.teacher_hidden @ setting.teacher_head.weight.T @ head
        return (setting.logits() * (moved @ head.T)).sum() / n

    setting.run(losses).assert_close(setting.naive(formula))


def test_heads_are_not_there_after_the_pass():
    setting = make_setting()
    with pytest.raises(KdzooError, match=r"^kd: reads the site 'head.weight' where heads are not whole"):
        setting.run({"kd": (setting.make(ReadsLate), 1.0)})


def test_before_the_first_step_each_loss_sees_the_heads_that_it_declares_and_they_are_whole_then():
    setting = make_setting(same_tokens=False)
    losses = {kind.name: setting.make(kind) for kind in (Projected, StudentOnly, Nothing)}
    terms = [LossTerm.of(name, loss) for name, loss in losses.items()]
    gathered: list[list[Tensor]] = []

    @contextmanager
    def gather(parameters: list[Tensor]) -> Iterator[None]:
        gathered.append(list(parameters))
        yield

    ours, theirs = setting.head.weight, setting.teacher_head.weight
    start_from_heads(terms, {"student": setting.head, "teacher": setting.teacher_head}, gather)
    assert losses["projected"].heads.keys() == {"student", "teacher"}
    assert losses["projected"].heads["teacher"].equal(theirs)
    assert losses["student_only"].heads.keys() == {"student"}
    assert not losses["projected"].heads["student"].requires_grad
    assert not hasattr(losses["nothing"], "heads")
    assert [len(parameters) for parameters in gathered] == [2, 1]
    assert gathered[1][0] is ours


def test_tokens_without_a_partner_do_not_meet_the_heads_of_streams_that_pairs_alone_see(monkeypatch):
    setting = make_paired_setting()
    made: list[tuple[int, tuple[str, ...]]] = []
    products = _Run._products

    def counted(run, chunk, names):
        found = products(run, chunk, names)
        made.append((len(next(iter(found.values()))), tuple(names)))
        return found

    monkeypatch.setattr(_Run, "_products", counted)
    setting.run({"kd": (setting.make(Projected), 1.0), "sft": (setting.make(Gold), 1.0)})
    assert made == [(3, ("kd/moved", "student")), (len(setting.hidden) - 3, ("student",))]
