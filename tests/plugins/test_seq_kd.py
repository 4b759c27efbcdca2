"""Sequence-level distillation: what is taught is in the rows; the loss is the likelihood of their tokens."""

from __future__ import annotations

import pytest
import torch
from recordings import assert_same, make_models, nll

from kdzoo.testing import Recorded, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_seq_kd import SeqKD


@pytest.mark.parametrize(("reduction", "count"), [("tokens", 10), ("sequences", 3)])
def test_it_is_the_negative_log_likelihood_of_the_answers_per_token_or_per_sequence(reduction, count):
    student, _ = make_models(True)  # 4, 1 and 5 tokens
    loss = {"seq_kd": (SeqKD, {"reduction": reduction}, 0.7)}
    found = replay(loss, student.recorded(), None, same_tokens=True, chunk_bytes=100)
    per_sequence = torch.stack([nll(student.logits(b), student.gold(b)).sum() for b in range(len(student))])
    leaves = {"student_hidden": student.hidden, "student_head": student.head}
    assert_same(found, 0.7 * per_sequence.sum() / count, leaves)


def test_it_is_cross_entropy_on_its_rows_and_watches_the_same():
    student, _ = make_models(False, seed=1)
    ours, theirs = (
        replay({"x": (loss, {}, 1.0)}, student.recorded(), None, same_tokens=False) for loss in (SeqKD, CrossEntropy)
    )
    assert ours.loss == theirs.loss
    assert ours.watched["x/token_accuracy"] == theirs.watched["x/token_accuracy"]
    assert all(torch.equal(ours.gradients[name], gradient) for name, gradient in theirs.gradients.items())


def test_a_student_that_is_certain_of_every_token_has_nothing_to_learn():
    labels = torch.tensor([[-100, 2, 0], [1, -100, -100]])
    logits = torch.full((2, 3, 4), -1e4, dtype=torch.float64).scatter(-1, labels.clamp_min(0)[..., None], 0.0)
    found = replay({"seq_kd": (SeqKD, {}, 1.0)}, Recorded(labels, logits=logits), None, same_tokens=True)
    assert found.loss == 0
    assert (found.gradients["student_hidden"] == 0).all()
    assert found.watched["seq_kd/token_accuracy"] == 1


def test_of_one_token_both_denominators_are_one():
    student, _ = make_models(True, rows=([1], [1]))
    found = [
        replay({"x": (SeqKD, {"reduction": reduction}, 1.0)}, student.recorded(), None, same_tokens=True).loss
        for reduction in ("tokens", "sequences")
    ]
    assert found[0] == found[1] == nll(student.logits(0), student.gold(0)).sum().detach()


@pytest.mark.parametrize("same", [True, False])
def test_it_needs_the_teachers_answers_and_nothing_else_of_the_teacher(same):
    needs = SeqKD.needs(SeqKD.Params(), same)
    assert needs.answers
    assert not needs.teacher and not needs.facts and not needs.aligned
    assert needs.tokenizers == "any"
