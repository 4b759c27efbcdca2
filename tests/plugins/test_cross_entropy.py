from __future__ import annotations

import pytest
import torch
from recordings import Recording, assert_same, make_models, make_right, nll
from torch import Tensor

from kdzoo.testing import replay
from kdzoo_cross_entropy import CrossEntropy


def test_it_is_the_mean_over_response_tokens():
    student, _ = make_models(True)
    found = replay({"sft": (CrossEntropy, {}, 0.7)}, student.recorded(), None, same_tokens=True, chunk_bytes=100)
    rows = torch.cat([nll(student.logits(b), student.gold(b)) for b in range(len(student))])
    leaves = {"student_hidden": student.hidden, "student_head": student.head}
    assert_same(found, 0.7 * rows.mean(), leaves)
    torch.testing.assert_close(found.terms["sft/cross_entropy"], rows.mean().detach())
    assert found.tokens == 10


def test_the_accuracy_is_watched():
    student, _ = make_models(True)
    student.labels[0, student.rows(0)] = student.logits(0).argmax(-1)
    right = sum(int((~student.wrong(b)).sum()) for b in range(len(student)))
    found = replay({"sft": (CrossEntropy, {}, 1.0)}, student.recorded(), None, same_tokens=True, chunk_bytes=100)
    assert found.watched["sft/token_accuracy"].item() == pytest.approx(right / 10)


WHERE = ["teacher_right", "teacher_wrong"]


def by_the_teachers_verdict(student: Recording, teacher: Recording, same: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of all student rows, and where the teacher is right: by spans with two tokenizers."""
    values, right = [], []
    for b in range(len(student)):
        values.append(nll(student.logits(b), student.gold(b)))
        wrong = teacher.wrong(b)
        if not same:
            mine, theirs = student.chunks[b, student.rows(b)], teacher.chunks[b, teacher.rows(b)]
            wrong = ((mine[:, None] & theirs[None]).any(-1) & wrong).any(-1)
        right.append(~wrong)
    return torch.cat(values), torch.cat(right)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("where", WHERE)
def test_it_counts_where_the_teacher_is_right_or_wrong(same, where):
    student, teacher = make_models(same, rows=([7, 1, 5], [4, 1, 6]))
    make_right(teacher, lambda b, i: (b + i) % 2 == 0, student if same else None)
    sides = student.recorded(), teacher.recorded()
    found = replay({"sft": (CrossEntropy, {"where": where}, 0.7)}, *sides, same_tokens=same, chunk_bytes=100)
    values, right = by_the_teachers_verdict(student, teacher, same)
    counts = right if where == "teacher_right" else ~right
    assert counts.any() and not counts.all()
    leaves = {"student_hidden": student.hidden, "student_head": student.head}
    assert_same(found, 0.7 * values[counts].sum() / 13, leaves)  # divided by all rows
    rows = found.gradients["student_hidden"][student.labels != -100]
    assert (rows[~counts] == 0).all() and (rows[counts] != 0).any(-1).all()


@pytest.mark.parametrize("same", [True, False])
def test_the_two_parts_add_up_to_the_whole(same):
    student, teacher = make_models(same, rows=([7, 1, 5], [4, 1, 6]))
    make_right(teacher, lambda b, i: (b + i) % 2 == 0, student if same else None)
    sides = student.recorded(), teacher.recorded()
    parts = {where: (CrossEntropy, {"where": where}, 1.0) for where in WHERE}
    found = replay(parts, *sides, same_tokens=same, chunk_bytes=100)
    whole = replay({"sft": (CrossEntropy, {}, 1.0)}, *sides, same_tokens=same, chunk_bytes=100)
    torch.testing.assert_close(found.loss, whole.loss)
    torch.testing.assert_close(
        found.terms["teacher_right/cross_entropy"] + found.terms["teacher_wrong/cross_entropy"],
        whole.terms["sft/cross_entropy"],
    )
    assert found.gradients.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient)
    # The accuracy is the student's, on all rows.
    assert found.watched["teacher_wrong/token_accuracy"] == whole.watched["sft/token_accuracy"]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_a_teacher_that_is_always_right_leaves_nothing_for_the_other_part(same, right):
    student, teacher = make_models(same)
    make_right(teacher, lambda b, i: right, student if same else None)
    sides = student.recorded(), teacher.recorded()
    every, none = WHERE if right else WHERE[::-1]
    whole = replay({"sft": (CrossEntropy, {}, 1.0)}, *sides, same_tokens=same)
    torch.testing.assert_close(
        replay({"sft": (CrossEntropy, {"where": every}, 1.0)}, *sides, same_tokens=same).loss, whole.loss
    )
    nothing = replay({"sft": (CrossEntropy, {"where": none}, 1.0)}, *sides, same_tokens=same)
    assert nothing.loss == 0
    assert all((gradient == 0).all() for gradient in nothing.gradients.values())


@pytest.mark.parametrize("same", [True, False])
def test_the_teacher_is_asked_only_where_it_matters(same):
    everywhere = CrossEntropy.needs(CrossEntropy.Params(), same)
    assert not everywhere.aligned and not everywhere.facts
    for where in WHERE:
        needs = CrossEntropy.needs(CrossEntropy.Params(where=where), same)
        assert needs.facts == {"teacher.correct"}
        assert needs.aligned != same
