from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recordings import assert_same, make_models, of_logits, visited
from torch import Tensor

from kdzoo import ops
from kdzoo.testing import replay
from kdzoo_abkd import ABKD
from kdzoo_amid import AMiD
from kdzoo_divergences import ForwardKL, SkewForwardKL, SkewReverseKL
from kdzoo_taid import TAID

ALPHAS = [-30.0, -3.0, -1.0, 0.0, 0.5, 0.999, 1.0, 1.001, 2.0, 3.0, 30.0]


def mixture(p: Tensor, q: Tensor, weight: float, alpha: float) -> Tensor:
    """As the paper writes it, in probabilities [V]."""
    e = (1 - alpha) / 2
    r = p**weight * q ** (1 - weight) if e == 0 else (weight * p**e + (1 - weight) * q**e) ** (1 / e)
    return r / r.sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


DIVERGENCES: dict[str, tuple[dict[str, Any], Any]] = {
    "forward_kl": ({}, kl),
    "reverse_kl": ({}, lambda a, b: kl(b, a)),
    "js": ({}, lambda a, b: (kl(a, (a + b) / 2) + kl(b, (a + b) / 2)) / 2),
    "skew_forward_kl": ({"skew": 0.3}, lambda a, b: kl(a, 0.3 * a + 0.7 * b)),
    "total_variation": ({}, lambda a, b: (a - b).abs().sum() / 2),
    "alpha_beta": (
        {"divergence_alpha": 0.5, "divergence_beta": 1.5},
        lambda a, b: -(a**0.5 * b**1.5 - 0.25 * a**2 - 0.75 * b**2).sum() / 0.75,
    ),
}


def assert_formula(divergence: str, side: str, alpha: float, weight: float, tau: float = 1.0, at: float = 1e-9) -> None:
    student, teacher = make_models(True)
    extra, measure = DIVERGENCES[divergence]
    params = {"side": side, "alpha": alpha, "teacher_weight": weight, "temperature": tau, "divergence": divergence}
    found = replay(
        {"kd": (AMiD, params | extra, 0.3)}, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=200
    )
    total = torch.zeros(()).double()
    for b in range(len(student)):
        for y, z in zip(teacher.logits(b), student.logits(b), strict=True):
            p, q = (y / tau).softmax(-1), (z / tau).softmax(-1)
            total = total + measure(p if side == "teacher" else q, mixture(p, q, weight, alpha))
    assert_same(found, 0.3 * total / 10, {"student_hidden": student.hidden, "student_head": student.head}, at=at)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_it_is_the_formula_in_value_and_gradients(alpha, side):
    assert_formula("forward_kl", side, alpha, 0.3, at=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_any_divergence_takes_the_place_of_the_kl(divergence, side):
    assert_formula(divergence, side, 0.5, 0.6, tau=2.0)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_at_the_ends_of_its_weight_the_mixture_is_one_model(weight):
    assert_formula("forward_kl", "student" if weight else "teacher", -1.0, weight)


@pytest.mark.parametrize("skew", [0.1, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_alpha_minus_1_it_is_the_skewed_kl(skew, dtype):
    torch.manual_seed(0)
    y, z = 2 * torch.randn(2, 9, 20, dtype=dtype)
    at = 1e-5 if dtype == torch.float32 else 1e-12
    corners = (
        (SkewForwardKL, {"side": "teacher", "teacher_weight": skew}),
        (SkewReverseKL, {"side": "student", "teacher_weight": 1 - skew}),
    )
    for corner, params in corners:
        ours, theirs = visited(AMiD, y, z, alpha=-1.0, **params), visited(corner, y, z, skew=skew)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=at, atol=at)


def test_at_alpha_1_the_mixture_is_the_target_of_taid():
    torch.manual_seed(0)
    y, z = torch.randn(2, 9, 20).double()
    ours = visited(AMiD, y, z, alpha=1.0, teacher_weight=0.4, side="student", divergence="reverse_kl")[0]
    torch.testing.assert_close(ours, visited(TAID, y, z, t_start=0.4)[0], rtol=1e-7, atol=1e-9)


def test_with_a_weight_of_0_it_is_the_divergence_itself():
    torch.manual_seed(0)
    y, z = torch.randn(2, 9, 20).double()
    for params, loss in (({}, ForwardKL), ({"divergence": "alpha_beta"}, ABKD)):
        for ours, theirs in zip(visited(AMiD, y, z, teacher_weight=0.0, **params), visited(loss, y, z), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("near", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_goes_to_the_geometric_mixture(near, dtype):
    """In value and gradient, however near: nothing is lost where the power is almost 0."""
    torch.manual_seed(0)
    y, z = 2 * torch.randn(2, 6, 9).double()
    exact = visited(AMiD, y, z, alpha=1.0)
    for alpha in (1 - near, 1 + near):
        found = visited(AMiD, y.to(dtype), z.to(dtype), alpha=alpha)
        for ours, theirs in zip(found, exact, strict=True):
            assert (ours - theirs).norm() < (3 * near + 3e-6) * theirs.norm()


@pytest.mark.parametrize("alpha", [-1e4, -1e2, 0.9, 1e2, 1e4])
def test_it_is_accurate_in_float32_and_bfloat16(alpha):
    torch.manual_seed(0)
    y, z = (5 * torch.randn(2, 20, 50)).bfloat16()
    exact = of_logits(AMiD, y.double(), z.double(), alpha=alpha)
    for dtype in (torch.float32, torch.bfloat16):
        found = of_logits(AMiD, y.to(dtype), z.to(dtype), alpha=alpha)
        torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
        ours, theirs = found.gradients["student_hidden"].double(), exact.gradients["student_hidden"]
        assert (ours - theirs).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-4) * theirs.norm()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_equal_models_have_no_divergence_and_no_gradient(alpha, side):
    torch.manual_seed(0)
    same = 3 * torch.randn(9, 33)
    for dtype, at in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        value, gradient = visited(AMiD, same.to(dtype), same.to(dtype), alpha=alpha, side=side)
        assert value.max() <= at
        assert gradient.abs().max() <= at


logits = st.lists(st.floats(-60, 60), min_size=6, max_size=6).map(lambda x: torch.tensor([x]))


@given(teacher=logits, student=logits, alpha=st.floats(-200, 200), side=st.sampled_from(["teacher", "student"]))
@settings(max_examples=80, deadline=None)
def test_it_is_finite_and_never_negative_in_float32(teacher, student, alpha, side):
    value, gradient = visited(AMiD, teacher, student, alpha=alpha, side=side)
    assert value.isfinite().all() and value >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("teacher", "student"), [((0,), ()), ((), (0,)), ((0,), (0,)), ((0, 1), (1, 2))])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("params", [{}, {"side": "student"}, {"divergence": "alpha_beta"}], ids=str)
def test_excluded_entries_leave_loss_and_gradient_finite(teacher, student, alpha, params):
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 6)
    y[:, list(teacher)], z[:, list(student)] = -torch.inf, -torch.inf
    value, gradient = visited(AMiD, y, z, alpha=alpha, **params)
    assert value.isfinite().all() and (value > 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [-3.0, -1.0, 0.5])
def test_below_alpha_1_an_excluded_entry_is_a_probability_of_zero(alpha):
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 6).double()
    y[:, 0], z[:, 1] = -torch.inf, -torch.inf
    p, q = y.softmax(-1), z.softmax(-1)
    expected = torch.stack(
        [ops.forward_kl(a.log()[None], mixture(a, b, 0.3, alpha).log()[None])[0] for a, b in zip(p, q, strict=True)]
    )
    torch.testing.assert_close(visited(AMiD, y, z, alpha=alpha, teacher_weight=0.3)[0], expected)


def test_no_rows_have_no_loss():
    value, gradient = visited(AMiD, torch.randn(0, 5), torch.randn(0, 5))
    assert value.shape == (0,) and gradient.shape == (0, 5)


@pytest.mark.parametrize(
    "params",
    [{"teacher_weight": 1.0}, {"teacher_weight": 0.0, "side": "student"}, {"temperature": 0}, {"divergence": "wsd"}],
)
def test_what_says_nothing_is_refused(params):
    with pytest.raises(ValidationError):
        AMiD.Params.model_validate(params)
