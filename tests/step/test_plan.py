"""The order of the walks, by itself: from what losses see to which tokens are walked when. No tensor in sight."""

from __future__ import annotations

import pytest

from kdzoo.api.loss import Visit, VisitKind
from kdzoo.step.plan import (
    MODELS,
    Sight,
    Walk,
    own_name,
    scans,
    sight,
    streams_of,
    walks_of_models,
    walks_of_packings,
)

BOTH = ("student", "teacher")
CORRECT = frozenset({("teacher", "teacher.correct")})
NONE: frozenset[tuple[str, str]] = frozenset()
AXES = {
    "student": "student",
    "teacher": "teacher",
    "teacher fused.x": "teacher",
    "kd/mine": "student",
    "kd/theirs": "teacher",
    "kd/p": "kd/p",
    "kd/q": "kd/q",
    "kd/alone": "kd/alone",
}
"""Streams of a pass, as one loss called `kd` makes them beside the models, and as packings."""
GROUPED = {"kd/p", "kd/q"}


def seen(*streams: str, kind: VisitKind = "sum", term: str = "kd", name: str = "look") -> Sight:
    found = maybe_seen(*streams, kind=kind, term=term, name=name)
    assert found is not None
    return found


def maybe_seen(*streams: str, kind: VisitKind = "sum", term: str = "kd", name: str = "look") -> Sight | None:
    visit = Visit(name, name, streams, kind, measured_only=False)
    return sight(term, visit, {"student": "student", "teacher": "teacher"}, AXES, GROUPED)


def order(walks: list[Walk]) -> list[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    return [(walk.axes, walk.together, walk.leftovers) for walk in walks]


# What a visit sees.


def test_a_visit_sees_its_own_streams_under_their_names_in_the_pass():
    found = seen("student", "mine")
    assert found.streams == {"student": "student", "mine": "kd/mine"}
    assert found.axes == {"student"}
    assert found.whole_name == "kd.look"
    assert own_name("kd", "mine") == "kd/mine"


def test_a_loss_of_a_fused_state_sees_that_states_logits_as_the_teachers():
    visit = Visit("look", "look", BOTH, "sum", measured_only=False)
    found = sight("kd", visit, {"student": "student", "teacher": "teacher fused.x"}, AXES, GROUPED)
    assert found is not None
    assert found.streams == {"student": "student", "teacher": "teacher fused.x"}
    assert found.axes == MODELS


def test_a_visit_whose_stream_is_not_there_is_none():
    assert maybe_seen("student", "later") is None
    assert maybe_seen("mine", term="other") is None, "streams are of the loss that makes them"


@pytest.mark.parametrize(
    ("streams", "kind"),
    [
        (("student", "alone"), "sum"),
        (("student", "p"), "sum"),
        (("alone", "p"), "sum"),
        (("p", "q"), "tokens"),
    ],
)
def test_tokens_that_stand_nowhere_side_by_side_are_refused(streams, kind):
    with pytest.raises(AssertionError, match=r"^the visit 'kd\.look' puts tokens of \['.*'\] side by side$"):
        seen(*streams, kind=kind)


@pytest.mark.parametrize("streams", [BOTH, ("alone",), ("student", "theirs")])
def test_a_scan_of_anything_but_one_models_tokens_is_refused(streams):
    with pytest.raises(AssertionError, match=r"^the scan 'kd\.look' is of one model's tokens$"):
        seen(*streams, kind="scan")


# The models' own tokens.


@pytest.mark.parametrize("wanted", [NONE, CORRECT])
def test_with_one_tokenizer_there_is_one_walk_and_facts_fall_out_of_it(wanted):
    sights = (seen("student"), seen(*BOTH), seen("theirs", kind="tokens"))
    assert walks_of_models(sights, wanted, MODELS, True) == [Walk(BOTH, "tokens", (), sights, wanted)]


def test_with_two_tokenizers_and_no_facts_pairs_come_first_and_then_all_that_is_left():
    sights = (seen("student"), seen(*BOTH), seen("theirs"))
    assert walks_of_models(sights, NONE, MODELS, False) == [Walk(BOTH, "pairs", BOTH, sights)]


def test_with_two_tokenizers_and_no_pairs_each_model_is_walked_by_itself():
    student, teacher = seen("student", "mine"), seen("theirs")
    assert walks_of_models((student, teacher), NONE, MODELS, False) == [
        Walk(("teacher",), "tokens", (), (teacher,)),
        Walk(("student",), "tokens", (), (student,)),
    ]


def test_with_two_tokenizers_the_teacher_goes_first_where_its_facts_are_waited_for():
    student, teacher = seen("student"), seen("teacher", kind="tokens")
    assert walks_of_models((student, teacher), CORRECT, MODELS, False) == [
        Walk(("teacher",), "tokens", (), (teacher,), CORRECT),
        Walk(("student",), "tokens", (), (student,)),
    ]


def test_pairs_that_wait_for_facts_meet_the_teacher_again_and_leave_only_students_over():
    student, pairs, teacher = seen("student"), seen("student", "theirs"), seen("theirs")
    assert walks_of_models((student, pairs, teacher), CORRECT, MODELS, False) == [
        Walk(("teacher",), "tokens", (), (teacher,), CORRECT),
        Walk(BOTH, "pairs", ("student",), (student, pairs)),
    ]


@pytest.mark.parametrize("same_tokens", [True, False])
def test_where_only_the_teacher_runs_its_tokens_are_walked(same_tokens):
    teacher = seen("theirs")
    first, *others = walks_of_models((teacher,), CORRECT, frozenset({"teacher"}), same_tokens)
    assert first == Walk(("teacher",), "tokens", (), (teacher,), CORRECT)
    assert [streams_of(walk) for walk in others] == [[]]


@pytest.mark.parametrize("same_tokens", [True, False])
def test_scans_and_packings_are_no_part_of_the_models_walks(same_tokens):
    sights = (seen("student", kind="scan"), seen("p", "q"), seen("alone"))
    walks = walks_of_models(sights, NONE, MODELS, same_tokens)
    assert [walk.sights for walk in walks] == [()] * len(walks)


# Before and after them.


def test_scans_are_walked_one_model_after_the_other():
    mine, theirs, again = (seen(model, kind="scan", name=f"of_{model}") for model in (*BOTH, "student"))
    assert scans((theirs, mine, seen("student"), again)) == [
        Walk(("student",), "tokens", (), (mine, again)),
        Walk(("teacher",), "tokens", (), (theirs,)),
    ]
    assert scans((theirs,)) == [Walk(("teacher",), "tokens", (), (theirs,))]
    assert scans((seen("student"),)) == []


def test_a_packing_is_walked_by_itself_with_everybody_who_sees_it():
    first, second = seen("alone", name="first"), seen("alone", name="second", kind="tokens")
    walks = walks_of_packings((first, seen("student"), second), GROUPED)
    assert walks == [Walk(("kd/alone",), "tokens", (), (first, second))]


def test_packings_with_groups_are_walked_together_group_by_group():
    together, alone = seen("q", "p"), seen("p", name="alone")
    assert walks_of_packings((together, alone), GROUPED) == [
        Walk(("kd/p", "kd/q"), "groups", (), (together,)),
        Walk(("kd/p",), "groups", (), (alone,)),
    ]
    assert walks_of_packings((seen("student"), seen(*BOTH)), GROUPED) == []


# What a walk applies heads to.


def test_heads_are_applied_to_what_is_seen_and_to_what_facts_are_of_always_in_the_same_order():
    facts = frozenset({("teacher fused.x", "teacher.correct")})
    walk = Walk(BOTH, "tokens", (), (seen("student", "mine"), seen("student")), facts)
    assert streams_of(walk) == ["kd/mine", "student", "teacher fused.x"]
    assert streams_of(Walk(("student",), "tokens")) == []
