from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recordings import assert_same, make_models, of_logits, visited
from torch import Tensor

from kdzoo.testing import replay
from kdzoo_csd import CSD

WEIGHTS = ("student", "teacher", "uniform", "mixture")


def weight(name: str, y: Tensor, z: Tensor, tau: float, share: float) -> list[float]:
    """Numbers of python, which have no gradient."""
    p, q = (y / tau).softmax(-1), (z / tau).softmax(-1).detach()
    named = {"student": q, "teacher": p, "uniform": torch.ones_like(p) / len(p), "mixture": share * p + (1 - share) * q}
    return named[name].tolist()


def double_loop(y: Tensor, z: Tensor, a: list[float], b: list[float]) -> Tensor:
    """Of logits [V], a number: every pair of entries by itself."""
    total = torch.zeros(()).double()
    for v, w in product(range(len(y)), repeat=2):
        total = total + 0.5 * a[v] * b[w] * ((z[v] - z[w]) - (y[v] - y[w])) ** 2
    return total


@pytest.mark.parametrize(("first", "second"), [*product(WEIGHTS, repeat=2)])
def test_it_is_the_sum_over_all_pairs_in_value_and_gradients(first, second):
    student, teacher = make_models(True)
    params = {"first_weight": first, "second_weight": second, "teacher_share": 0.3, "temperature": 1.5}
    found = replay(
        {"kd": (CSD, params, 0.3)}, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=200
    )
    total = torch.zeros(()).double()
    for b in range(len(student)):
        for y, z in zip(teacher.logits(b), student.logits(b), strict=True):
            weights = (weight(name, y, z, 1.5, 0.3) for name in (first, second))
            total = total + double_loop(y, z, *weights)
    assert_same(found, 0.3 * total / 10, {"student_hidden": student.hidden, "student_head": student.head})


def test_with_one_weight_it_is_the_variance_of_the_error():
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 9).double()
    q, d = z.softmax(-1), z - y
    expected = (q * d**2).sum(-1) - (q * d).sum(-1) ** 2
    torch.testing.assert_close(visited(CSD, y, z)[0], expected)


@pytest.mark.parametrize(("first", "second"), [("student", "student"), ("uniform", "teacher")])
def test_a_constant_added_to_either_models_logits_changes_nothing(first, second):
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 9).double()
    params = {"first_weight": first, "second_weight": second}
    value, gradient = visited(CSD, y, z, **params)
    for shifted in ((y + 40, z), (y, z - 40), (y - 7, z + 300)):
        for ours, theirs in zip(visited(CSD, *shifted, **params), (value, gradient), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("first", "second"), [("student", "student"), ("uniform", "mixture")])
def test_equal_models_have_exactly_no_loss_and_no_gradient(dtype, first, second):
    torch.manual_seed(0)
    same = (4 * torch.randn(9, 33)).to(dtype)
    found = of_logits(CSD, same, same, first_weight=first, second_weight=second, temperature=1.5)
    assert found.loss == 0
    assert (found.gradients["student_hidden"] == 0).all()


def test_small_errors_beside_large_logits_are_not_lost_in_float32():
    """The sums of squares are 1e-5 of what the products of sums would be."""
    torch.manual_seed(0)
    y = 10 * torch.randn(200, 50)
    z = y + 20 + 1e-2 * torch.randn(200, 50)
    found, exact = of_logits(CSD, y, z), of_logits(CSD, y.double(), z.double())
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-3, atol=0)


logits = st.lists(st.floats(-60, 60), min_size=6, max_size=6).map(lambda x: torch.tensor([x]))


@given(teacher=logits, student=logits, first=st.sampled_from(WEIGHTS), second=st.sampled_from(WEIGHTS))
@settings(max_examples=60, deadline=None)
def test_it_is_finite_and_never_negative_in_float32(teacher, student, first, second):
    value, gradient = visited(CSD, teacher, student, first_weight=first, second_weight=second)
    assert value.isfinite().all() and value >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("first", WEIGHTS)
@pytest.mark.parametrize(("teacher", "student"), [((0,), ()), ((), (0,)), ((0, 1), (1, 2))])
def test_an_excluded_entry_is_100_nats_off(first, teacher, student):
    torch.manual_seed(0)
    y, z = torch.randn(2, 4, 6).double()
    y[:, list(teacher)], z[:, list(student)] = -torch.inf, -torch.inf
    value, gradient = visited(CSD, y, z, first_weight=first)
    assert value.isfinite().all() and gradient.isfinite().all()
    kept = [v for v in range(6) if not (v in teacher and v in student)]
    log_p, log_q = y.log_softmax(-1)[:, kept], z.log_softmax(-1)[:, kept]
    d = (log_q - log_p).clamp(-100, 100)
    for i in range(len(y)):
        a, b = (torch.tensor(weight(name, y[i, kept], z[i, kept], 1.0, 0.5)).double() for name in (first, "student"))
        expected = 0.5 * (a[:, None] * b * (d[i][:, None] - d[i]) ** 2).sum()
        torch.testing.assert_close(value[i], expected)


def test_what_both_models_exclude_is_as_if_it_were_not_there():
    torch.manual_seed(0)
    y, z = torch.randn(2, 4, 6).double()
    params = {"first_weight": "uniform"}
    without = visited(CSD, y, z, **params)
    y, z = (torch.cat([x, torch.full((4, 2), -torch.inf).double()], -1) for x in (y, z))
    value, gradient = visited(CSD, y, z, **params)
    torch.testing.assert_close(value, without[0])
    torch.testing.assert_close(gradient[:, :6], without[1])
    assert (gradient[:, 6:] == 0).all()


def test_bfloat16_logits_are_compared_in_float32():
    torch.manual_seed(0)
    y, z = (3 * torch.randn(2, 20, 50)).bfloat16()
    found, exact = of_logits(CSD, y, z), of_logits(CSD, y.double(), z.double())
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=0)


def test_no_rows_have_no_loss():
    for first in WEIGHTS:
        value, gradient = visited(CSD, torch.randn(0, 5), torch.randn(0, 5), first_weight=first)
        assert value.shape == (0,) and gradient.shape == (0, 5)


def test_what_says_nothing_is_refused():
    for params in ({"temperature": 0}, {"first_weight": "label"}, {"teacher_share": 1.5}):
        with pytest.raises(ValidationError):
            CSD.Params.model_validate(params)
