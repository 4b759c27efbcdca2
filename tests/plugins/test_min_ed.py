from __future__ import annotations

from typing import Any

import pytest
import torch
from recordings import Recording, V, W, assert_same, make_models, make_pair, nll
from torch import Tensor

from kdzoo.testing import Replay, replay
from kdzoo_divergences import ForwardKL
from kdzoo_min_ed import MinED

IN_STUDENT = [0, 3, 3, -1, 8, 1, 5, 5, -1, 2, 5]
"""The student's entry for each of the teacher's: two go to 3, three to 5, two nowhere; nothing comes to 4, 6 and 7."""
IN_TEACHER = [0, 5, 9, 1, -1, 7, 7, 10, 4]
"""The teacher's entry for each of the student's: two take over that of 7, one of none."""
PAIRS = [(0, 0), (2, 1), (3, 2), (4, 3), (5, 4), (9, 8)]
"""The student's tokens and the teacher's, counted over all sequences."""


@pytest.fixture
def models() -> tuple[Recording, Recording]:
    """In three pairs the map leads from label to label, in two from input to input."""
    student, teacher = make_models(same_tokens=False)
    placed = [(side.labels != -100).nonzero() for side in (student, teacher)]

    def say(kind: str, pair: int, theirs: int, mine: int) -> None:
        for side, places, which, entry in zip((student, teacher), placed, PAIRS[pair], (mine, theirs), strict=True):
            row, at = places[which]
            getattr(side, kind)[row, at] = entry

    for pair, theirs, mine in ((0, 1, 3), (2, 7, 5), (4, 9, 2)):
        say("labels", pair, theirs, mine)
    for pair, theirs, mine in ((1, 2, 3), (2, 4, 8)):
        say("ids", pair, theirs, mine)
    return student, teacher


def run(student: Recording, teacher: Recording, **params: Any) -> Replay:
    return replay(
        {"kd": (MinED, params, 1.0)},
        student.recorded(),
        teacher.recorded(),
        same_tokens=False,
        pairs=PAIRS,
        student_ids=IN_STUDENT,
        teacher_ids=IN_TEACHER,
        chunk_bytes=400,
    )


def leaves(student: Recording) -> dict[str, Tensor]:
    return {"student_hidden": student.hidden, "student_head": student.head}


def packed(side: Recording) -> dict[str, Tensor]:
    """Of all scored tokens: logits, labels, and the tokens that stand at their positions."""
    scored = side.labels != -100
    return {
        "logits": torch.cat([side.logits(b) for b in range(len(side))]),
        "labels": side.labels[scored],
        "ids": side.ids[scored],
    }


def target(y: Tensor, entries: str, several: str) -> Tensor:
    """The student's entry by entry: which of the teacher's odds each gets."""
    odds, found = y.exp(), []
    for mine in range(V):
        if entries == "nearest_in_teacher":
            sources = [IN_TEACHER[mine]] if IN_TEACHER[mine] >= 0 else []
        else:
            sources = [theirs for theirs, partner in enumerate(IN_STUDENT) if partner == mine]
        kept = sources[:1] if several == "first" else sources
        found.append(sum((odds[source] for source in kept), torch.zeros(()).double()))
    together = torch.stack(found)
    return together / together.sum()


def leads(theirs: int, mine: int, entries: str) -> bool:
    return IN_TEACHER[mine] == theirs if entries == "nearest_in_teacher" else IN_STUDENT[theirs] == mine


def formula(
    student: Recording,
    teacher: Recording,
    temperature: float = 2.0,
    entries: str = "nearest_in_student",
    several: str = "sum",
    agree: str = "label",
    gold: bool = True,
) -> tuple[Tensor, int]:
    """The loss, and how many tokens learn from the teacher."""
    mine, theirs = packed(student), packed(teacher)
    values = list(nll(mine["logits"] / temperature, mine["labels"]) * gold)
    taught = 0
    for s, t in PAIRS:
        key = "ids" if agree == "input" else "labels"
        if agree == "pair" or leads(int(theirs[key][t]), int(mine[key][s]), entries):
            p = target(theirs["logits"][t].detach() / temperature, entries, several)
            q = (mine["logits"][s] / temperature).softmax(-1)
            kept = p > 0
            values[s] = (p[kept] * (p[kept] / q[kept]).log()).sum()
            taught += 1
    return torch.stack(values).sum() / len(values), taught


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0},
        {"several": "first"},
        {"agree": "input"},
        {"agree": "pair"},
        {"agree": "pair", "gold": False, "temperature": 0.5},
        {"agree": "pair", "entries": "nearest_in_teacher"},
        {"agree": "pair", "entries": "nearest_in_teacher", "several": "first"},
        {"agree": "input", "entries": "nearest_in_teacher"},
        {"entries": "same_text", "gold": False},
    ],
)
def test_it_is_the_formula_in_value_and_gradient(models, params):
    found = run(*models, **params)
    loss, taught = formula(*models, **params)
    assert_same(found, loss, leaves(models[0]))
    tokens = len(packed(models[0])["labels"])
    assert float(found.watched["kd/taught"]) == pytest.approx(taught / tokens)


def test_pairs_agree_by_their_labels_by_their_inputs_or_always(models):
    taught = {agree: formula(*models, agree=agree)[1] for agree in ("label", "input", "pair")}
    assert taught["label"] >= 3 and taught["input"] >= 2 and taught["pair"] == len(PAIRS)
    assert len({float(run(*models, agree=agree).loss) for agree in taught}) == 3


@pytest.mark.parametrize(
    ("preset", "params"),
    [
        ("dskd@077337a", {"several": "first", "agree": "input"}),
        ("tokenkit@bcacdef", {"entries": "nearest_in_teacher", "agree": "pair"}),
    ],
)
def test_a_preset_is_its_parameters(models, preset, params):
    assert run(*models, preset=preset).loss == run(*models, **params).loss


@pytest.mark.parametrize(
    ("params", "reached"),
    [
        ({}, [0, 1, 2, 4, 5, 6, 7, 9, 10]),
        ({"several": "first"}, [0, 1, 4, 5, 6, 9]),
        ({"entries": "nearest_in_teacher"}, [0, 1, 4, 5, 7, 9, 10]),
    ],
)
def test_the_mapped_mass_is_that_of_the_entries_that_are_moved(models, params, reached):
    y = packed(models[1])["logits"][[t for _, t in PAIRS]]
    mass = y.softmax(-1)[:, reached].sum(-1).mean()
    torch.testing.assert_close(run(*models, **params).watched["kd/mapped_mass"], mass)


def test_a_moved_distribution_sums_to_one_and_is_zero_where_nothing_comes_to():
    made = MinED(MinED.Params(), make_pair(V, W, torch.tensor(IN_STUDENT), False, "nearest_in_student"), {})
    moved = made.moved(torch.randn(4, W).double().log_softmax(-1)).exp()
    torch.testing.assert_close(moved.sum(-1), torch.ones(4).double())
    assert not moved[:, [4, 6, 7]].any() and moved[:, [0, 1, 2, 3, 5, 8]].all()


@pytest.mark.parametrize("params", [{}, {"agree": "input"}, {"entries": "nearest_in_teacher", "gold": False}])
def test_with_one_tokenizer_it_is_the_forward_kl(params):
    student, teacher = make_models(same_tokens=True)

    def found(loss: Any, **given: Any) -> Replay:
        slot = {"kd": (loss, {"temperature": 2.0, **given}, 1.0)}
        return replay(slot, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=400)

    ours, plain = found(MinED, **params), found(ForwardKL)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-12, atol=1e-12)
    for name in ("student_hidden", "student_head"):
        torch.testing.assert_close(ours.gradients[name], plain.gradients[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gold", [True, False])
def test_without_pairs_every_target_is_the_gold_token(models, gold):
    student, teacher = models
    found = replay(
        {"kd": (MinED, {"gold": gold}, 1.0)},
        student.recorded(),
        teacher.recorded(),
        same_tokens=False,
        student_ids=IN_STUDENT,
    )
    mine = packed(student)
    loss = nll(mine["logits"] / 2, mine["labels"]).mean() * gold
    assert_same(found, loss + 0 * student.hidden.sum() + 0 * student.head.sum(), leaves(student))


def test_a_teacher_that_excludes_all_that_is_mapped_leaves_it_finite(models):
    student, teacher = models
    teacher.head = teacher.head.clone()
    teacher.hidden = torch.zeros_like(teacher.hidden)
    teacher.hidden[..., 0] = 1.0
    teacher.head[:, 0] = torch.where(torch.tensor(IN_STUDENT) < 0, 0.0, -2000.0).double()
    found = run(student, teacher, agree="pair")
    assert found.loss.isfinite() and found.gradients["student_hidden"].isfinite().all()
