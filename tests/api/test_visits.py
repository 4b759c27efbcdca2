"""What `visit` makes of a method: which streams it sees side by side, how, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor

from kdzoo import Logits, Loss, ModelInfo, ModelPair, Params, Step, Terms, visit
from kdzoo.api.loss import Visit


class Everything(Loss):
    """Marks of every sort."""

    name, paper, formula = "everything", "none", "none"

    class Params(Params):
        by: Literal["sum", "tokens"] = "sum"
        others: tuple[str, ...] = ("mine", "theirs")
        watches: bool = False

    @visit
    def plain(self, student: Logits, teacher: Logits, mine: Logits) -> Terms:
        """Its own words."""
        return Terms().add("plain", student.logits + teacher.logits + mine.logits)

    @visit(kind="scan")
    def scanned(self, teacher: Logits) -> Mapping[str, Tensor]:
        return {"all": teacher.logits}

    @visit(each=("mine", "theirs"))
    def one(self, seen: Logits) -> Terms:
        return Terms().add(seen.stream, seen.logits)

    @visit(streams=lambda params: ("student", *params.others), kind=lambda params: params.by)
    def several(self, **seen: Logits) -> Mapping[str, Tensor]:
        return {name: value.logits for name, value in seen.items()}

    @visit(when=lambda params: params.watches, measured_only=True)
    def watched(self, student: Logits) -> Terms:
        return Terms().watch("logits", student.logits, 1)

    def unmarked(self, student: Logits) -> Terms:
        raise AssertionError("it is never called")


def visits(**params: object) -> dict[str, Visit]:
    return {visit.name: visit for visit in Everything.visits(Everything.Params(**params))}


def seen(*streams: str) -> dict[str, Logits]:
    return {name: Logits(name, torch.ones(2, 3), torch.zeros(2, dtype=torch.long)) for name in streams}


@pytest.fixture
def loss() -> Everything:
    info = ModelInfo(4, 3, 1, "test")
    return Everything(Everything.Params(), ModelPair(info, info, True), {})


def test_the_names_of_the_arguments_are_the_streams():
    assert visits()["plain"] == Visit("plain", "plain", ("student", "teacher", "mine"), "sum", False)


def test_visits_come_in_the_order_of_their_definition():
    assert [*visits(watches=True)] == ["plain", "scanned", "one.mine", "one.theirs", "several", "watched"]


def test_kinds_are_as_marked_or_follow_from_the_parameters():
    assert visits()["scanned"].kind == "scan"
    assert [visits(by=by)["several"].kind for by in ("sum", "tokens")] == ["sum", "tokens"]


def test_streams_may_follow_from_the_parameters(loss):
    found = visits(others=("other",))["several"]
    assert found.streams == ("student", "other")
    returned = found.of(loss, seen("student", "other"))
    assert isinstance(returned, Mapping) and returned.keys() == {"student", "other"}


def test_each_stream_is_a_visit_of_its_own_and_the_same_method_sees_it(loss):
    found = visits()
    assert [found[f"one.{name}"].streams for name in ("mine", "theirs")] == [("mine",), ("theirs",)]
    returned = found["one.theirs"].of(loss, seen("theirs"))
    assert isinstance(returned, Terms) and returned.values.keys() == {"theirs"}


def test_when_says_for_which_parameters_a_visit_is_there_and_measured_only_that_it_does_not_train():
    assert "watched" not in visits()
    assert visits(watches=True)["watched"].measured_only
    assert not visits()["plain"].measured_only


def test_a_marked_method_is_still_a_method(loss):
    assert loss.plain(**seen("student", "teacher", "mine")).sums["plain"][0] == 18
    assert Everything.plain.__doc__ == "Its own words."


def test_a_subclass_may_mark_anew_and_keeps_the_place():
    class Other(Everything):
        @visit(kind="tokens")
        def plain(self, teacher: Logits) -> Mapping[str, Tensor]:
            return {}

    found = Other.visits(Other.Params())
    assert found[0] == Visit("plain", "plain", ("teacher",), "tokens", False)
    assert [one.name for one in found] == [*visits()]


def test_a_subclass_may_take_a_visit_away():
    class Less(Everything):
        plain = None

    assert [one.name for one in Less.visits(Less.Params())] == [*visits()][1:]


class Finishes(Loss):
    name, paper, formula = "finishes", "none", "none"

    def finish(self, step: Step) -> Terms:
        return Terms()


class Blind(Loss):
    name, paper, formula = "blind", "none", "none"


def test_a_loss_has_a_visit_or_finishes():
    assert Finishes.declared_fault() is None and Everything.declared_fault() is None
    assert Blind.declared_fault() == "has neither a visit nor 'finish'; mark a method with '@kdzoo.visit'"
