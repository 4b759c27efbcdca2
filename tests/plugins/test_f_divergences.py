from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recordings import assert_same, make_models, of_logits, visited
from torch import Tensor

from kdzoo.testing import replay
from kdzoo_abkd import ABKD
from kdzoo_divergences import ForwardKL, ReverseKL, TotalVariation
from kdzoo_f_divergences import FDivergence

FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hellinger": lambda p, q: 1 - (p * q).sqrt().sum(-1),
    "jeffreys": lambda p, q: ((p - q) * (p.log() - q.log())).sum(-1),
    "le_cam": lambda p, q: ((p - q) ** 2 / (p + q)).sum(-1),
    "neyman": lambda p, q: (q**2 / p).sum(-1) - 1,
    "pearson": lambda p, q: (p**2 / q).sum(-1) - 1,
    "renyi": lambda p, q: (p**0.3 * q**0.7).sum(-1).log() / -0.7,
}
EVERY = pytest.mark.parametrize("generator", FORMULAS)


def params(generator: str, **others: Any) -> dict[str, Any]:
    return {"generator": generator, "order": 0.3, "max_ratio": 1e6, **others}


@EVERY
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_it_is_the_formula_in_value_and_gradients(generator, tau):
    student, teacher = make_models(True)
    found = replay(
        {"kd": (FDivergence, params(generator, temperature=tau), 0.3)},
        student.recorded(),
        teacher.recorded(),
        same_tokens=True,
        chunk_bytes=200,
    )
    rows = [
        FORMULAS[generator]((teacher.logits(b) / tau).softmax(-1), (student.logits(b) / tau).softmax(-1))
        for b in range(len(student))
    ]
    expected = 0.3 * torch.cat(rows).sum() / 10
    assert_same(found, expected, {"student_hidden": student.hidden, "student_head": student.head})


def kl_beyond(u: Tensor, end: float) -> Tensor:
    """(u - 1)^2 up to an end, and c u log u + d u + e beyond, with the same slope and the same f - u f'."""
    c = (end**2 - 1) / end
    d = 2 * (end - 1) - c * (torch.tensor(end).double().log() + 1)
    return torch.where(u > end, c * u * u.log() + d * u, (u - 1) ** 2)


@pytest.mark.parametrize("end", [1.5, 4.0])
def test_beyond_the_largest_ratio_a_chi_square_goes_on_as_a_kl(end):
    torch.manual_seed(0)
    y, z = 3 * torch.randn(2, 9, 12).double()
    z.requires_grad_()
    p, q = y.softmax(-1), z.softmax(-1)
    assert (p / q > end).any() and (q / p > end).any()
    for generator, expected in (
        ("pearson", (q * kl_beyond(p / q, end)).sum(-1)),
        ("neyman", (p * kl_beyond(q / p, end)).sum(-1)),
    ):
        value, gradient = visited(FDivergence, y, z, generator=generator, max_ratio=end)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z, retain_graph=True)[0])


def test_it_is_other_plugins_where_they_meet():
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 9).double()
    for factor, alpha, beta, generator in (
        (0.25, 0.5, 0.5, "hellinger"),
        (2.0, 2.0, -1.0, "pearson"),
        (2.0, -1.0, 2.0, "neyman"),
    ):
        ours, theirs = visited(FDivergence, y, z, **params(generator)), visited(ABKD, y, z, alpha=alpha, beta=beta)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, factor * other)
    kls = zip(visited(ForwardKL, y, z), visited(ReverseKL, y, z), strict=True)
    for ours, (forward, reverse) in zip(visited(FDivergence, y, z, generator="jeffreys"), kls, strict=True):
        torch.testing.assert_close(ours, forward + reverse)
    middle = ((y.softmax(-1) + z.softmax(-1)) / 2).log()
    le_cam, distance = visited(FDivergence, y, z, generator="le_cam")[0], visited(TotalVariation, y, z)[0]
    torch.testing.assert_close(le_cam, 2 * visited(FDivergence, y, middle, generator="pearson")[0])
    assert (2 * distance**2 <= le_cam).all() and (le_cam <= 2 * distance).all()


def test_the_renyi_divergence_goes_to_the_forward_kl():
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 9).double()
    found = visited(FDivergence, y, z, generator="renyi", order=1 - 1e-7)
    for ours, theirs in zip(found, visited(ForwardKL, y, z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@EVERY
def test_equal_models_have_no_divergence_and_no_gradient(generator):
    torch.manual_seed(0)
    same = 3 * torch.randn(9, 33)
    for dtype, at in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        exactly = at if generator == "renyi" else 0.0
        value, gradient = visited(FDivergence, same.to(dtype), same.to(dtype), generator=generator)
        assert value.max() <= exactly
        assert gradient.abs().max() <= exactly


logits = st.lists(st.floats(-60, 60), min_size=6, max_size=6).map(lambda x: torch.tensor([x]))


@EVERY
@given(teacher=logits, student=logits, near=st.booleans())
@settings(max_examples=40, deadline=None)
def test_it_is_finite_and_never_negative_in_float32(generator, teacher, student, near):
    student = teacher + 1e-6 * student if near else student
    value, gradient = visited(FDivergence, teacher, student, generator=generator)
    assert value.isfinite().all() and value >= 0
    assert gradient.isfinite().all()


@EVERY
@pytest.mark.parametrize(("teacher", "student"), [((0,), ()), ((), (0,)), ((0, 1), (1, 2)), ((0, 1, 2), (3, 4, 5))])
def test_excluded_entries_leave_loss_and_gradient_finite(generator, teacher, student):
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 6)
    y[:, list(teacher)], z[:, list(student)] = -torch.inf, -torch.inf
    value, gradient = visited(FDivergence, y, z, generator=generator)
    assert value.isfinite().all() and (value > 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("generator", ["hellinger", "le_cam", "renyi"])
@pytest.mark.parametrize(("teacher", "student"), [((0,), ()), ((), (0,)), ((0, 1), (1, 2))])
def test_excluded_entries_are_probabilities_of_zero_where_that_is_finite(generator, teacher, student):
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 6).double()
    y[:, list(teacher)], z[:, list(student)] = -torch.inf, -torch.inf
    kept = [v for v in range(6) if not (v in teacher and v in student)]
    expected = FORMULAS[generator](y.softmax(-1)[:, kept], z.softmax(-1)[:, kept])
    torch.testing.assert_close(visited(FDivergence, y, z, **params(generator))[0], expected)


@pytest.mark.parametrize(("teacher", "student"), [(95.0, 0.0), (0.0, 95.0)])
def test_beyond_what_float32_holds_jeffreys_is_both_kls(teacher, student):
    y, z = torch.tensor([[teacher, 0.0]]), torch.tensor([[student, 0.0]])
    found = visited(FDivergence, y, z, generator="jeffreys")
    kls = zip(visited(ForwardKL, y, z), visited(ReverseKL, y, z), strict=True)
    for ours, (forward, reverse) in zip(found, kls, strict=True):
        torch.testing.assert_close(ours, forward + reverse)


@EVERY
def test_bfloat16_logits_are_compared_in_float32(generator):
    torch.manual_seed(0)
    y, z = (3 * torch.randn(2, 20, 50)).bfloat16()
    found, exact = (of_logits(FDivergence, a, b, generator=generator) for a, b in ((y, z), (y.double(), z.double())))
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=0)


@EVERY
def test_no_rows_have_no_loss(generator):
    value, gradient = visited(FDivergence, torch.randn(0, 5), torch.randn(0, 5), generator=generator)
    assert value.shape == (0,) and gradient.shape == (0, 5)


@pytest.mark.parametrize(
    "params", [{"generator": "kl"}, {"max_ratio": 1.0}, {"order": 1.0}, {"order": 0.0}, {"temperature": 0}]
)
def test_what_says_nothing_is_refused(params):
    with pytest.raises(ValidationError):
        FDivergence.Params.model_validate(params)
