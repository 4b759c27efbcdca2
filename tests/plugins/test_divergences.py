from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recordings import Recording, assert_same, make_models, make_pair, seen
from torch import Tensor

from kdzoo import Loss
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_divergences import JS, AdaptiveKL, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL, TotalVariation

LOSSES = (ForwardKL, ReverseKL, JS, SkewForwardKL, SkewReverseKL, AdaptiveKL, TotalVariation)
EVERY = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)

Formula = Callable[[Tensor, Tensor], Tensor]
"""Of two distributions [V], a number."""


def kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = p[p > 0], q[p > 0]
    return (p * (p / q).log()).sum()


def js(w: float) -> Formula:
    return lambda p, q: w * kl(p, w * p + (1 - w) * q) + (1 - w) * kl(q, w * p + (1 - w) * q)


def adaptive(mass: float, crossing: str) -> Formula:
    """Token by token."""

    def value(p: Tensor, q: Tensor) -> Tensor:
        tokens = sorted(range(len(p)), key=lambda v: float(p[v]), reverse=crossing == "tail")
        cumulated, first = 0.0, []
        for v in tokens:
            cumulated += float(p[v])
            if cumulated <= mass:
                first.append(v)
        head = first or tokens[:1] if crossing == "tail" else [v for v in tokens if v not in first]
        gap = (p - q).abs().detach()
        share = gap[head].sum() / gap.sum()
        return share * kl(p, q) + (1 - share) * kl(q, p)

    return value


CASES: list[tuple[type[Loss], dict[str, Any], Formula]] = [
    (ForwardKL, {}, lambda p, q: kl(p, q)),
    (ForwardKL, {"subtract_entropy": False}, lambda p, q: -(p * q.log()).sum()),
    (ReverseKL, {}, lambda p, q: kl(q, p)),
    (JS, {}, js(0.5)),
    (JS, {"teacher_weight": 0.1}, js(0.1)),
    (JS, {"teacher_weight": 0.0}, lambda p, q: kl(p, q)),
    (JS, {"teacher_weight": 1.0}, lambda p, q: kl(q, p)),
    (SkewForwardKL, {}, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    (SkewForwardKL, {"skew": 0.7}, lambda p, q: kl(p, 0.7 * p + 0.3 * q)),
    (SkewForwardKL, {"skew": 0.0}, lambda p, q: kl(p, q)),
    (SkewForwardKL, {"subtract_entropy": False}, lambda p, q: -(p * (0.1 * p + 0.9 * q).log()).sum()),
    (SkewReverseKL, {}, lambda p, q: kl(q, 0.9 * p + 0.1 * q)),
    (SkewReverseKL, {"skew": 0.7}, lambda p, q: kl(q, 0.3 * p + 0.7 * q)),
    (SkewReverseKL, {"skew": 0.0}, lambda p, q: kl(q, p)),
    (AdaptiveKL, {}, adaptive(0.5, "head")),
    (AdaptiveKL, {"head_mass": 0.2}, adaptive(0.2, "head")),
    (AdaptiveKL, {"crossing": "tail"}, adaptive(0.5, "tail")),
    (AdaptiveKL, {"head_mass": 0.9, "crossing": "tail"}, adaptive(0.9, "tail")),
    (TotalVariation, {}, lambda p, q: 0.5 * (p - q).abs().sum()),
]
IN_ALL_CASES = pytest.mark.parametrize(
    ("loss", "params", "formula"), CASES, ids=lambda x: getattr(x, "name", "" if callable(x) else str(x))
)


def run(loss: type[Loss], student: Recording, teacher: Recording, weight: float = 1.0, **params: Any) -> Replay:
    return replay(
        {"kd": (loss, params, weight)}, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=200
    )


def row_sum(formula: Formula, student: Recording, teacher: Recording, tau: float, teacher_tau: float) -> Tensor:
    total = torch.zeros(()).double()
    for b in range(len(student)):
        for y, z in zip(teacher.logits(b), student.logits(b), strict=True):
            total = total + formula((y / teacher_tau).softmax(-1), (z / tau).softmax(-1))
    return total


@IN_ALL_CASES
@pytest.mark.parametrize(
    ("temperatures", "tau", "teacher_tau", "factor"),
    [
        ({}, 1.0, 1.0, 1.0),
        ({"temperature": 2.0}, 2.0, 2.0, 1.0),
        ({"temperature": 2.0, "square_temperature": True}, 2.0, 2.0, 4.0),
        ({"temperature": 2.0, "teacher_temperature": 1.5}, 2.0, 3.0, 1.0),
    ],
)
def test_it_is_the_formula_in_value_and_gradients(loss, params, formula, temperatures, tau, teacher_tau, factor):
    student, teacher = make_models(True)
    found = run(loss, student, teacher, 0.3, **params, **temperatures)
    expected = 0.3 * factor * row_sum(formula, student, teacher, tau, teacher_tau) / 10
    assert_same(found, expected, {"student_hidden": student.hidden, "student_head": student.head})
    assert found.terms.keys() == {f"kd/{loss.name}"}


def takes_zeros(formula: Formula) -> bool:
    return not formula(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])).isinf()


@pytest.mark.parametrize(
    ("rest", "loss", "params", "formula"),
    [
        (rest, *case)
        for rest in ("one_token", "dropped")
        for case in CASES
        if rest == "one_token" or takes_zeros(case[2])
    ],
    ids=lambda x: getattr(x, "name", "" if callable(x) else str(x)),
)
def test_the_teachers_likeliest_tokens_alone(rest, loss, params, formula):
    student, teacher = make_models(True)

    def cut(p: Tensor, q: Tensor) -> Tensor:
        order = p.argsort(descending=True)
        top, others = order[:3], order[3:]
        rest_q = q[others].sum(0, keepdim=True)
        if rest == "dropped":
            top_p, rest_p = p[top] / p[top].sum(), torch.zeros(1).double()
        else:
            top_p, rest_p = p[top], p[others].sum(0, keepdim=True)
        return formula(torch.cat([top_p, rest_p]), torch.cat([q[top], rest_q]))

    found = run(loss, student, teacher, temperature=1.5, top_k=3, rest=rest, **params)
    expected = row_sum(cut, student, teacher, 1.5, 1.5) / 10
    assert_same(found, expected, {"student_hidden": student.hidden, "student_head": student.head})


def test_what_is_dropped_pushes_the_student_away_however_far():
    student, teacher = make_models(True)
    found = run(ReverseKL, student, teacher, top_k=3, rest="dropped")
    assert found.loss.isfinite() and found.loss > run(ReverseKL, student, teacher).loss
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())


def recorded(logits: Tensor) -> Recorded:
    """Logits [n, V] of one sequence, every row scored."""
    return Recorded(torch.zeros(1, len(logits), dtype=torch.long), logits=logits[None])


def of_logits(loss: type[Loss], teacher: Tensor, student: Tensor, **params: Any) -> Replay:
    return replay({"kd": (loss, params, 1.0)}, recorded(student), recorded(teacher), same_tokens=True, chunk_bytes=100)


logits = st.lists(st.floats(-60, 60), min_size=6, max_size=6).map(lambda x: torch.tensor([x]))
near = st.lists(st.floats(-1e-4, 1e-4), min_size=6, max_size=6).map(lambda x: torch.tensor([x]))


@EVERY
@given(teacher=logits, student=logits, by_little=near)
@settings(max_examples=40, deadline=None)
def test_it_is_never_negative_in_float32(loss, teacher, student, by_little):
    assert of_logits(loss, teacher, student).loss >= 0
    assert of_logits(loss, teacher, teacher + by_little).loss >= 0


@EVERY
def test_equal_distributions_have_no_divergence_and_no_gradient(loss):
    torch.manual_seed(0)
    same = torch.randn(7, 9)
    for dtype, at in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        found = of_logits(loss, same.to(dtype), same.to(dtype), temperature=2.0)
        assert found.loss <= at
        if loss is not TotalVariation:  # which has a kink there
            assert found.gradients["student_hidden"].abs().max() <= at


def test_rounding_below_zero_is_taken_off_the_value_alone():
    """In float32, a divergence of 1e-8 is rounding; its gradient is not."""
    torch.manual_seed(0)
    teacher = 3 * torch.randn(200, 9)
    student = teacher + 1e-4 * torch.randn(200, 9)
    found = of_logits(ForwardKL, teacher, student)
    exact = of_logits(ForwardKL, teacher.double(), student.double())
    ours, theirs = found.gradients["student_hidden"].double(), exact.gradients["student_hidden"]
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


@EVERY
@pytest.mark.parametrize(
    ("teacher", "student"),
    [((0,), ()), ((), (0,)), ((0,), (0,)), ((0, 1), (1, 2))],
    ids=["teacher", "student", "both", "some of both"],
)
@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_k": 2, "rest": "dropped"}], ids=str)
def test_excluded_tokens_leave_loss_and_gradient_finite(loss, teacher, student, params):
    torch.manual_seed(0)
    y, z = torch.randn(5, 6), torch.randn(5, 6)
    y[:, list(teacher)], z[:, list(student)] = -torch.inf, -torch.inf
    z.requires_grad_()
    made = loss(loss.Params.model_validate(params), make_pair(6, 6), {})
    value, _ = made.tokens(**seen(teacher=y, student=z)).sums[loss.name]
    (gradient,) = torch.autograd.grad(value, z)
    assert value.isfinite() and value > 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "formula", "excluded_by"),
    [
        (ForwardKL, lambda p, q: kl(p, q), "teacher"),
        (ReverseKL, lambda p, q: kl(q, p), "student"),
        *(
            (loss, formula, side)
            for side in ("teacher", "student")
            for loss, formula in (
                (JS, js(0.5)),
                (SkewForwardKL, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
                (SkewReverseKL, lambda p, q: kl(q, 0.9 * p + 0.1 * q)),
                (TotalVariation, lambda p, q: 0.5 * (p - q).abs().sum()),
            )
        ),
    ],
    ids=lambda x: getattr(x, "name", "" if callable(x) else str(x)),
)
def test_excluded_tokens_are_probabilities_of_zero_where_that_is_finite(loss, formula, excluded_by):
    torch.manual_seed(0)
    sides = {"teacher": torch.randn(5, 6).double(), "student": torch.randn(5, 6).double()}
    sides[excluded_by][:, [0, 3]] = -torch.inf
    y, z = sides["teacher"], sides["student"].requires_grad_()
    made = loss(loss.Params(), make_pair(6, 6), {})
    value, _ = made.tokens(**seen(**sides)).sums[loss.name]
    expected = sum(formula(p, q) for p, q in zip(y.softmax(-1), z.softmax(-1), strict=True))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(expected, z))


@EVERY
def test_bfloat16_logits_are_compared_in_float32(loss):
    torch.manual_seed(0)
    y, z = (3 * torch.randn(2, 20, 50)).bfloat16()
    found = of_logits(loss, y, z, temperature=1.7)
    exact = of_logits(loss, y.double(), z.double(), temperature=1.7)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=0)
    ours, theirs = found.gradients["student_hidden"], exact.gradients["student_hidden"]
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


@EVERY
def test_no_rows_have_no_loss(loss):
    nothing = Recorded(torch.full((2, 3), -100), logits=torch.randn(2, 3, 5))
    for params in ({}, {"top_k": 2}):
        found = replay({"kd": (loss, params, 1.0)}, nothing, nothing, same_tokens=True)
        assert found.loss == 0
        assert all((gradient == 0).all() for gradient in found.gradients.values())


@EVERY
def test_only_scored_rows_have_a_gradient(loss):
    student, teacher = make_models(True)
    gradient = run(loss, student, teacher).gradients["student_hidden"]
    assert (gradient[student.labels == -100] == 0).all()
    assert (gradient[student.labels != -100] != 0).any(-1).all()


@EVERY
def test_a_row_does_not_depend_on_its_neighbours(loss):
    torch.manual_seed(0)
    y, z = torch.randn(2, 9, 8).double()
    together = of_logits(loss, y, z)
    parts = [of_logits(loss, y[a:b], z[a:b]) for a, b in ((0, 1), (1, 5), (5, 9))]
    torch.testing.assert_close(together.loss * 9, sum(part.loss * part.tokens for part in parts))
    separate = torch.cat([part.gradients["student_hidden"] * part.tokens for part in parts], dim=1)
    torch.testing.assert_close(together.gradients["student_hidden"] * 9, separate)
    order = torch.tensor([4, 8, 0, 2, 1, 7, 5, 3, 6])
    torch.testing.assert_close(of_logits(loss, y[order], z[order]).loss, together.loss)
    assert not loss.needs(loss.Params(), same_tokens=True).batch_coupled


@pytest.mark.parametrize(
    ("loss", "params"),
    [
        (ForwardKL, {"temperature": 0}),
        (ReverseKL, {"subtract_entropy": False}),
        (JS, {"teacher_weight": 1.1}),
        (SkewForwardKL, {"skew": 1.0}),  # a constant: the mixture is the teacher itself
        (SkewReverseKL, {"skew": 1.0}),
        (AdaptiveKL, {"head_mass": 1.0}),
        (TotalVariation, {"top_k": 0}),
    ],
)
def test_what_says_nothing_is_refused(loss, params):
    with pytest.raises(ValidationError):
        loss.Params.model_validate(params)


@EVERY
def test_it_is_declared_to_need_one_tokenizer(loss):
    assert loss.needs(loss.Params(), same_tokens=True).tokenizers == "same"


@EVERY
def test_its_formula_names_both_models(loss):
    assert loss.formula.endswith("p teacher, q student")
