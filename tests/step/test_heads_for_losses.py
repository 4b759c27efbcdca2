"""What a loss may see of heads: whole weights before the first step, and in its streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from settings import Gold, TestLoss, make_paired_setting, make_setting
from torch import Tensor

from kdzoo import Batch, Chunk, KdzooError, Needs, NoParams, Own, OwnStream, Terms, View, Visit
from kdzoo.step.distiller import set_up
from kdzoo.step.vocabulary import Slot, _Walk


class Projected(TestLoss):
    """Teacher states in the student's space: through W_T and back through W_S."""

    name = "projected"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(
            student=frozenset({"head.weight"}),
            teacher=frozenset({"head.weight", "hidden.last"}),
            streams=(OwnStream("moved", "teacher", head="student"),),
            visits=(Visit("beside", ("student", "moved")),),
        )

    def setup(self, heads: Mapping[str, Tensor]) -> None:
        self.heads = {name: weight.clone() for name, weight in heads.items()}

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> dict[str, Own]:
        ours, theirs = student["head.weight"], teacher["head.weight"]
        return {"moved": Own(teacher["hidden.last"] @ theirs[: len(ours)].T @ ours)}

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        return Terms().add("product", (chunk.logits("student") * chunk.logits("moved")).sum())


class ReadsLate(Projected):
    name = "reads_late"

    def combine(self, batch, student, teacher, facts, rows):
        return Terms().add("late", student["head.weight"].sum())


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
    n = setting.batch.counts["rows"]

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
    slots = [Slot(name, loss, loss.needs(loss.params, False)) for name, loss in losses.items()]
    gathered: list[list[Tensor]] = []

    @contextmanager
    def gather(parameters: list[Tensor]) -> Iterator[None]:
        gathered.append(list(parameters))
        yield

    ours, theirs = setting.head.weight, setting.teacher_head.weight
    set_up(slots, {"student": setting.head, "teacher": setting.teacher_head}, gather)
    assert losses["projected"].heads.keys() == {"student", "teacher"}
    assert losses["projected"].heads["teacher"].equal(theirs)
    assert losses["student_only"].heads.keys() == {"student"}
    assert not losses["projected"].heads["student"].requires_grad
    assert not hasattr(losses["nothing"], "heads")
    assert [len(parameters) for parameters in gathered] == [2, 1]
    assert gathered[1][0] is ours


def test_rows_without_a_partner_do_not_meet_the_heads_of_streams_that_pairs_alone_see(monkeypatch):
    setting = make_paired_setting()
    made: list[tuple[int, tuple[str, ...]]] = []
    products = _Walk._products

    def counted(walk, rows, names):
        found = products(walk, rows, names)
        made.append((len(next(iter(found.values()))), tuple(names)))
        return found

    monkeypatch.setattr(_Walk, "_products", counted)
    setting.run({"kd": (setting.make(Projected), 1.0), "sft": (setting.make(Gold), 1.0)})
    assert made == [(3, ("kd/moved", "student")), (len(setting.hidden) - 3, ("student",))]
