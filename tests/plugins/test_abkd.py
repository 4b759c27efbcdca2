from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import Recording, assert_same, make_models, make_pair, seen
from torch import Tensor

from kdzoo import ops
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_abkd import ABKD


def general(p: Tensor, q: Tensor, a: float, b: float) -> Tensor:
    """As the paper writes it, where neither a nor b nor their sum is 0."""
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def limit(p: Tensor, q: Tensor, a: float, b: float) -> Tensor:
    """What it goes to, case by case."""
    if a == b == 0:
        return 0.5 * (q.log() - p.log()).square().sum(-1)
    if a == 0:
        return (q**b * (q / p).log() * b - q**b + p**b).sum(-1) / b**2
    if b == 0:
        return (p**a * (p / q).log() * a - p**a + q**a).sum(-1) / a**2
    if a + b == 0:
        return ((q / p).log() * a + (p / q) ** a - 1).sum(-1) / a**2
    return general(p, q, a, b)


GENERAL = [
    (0.2, 0.7),
    (0.1, 0.8),
    (0.5, 0.5),
    (1.0, 1.0),
    (2.0, -0.5),
    (-0.5, 2.0),
    (-0.3, -0.2),
    (0.05, 0.6),
    (0.6, 0.05),
]
LIMITS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 0.5), (0.5, -0.5), (-1.0, 1.0), (0.0, 0.0)]
ALL = pytest.mark.parametrize(("alpha", "beta"), GENERAL + LIMITS)


def run(student: Recording, teacher: Recording, weight: float = 1.0, **params: Any) -> Replay:
    return replay(
        {"kd": (ABKD, params, weight)}, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=200
    )


def of_logits(teacher: Tensor, student: Tensor, **params: Any) -> Replay:
    """Logits [n, V] of one sequence, every row scored."""
    labels = torch.zeros(1, len(teacher), dtype=torch.long)
    sides = (Recorded(labels, logits=x[None]) for x in (student, teacher))
    return replay({"kd": (ABKD, params, 1.0)}, *sides, same_tokens=True, chunk_bytes=100)


@ALL
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_it_is_the_formula_in_value_and_gradients(alpha, beta, tau):
    student, teacher = make_models(True)
    found = run(student, teacher, 0.3, alpha=alpha, beta=beta, temperature=tau)
    rows = [
        limit((teacher.logits(b) / tau).softmax(-1), (student.logits(b) / tau).softmax(-1), alpha, beta)
        for b in range(len(student))
    ]
    expected = 0.3 * torch.cat(rows).sum() / 10
    assert_same(found, expected, {"student_hidden": student.hidden, "student_head": student.head}, at=1e-9)


@pytest.mark.parametrize(
    ("alpha", "beta", "factor"),
    [
        (1.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
        (0.5, 0.0, 0.5),
        (0.0, 0.5, 0.5),
        (0.5, -0.5, 0.5),
        (-0.5, 0.5, -0.5),
        (0.0, 0.0, 1.0),
        (0.2, 0.7, 1.0),
        (0.5, 1e-9, 1.0),
    ],
)
def test_the_authors_constants_at_the_limits(alpha, beta, factor):
    torch.manual_seed(0)
    y, z = torch.randn(2, 6, 9).double()
    limits, authors = (of_logits(y, z, alpha=alpha, beta=beta, constants=c) for c in ("limit", "authors"))
    torch.testing.assert_close(authors.loss, limits.loss * factor)
    ours, theirs = (found.gradients["student_hidden"] for found in (limits, authors))
    torch.testing.assert_close(theirs, ours * factor)


@pytest.mark.parametrize(("alpha", "beta"), LIMITS)
@pytest.mark.parametrize("step", [1e-9, 1e-6, 1e-4])
@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.0, 1.0), (1.0, 2.0), (-1.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_goes_to_its_limits(alpha, beta, step, direction, dtype):
    """In value and gradient, however near: nothing is divided by what is almost 0."""
    torch.manual_seed(0)
    y, z = 2 * torch.randn(2, 6, 9).double()
    a, b = alpha + step * direction[0], beta + step * direction[1]
    at, near = of_logits(y, z, alpha=alpha, beta=beta), of_logits(y.to(dtype), z.to(dtype), alpha=a, beta=b)
    allowed = 30 * step + (1e-5 if dtype == torch.float32 else 1e-9)
    assert (near.loss - at.loss).abs() < allowed * at.loss
    ours, limits = (found.gradients["student_hidden"].double() for found in (near, at))
    assert (ours - limits).norm() < allowed * limits.norm()


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.5, 0.001), (0.001, 0.5), (0.003, -0.002), (0.009, 0.0005), (0.05, -0.04)]
)
def test_it_is_accurate_near_the_limits_in_float32(alpha, beta):
    torch.manual_seed(0)
    y, z = 3 * torch.randn(2, 30, 50)
    p, q = y.double().softmax(-1), z.double().softmax(-1)
    expected = general(p, q, alpha, beta).mean()
    assert (of_logits(y, z, alpha=alpha, beta=beta).loss - expected).abs() < 2e-6 * expected


small = st.floats(-1, 2)
logits = st.lists(st.floats(-30, 30), min_size=5, max_size=5).map(lambda x: torch.tensor([x]))


@given(teacher=logits, student=logits, alpha=small, beta=small)
@settings(max_examples=200, deadline=None)
def test_it_is_finite_and_never_negative_in_float32(teacher, student, alpha, beta):
    for z in (student, teacher + 1e-6 * student, teacher):
        found = of_logits(teacher, z, alpha=alpha, beta=beta)
        assert found.loss.isfinite() and found.loss >= 0
        assert found.gradients["student_hidden"].isfinite().all()


@given(teacher=logits, student=logits, alpha=small, beta=small)
@settings(max_examples=100, deadline=None)
def test_it_is_dual(teacher, student, alpha, beta):
    """D with (α, β) from p to q is D with (β, α) from q to p."""
    assert_dual(teacher, student, alpha, beta)


@pytest.mark.parametrize(("alpha", "beta"), [(-1.0, 1e-8), (1.0, -1.0 + 1e-8), (2.0, 1e-7), (-1.0, 3e-7)])
def test_it_is_dual_beside_a_limit(alpha, beta):
    """A power that counts as 0 does so in every place."""
    assert_dual(torch.tensor([[0.0, 0.0, 0.0, 0.0, -8.0]]), torch.zeros(1, 5), alpha, beta)


def assert_dual(teacher: Tensor, student: Tensor, alpha: float, beta: float) -> None:
    one = of_logits(teacher.double(), student.double(), alpha=alpha, beta=beta).loss
    other = of_logits(student.double(), teacher.double(), alpha=beta, beta=alpha).loss
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), GENERAL + LIMITS + [(0.003, -0.002)])
def test_its_derivative_by_the_teacher_is_that_of_the_formula(alpha, beta):
    torch.manual_seed(0)
    y, z = torch.randn(2, 6, 9).double()
    y.requires_grad_()
    log_p, log_q = y.log_softmax(-1), z.log_softmax(-1)
    (found,) = torch.autograd.grad(ops.alpha_beta(log_p, log_q, alpha, beta).sum(), y, retain_graph=True)
    (expected,) = torch.autograd.grad(limit(log_p.exp(), log_q.exp(), alpha, beta).sum(), y)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1e-116), (1e-200, 0.7), (0.5, -0.5 + 1e-17), (1e-116, -1e-116)])
def test_a_power_that_is_almost_nothing_is_none(alpha, beta):
    """Neither of float32 nor of float64 does its inverse exceed the range."""
    torch.manual_seed(0)
    y, z = torch.randn(2, 6, 9)
    found = of_logits(y, z, alpha=alpha, beta=beta)
    at = of_logits(y, z, alpha=round(alpha, 9), beta=round(beta, 9))
    torch.testing.assert_close(found.loss, at.loss)
    torch.testing.assert_close(found.gradients["student_hidden"], at.gradients["student_hidden"])


@ALL
def test_equal_distributions_have_no_divergence_and_no_gradient(alpha, beta):
    torch.manual_seed(0)
    same = torch.randn(6, 9)
    for dtype, at in ((torch.float32, 1e-5), (torch.float64, 1e-14)):  # powers of p and q round apart
        found = of_logits(same.to(dtype), same.to(dtype), alpha=alpha, beta=beta)
        assert 0 <= found.loss <= at
        assert found.gradients["student_hidden"].abs().max() <= at


@ALL
@pytest.mark.parametrize(
    ("teacher", "student"),
    [((0,), ()), ((), (0,)), ((0,), (0,)), ((0, 1), (1, 2))],
    ids=["teacher", "student", "both", "some of both"],
)
def test_excluded_tokens_leave_loss_and_gradient_finite(alpha, beta, teacher, student):
    torch.manual_seed(0)
    y, z = torch.randn(5, 6), torch.randn(5, 6)
    y[:, list(teacher)], z[:, list(student)] = -torch.inf, -torch.inf
    z.requires_grad_()
    made = ABKD(ABKD.Params(alpha=alpha, beta=beta), make_pair(6, 6), {})
    value, _ = made.tokens(**seen(teacher=y, student=z)).sums["abkd"]
    (gradient,) = torch.autograd.grad(value, z)
    assert value.isfinite() and value > 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (0.5, 0.05), (1.0, 1.0)])
def test_excluded_tokens_are_probabilities_of_zero(alpha, beta):
    torch.manual_seed(0)
    y, z = torch.randn(5, 6).double(), torch.randn(5, 6).double()
    y[:, 0], z[:, 1] = -torch.inf, -torch.inf
    value = ops.alpha_beta(y.log_softmax(-1), z.log_softmax(-1), alpha, beta)
    # The student's excluded token has 0 to a small power, which is not yet 0 to the power 0.
    at = 1e-10 if beta >= 0.1 else 0.02
    torch.testing.assert_close(value, general(y.softmax(-1), z.softmax(-1), alpha, beta), rtol=at, atol=at)


@ALL
def test_bfloat16_logits_are_compared_in_float32(alpha, beta):
    torch.manual_seed(0)
    y, z = (2 * torch.randn(2, 20, 50)).bfloat16()
    found = of_logits(y, z, alpha=alpha, beta=beta)
    exact = of_logits(y.double(), z.double(), alpha=alpha, beta=beta)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=0)
    ours, theirs = found.gradients["student_hidden"].double(), exact.gradients["student_hidden"]
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_no_rows_have_no_loss():
    nothing = Recorded(torch.full((2, 3), -100), logits=torch.randn(2, 3, 5))
    found = replay({"kd": (ABKD, {}, 1.0)}, nothing, nothing, same_tokens=True)
    assert found.loss == 0
    assert all((gradient == 0).all() for gradient in found.gradients.values())


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    y, z = torch.randn(2, 9, 8).double()
    together = of_logits(y, z)
    parts = [of_logits(y[a:b], z[a:b]) for a, b in ((0, 1), (1, 5), (5, 9))]
    torch.testing.assert_close(together.loss * 9, sum(part.loss * part.tokens for part in parts))
    separate = torch.cat([part.gradients["student_hidden"] * part.tokens for part in parts], dim=1)
    torch.testing.assert_close(together.gradients["student_hidden"] * 9, separate)


def test_only_scored_rows_have_a_gradient():
    student, teacher = make_models(True)
    gradient = run(student, teacher).gradients["student_hidden"]
    assert (gradient[student.labels == -100] == 0).all()
    assert (gradient[student.labels != -100] != 0).any(-1).all()


def test_it_is_declared_to_need_one_tokenizer_and_no_batch():
    needs = ABKD.needs(ABKD.Params(), same_tokens=True)
    assert needs.tokenizers == "same" and not needs.batch_coupled
