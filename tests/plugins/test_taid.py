from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from recordings import assert_same, make_models, make_pair, of_logits, seen, visited

from kdzoo.testing import replay
from kdzoo_divergences import ForwardKL
from kdzoo_taid import TAID


def made(**params) -> TAID:
    return TAID(TAID.Params.model_validate(params), make_pair(7, 7), {})


def follow(loss: TAID, losses: list[float]) -> list[float]:
    """t before every step of a stage with these losses, and after the last."""
    t = [float(loss.t)]
    for number, value in enumerate(losses):
        loss.after_step({"taid": value, "t": t[-1]}, (number + 1) / len(losses))
        t.append(float(loss.t))
    return t


@pytest.mark.parametrize("t", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("subtract_entropy", [True, False])
def test_it_is_the_formula_in_value_and_gradients(t, tau, subtract_entropy):
    student, teacher = make_models(True)
    params = {"t_start": t, "temperature": tau, "subtract_entropy": subtract_entropy}
    found = replay(
        {"kd": (TAID, params, 0.3)}, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=200
    )
    total = torch.zeros(()).double()
    for b in range(len(student)):
        for y, z in zip(teacher.logits(b), student.logits(b), strict=True):
            p, q = (y / tau).softmax(-1), (z / tau).softmax(-1)
            between = p**t * q.detach() ** (1 - t)  # the geometric mixture is that of logits
            m = between / between.sum()
            total = total - (m * q.log()).sum() + ((m * m.log()).sum() if subtract_entropy else 0.0)
    assert_same(found, 0.3 * total / 10, {"student_hidden": student.hidden, "student_head": student.head})
    torch.testing.assert_close(found.watched["kd/t"], torch.tensor(t).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_at_t_1_it_is_the_forward_kl_to_the_bit(dtype, tau):
    torch.manual_seed(0)
    y, z = 3 * torch.randn(2, 9, 40, dtype=dtype)
    loss = made(temperature=tau)
    follow(loss, [1.0, 0.9])
    assert loss.t == 1.0
    z.requires_grad_()
    (term,) = loss.tokens(**seen(teacher=y, student=z)).values.values()
    value = term.value
    ours = value.detach(), torch.autograd.grad(value.sum(), z)[0]
    for mine, theirs in zip(ours, visited(ForwardKL, y, z, temperature=tau), strict=True):
        assert torch.equal(mine, theirs)


def test_t_follows_the_change_of_the_loss():
    """Beside the authors' rule in numbers of python."""
    losses = [3.0, 2.5, 2.6, 2.0, 1.0, 1.0, 0.9, 0.5]
    alpha, beta = 0.3, 0.8
    t, momentum, expected = 0.2, 0.0, [0.2, 0.2]
    for number in range(1, len(losses)):
        momentum = beta * momentum + (1 - beta) * (losses[number - 1] - losses[number]) / losses[number - 1]
        t = t + alpha / (1 + math.exp(-momentum)) * (1 - t)
        t = min(0.9, max(t, 0.2 + 0.7 * (number + 1) / len(losses)))
        expected.append(t)
    found = follow(made(t_start=0.2, t_end=0.9, alpha=alpha, beta=beta), losses)
    assert found == pytest.approx(expected, rel=1e-6)


def test_t_never_falls_and_ends_at_its_end():
    t = follow(made(alpha=0.05), [1.0, 5.0, 0.0, 2.0, 1e-9, 7.0, 0.5, 0.5, 0.1, 0.1])
    assert all(a <= b for a, b in pairwise(t))
    assert t[0] == t[1] == pytest.approx(0.4)
    assert t[-1] == 1.0


def test_a_loss_of_0_before_tells_no_change():
    loss = made(t_start=0.0, alpha=0.5)
    follow(loss, [0.0, 1.0])
    assert loss.momentum == 0.0


def test_a_schedule_that_does_not_adapt_is_linear():
    t = follow(made(t_start=0.2, t_end=0.6, adaptive=False), [1.0, 0.1, 3.0, 2.0])
    assert t == pytest.approx([0.2, 0.2, 0.4, 0.5, 0.6])


def test_its_state_is_in_the_checkpoint():
    loss = made()
    follow(loss, [3.0, 2.0, 1.5])
    again = made()
    again.load_state_dict(loss.state_dict())
    assert loss.state_dict().keys() == {"t", "momentum", "previous_loss"}
    for state in (loss, again):
        state.after_step({"taid": 1.2}, 0.5)
    assert all(torch.equal(loss.state_dict()[name], again.state_dict()[name]) for name in loss.state_dict())


def test_equal_models_have_no_divergence_and_no_gradient():
    torch.manual_seed(0)
    same = 4 * torch.randn(9, 33)
    for dtype, at in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        found = of_logits(TAID, same.to(dtype), same.to(dtype), temperature=1.3)
        assert found.loss <= at
        assert found.gradients["student_hidden"].abs().max() <= at


@pytest.mark.parametrize(("teacher", "student"), [((0,), ()), ((), (0,)), ((0,), (0,)), ((0, 1), (1, 2))])
@pytest.mark.parametrize("params", [{}, {"t_start": 0.0}, {"temperature": 3.0}], ids=str)
def test_excluded_entries_leave_loss_and_gradient_finite(teacher, student, params):
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 6)
    y[:, list(teacher)], z[:, list(student)] = -torch.inf, -torch.inf
    value, gradient = visited(TAID, y, z, **params)
    assert value.isfinite().all() and (value >= 0).all()
    assert gradient.isfinite().all()


def test_an_entry_that_the_teacher_excludes_is_as_in_the_forward_kl_at_t_1():
    torch.manual_seed(0)
    y, z = torch.randn(2, 5, 6).double()
    y[:, :2] = -torch.inf
    params = {"t_start": 1 - 1e-12, "temperature": 2.0}
    for ours, theirs in zip(visited(TAID, y, z, **params), visited(ForwardKL, y, z, temperature=2.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_no_rows_have_no_loss():
    value, gradient = visited(TAID, torch.randn(0, 5), torch.randn(0, 5))
    assert value.shape == (0,) and gradient.shape == (0, 5)


@pytest.mark.parametrize(
    "params", [{"t_start": 1.0}, {"t_end": 0.0}, {"t_start": 0.5, "t_end": 0.4}, {"beta": 1.0}, {"alpha": 2.0}]
)
def test_what_says_nothing_is_refused(params):
    with pytest.raises(ValidationError):
        TAID.Params.model_validate(params)
