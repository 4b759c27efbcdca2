from __future__ import annotations

import pytest
import torch
from recordings import assert_same, make_models, nll

from kdzoo.testing import replay
from kdzoo_cross_entropy import CrossEntropy


def test_it_is_the_mean_over_response_tokens():
    student, _ = make_models(True)
    found = replay({"sft": (CrossEntropy, {}, 0.7)}, student.recorded(), None, same_tokens=True, chunk_bytes=100)
    rows = torch.cat([nll(student.logits(b), student.gold(b)) for b in range(len(student))])
    leaves = {"student_hidden": student.hidden, "student_head": student.head}
    assert_same(found, 0.7 * rows.mean(), leaves)
    torch.testing.assert_close(found.terms["sft/cross_entropy"], rows.mean().detach())
    assert found.rows == 10


def test_the_accuracy_is_watched():
    student, _ = make_models(True)
    student.labels[0, student.rows(0)] = student.logits(0).argmax(-1)
    right = sum(int((~student.wrong(b)).sum()) for b in range(len(student)))
    found = replay({"sft": (CrossEntropy, {}, 1.0)}, student.recorded(), None, same_tokens=True, chunk_bytes=100)
    assert found.watched["sft/token_accuracy"].item() == pytest.approx(right / 10)
