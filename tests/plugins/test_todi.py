from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recordings import assert_same, make_models, of_logits, visited
from torch import Tensor

from kdzoo.testing import replay
from kdzoo_divergences import ForwardKL, ReverseKL
from kdzoo_todi import ToDi


def entry_by_entry(y: Tensor, z: Tensor, beta: float) -> Tensor:
    """Of logits [V], a number; the weights are numbers of python, which have no gradient."""
    p, q = y.softmax(-1), z.softmax(-1)
    total = torch.zeros(()).double()
    for v in range(len(p)):
        odds = (float(p[v]) / float(q[v].detach())) ** beta
        total = total + odds / (1 + odds) * p[v] * (p[v] / q[v]).log() + 1 / (1 + odds) * q[v] * (q[v] / p[v]).log()
    return total


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.4, 3.0])
@pytest.mark.parametrize(("tau", "teacher_tau"), [(1.0, 1.0), (2.0, 1.0), (2.0, 1.5)])
def test_it_is_the_formula_in_value_and_gradients(beta, tau, teacher_tau):
    student, teacher = make_models(True)
    params = {"beta": beta, "temperature": tau, "teacher_temperature": teacher_tau}
    found = replay(
        {"kd": (ToDi, params, 0.3)}, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=200
    )
    total = sum(
        entry_by_entry(y / (tau * teacher_tau), z / tau, beta)
        for b in range(len(student))
        for y, z in zip(teacher.logits(b), student.logits(b), strict=True)
    )
    assert_same(found, 0.3 * total / 10, {"student_hidden": student.hidden, "student_head": student.head})
    assert found.terms.keys() == {"kd/todi"}


def test_at_beta_0_it_is_half_of_both_kls():
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 7).double()
    found, *kls = (
        visited(loss, y, z, **params) for loss, params in ((ToDi, {"beta": 0}), (ForwardKL, {}), (ReverseKL, {}))
    )
    for ours, forward, reverse in zip(found, *kls, strict=True):
        torch.testing.assert_close(ours, (forward + reverse) / 2)


def test_a_large_beta_chooses_one_kl_for_every_entry():
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 7).double()
    p, q = y.softmax(-1), z.softmax(-1)
    expected = torch.where(p > q, p * (p / q).log(), q * (q / p).log()).sum(-1)
    torch.testing.assert_close(visited(ToDi, y, z, beta=1e6)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_models_have_exactly_no_divergence_and_no_gradient(dtype):
    torch.manual_seed(0)
    same = (4 * torch.randn(9, 33)).to(dtype)
    found = of_logits(ToDi, same, same, temperature=1.3)
    assert found.loss == 0
    assert (found.gradients["student_hidden"] == 0).all()


logits = st.lists(st.floats(-60, 60), min_size=6, max_size=6).map(lambda x: torch.tensor([x]))


@given(teacher=logits, student=logits, near=st.booleans())
@settings(max_examples=60, deadline=None)
def test_it_is_never_negative_and_finite_in_float32(teacher, student, near):
    value, gradient = visited(ToDi, teacher, teacher + 1e-6 * student if near else student)
    assert value.isfinite().all() and value >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("teacher", "student"), [((0,), ()), ((), (0,)), ((0,), (0,)), ((0, 1), (1, 2))])
def test_an_excluded_entry_counts_as_100_nats_off(teacher, student):
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 6).double()
    y[:, list(teacher)], z[:, list(student)] = -torch.inf, -torch.inf
    value, gradient = visited(ToDi, y, z)
    p, q = y.softmax(-1), z.softmax(-1)
    kept = (p > 0) & (q > 0)
    ratio = torch.where(kept, (p / q).log(), 0.0)
    expected = (ratio.sigmoid() * p * ratio - (-ratio).sigmoid() * q * ratio).sum(-1)
    expected += 100 * (torch.where(kept, 0.0, p + q)).sum(-1) / (1 + math.exp(-100))
    torch.testing.assert_close(value, expected)
    assert gradient.isfinite().all()


def test_bfloat16_logits_are_compared_in_float32():
    torch.manual_seed(0)
    y, z = (3 * torch.randn(2, 20, 50)).bfloat16()
    found, exact = of_logits(ToDi, y, z), of_logits(ToDi, y.double(), z.double())
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=0)


def test_no_rows_have_no_loss():
    value, gradient = visited(ToDi, torch.randn(0, 5), torch.randn(0, 5))
    assert value.shape == (0,) and gradient.shape == (0, 5)


def test_what_says_nothing_is_refused():
    for params in ({"temperature": 0}, {"beta": -1}):
        with pytest.raises(ValidationError):
            ToDi.Params.model_validate(params)
