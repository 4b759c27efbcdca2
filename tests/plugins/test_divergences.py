from __future__ import annotations

import pytest
from recordings import assert_same, make_models
from torch import Tensor

from kdzoo.testing import Recorded, replay
from kdzoo_divergences import ForwardKL


@pytest.mark.parametrize(
    ("params", "tau", "teacher_tau", "factor"),
    [
        ({}, 1.0, 1.0, 1.0),
        ({"temperature": 2.0}, 2.0, 2.0, 1.0),
        ({"temperature": 2.0, "square_temperature": True}, 2.0, 2.0, 4.0),
        ({"temperature": 2.0, "teacher_temperature": 1.5}, 2.0, 3.0, 1.0),
    ],
)
def test_forward_kl(params, tau, teacher_tau, factor):
    student, teacher = make_models(True)

    def row_sum(b: int) -> Tensor:
        p, q = (teacher.logits(b) / teacher_tau).softmax(-1), (student.logits(b) / tau).softmax(-1)
        return (p * (p / q).log()).sum()

    found = replay(
        {"kl": (ForwardKL, params, 0.3)}, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=200
    )
    loss = 0.3 * factor * sum(row_sum(b) for b in range(len(student))) / 10
    assert_same(found, loss, {"student_hidden": student.hidden, "student_head": student.head})


def test_equal_distributions_have_no_divergence_and_no_gradient():
    _, teacher = make_models(True)
    both = Recorded(teacher.labels, hidden=teacher.hidden, head=teacher.head)
    found = replay({"kl": (ForwardKL, {"temperature": 2.0}, 1.0)}, both, both, same_tokens=True)
    assert found.loss.abs() < 1e-15
    assert found.gradients["student_hidden"].abs().max() < 1e-15


def test_it_is_declared_to_need_one_tokenizer():
    assert ForwardKL.needs(ForwardKL.Params(), same_tokens=True).tokenizers == "same"
