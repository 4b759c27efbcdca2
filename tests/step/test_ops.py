"""Divergences against their definitions in probabilities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdzoo import ops


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p / q).log(), 0).sum(-1)


def js(p: Tensor, q: Tensor, w: float) -> Tensor:
    m = w * p + (1 - w) * q
    return w * kl(p, m) + (1 - w) * kl(q, m)


DEFINITIONS = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "js": lambda p, q: js(p, q, 0.5),
    "skew_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    "total_variation": lambda p, q: 0.5 * (p - q).abs().sum(-1),
}
ALL = pytest.mark.parametrize("name", ops.DIVERGENCES)


def distributions(spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """log p and log q [50, 8]"""
    torch.manual_seed(0)
    return tuple((spread * torch.randn(2, 50, 8).double()).log_softmax(-1))  # type: ignore[return-value]


def test_each_divergence_has_a_definition():
    assert ops.DIVERGENCES.keys() == DEFINITIONS.keys() | {"adaptive_kl"}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_definition(name):
    log_p, log_q = distributions()
    torch.testing.assert_close(ops.DIVERGENCES[name](log_p, log_q), DEFINITIONS[name](log_p.exp(), log_q.exp()))


def gradients(of: Callable[[Tensor, Tensor], Tensor], *log_probabilities: Tensor) -> tuple[Tensor, ...]:
    """Of a sum over rows that count differently."""
    leaves = [x.clone().requires_grad_() for x in log_probabilities]
    value = of(*leaves)
    return torch.autograd.grad((value * torch.linspace(-1, 2, len(value))).sum(), leaves)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_gradients_of_the_definition(name):
    given = distributions()
    found = gradients(ops.DIVERGENCES[name], *given)
    expected = gradients(lambda log_p, log_q: DEFINITIONS[name](log_p.exp(), log_q.exp()), *given)
    torch.testing.assert_close(found, expected)


@ALL
def test_a_gradient_that_nobody_asks_for_changes_nothing(name):
    log_p, log_q = distributions()
    both = gradients(ops.DIVERGENCES[name], log_p, log_q)
    (first,) = gradients(lambda log_p: ops.DIVERGENCES[name](log_p, log_q), log_p)
    (second,) = gradients(lambda log_q: ops.DIVERGENCES[name](log_p, log_q), log_q)
    torch.testing.assert_close((first, second), both)


def excluding(logits: Tensor, *tokens: int) -> Tensor:
    return logits.index_fill(-1, torch.tensor(tokens, dtype=torch.long), -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("name", ["forward_kl", "js", "skew_forward_kl", "skew_reverse_kl", "total_variation"])
def test_a_token_that_the_teacher_excludes_counts_as_its_limit(name):
    log_p, log_q = distributions()
    log_p = excluding(log_p, 0)
    torch.testing.assert_close(ops.DIVERGENCES[name](log_p, log_q), DEFINITIONS[name](log_p.exp(), log_q.exp()))


@pytest.mark.parametrize("name", ["reverse_kl", "js", "skew_forward_kl", "skew_reverse_kl", "total_variation"])
def test_a_token_that_the_student_excludes_counts_as_its_limit(name):
    log_p, log_q = distributions()
    log_q = excluding(log_q, 0)
    torch.testing.assert_close(ops.DIVERGENCES[name](log_p, log_q), DEFINITIONS[name](log_p.exp(), log_q.exp()))


@ALL
@pytest.mark.parametrize(("teacher", "student"), [((0,), ()), ((), (0,)), ((0,), (0,)), ((0, 1), (0, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_a_model_excludes_leave_value_and_gradients_finite(name, teacher, student, dtype):
    p, q = (x.to(dtype) for x in distributions())
    p, q = p.requires_grad_(), q.requires_grad_()
    value = ops.DIVERGENCES[name](excluding(p, *teacher), excluding(q, *student))
    assert value.isfinite().all() and (value > 0).all()
    for gradient in torch.autograd.grad(value.sum(), (p, q)):
        assert gradient.isfinite().all()


@ALL
def test_tokens_that_both_models_exclude_are_as_if_they_were_not_there(name):
    log_p, log_q = (x[:, 2:].log_softmax(-1) for x in distributions())
    with_them = (torch.cat([torch.full((50, 2), -torch.inf), x], -1) for x in (log_p, log_q))
    torch.testing.assert_close(ops.DIVERGENCES[name](*with_them), ops.DIVERGENCES[name](log_p, log_q))


def test_an_infinite_ratio_counts_as_a_large_one():
    log_p, log_q = distributions()
    without = excluding(log_q, 0)
    expected = kl(log_p.exp()[:, 1:], without.exp()[:, 1:]) + 100 * log_p.exp()[:, 0]
    torch.testing.assert_close(ops.forward_kl(log_p, without), expected)
    torch.testing.assert_close(ops.reverse_kl(without, log_p), expected)


@ALL
def test_it_is_never_negative(name):
    for spread in (0.01, 1.0, 30.0):
        assert (ops.DIVERGENCES[name](*distributions(spread)) > -1e-15).all()


@ALL
def test_probabilities_too_small_for_float32_are_no_trouble(name):
    log_p, log_q = (x.float() for x in distributions(100.0))
    assert log_p.exp().min() == 0
    log_q = log_q.requires_grad_()
    value = ops.DIVERGENCES[name](log_p, log_q)
    (gradient,) = torch.autograd.grad(value.sum(), log_q)
    assert gradient.isfinite().all()
    exact = ops.DIVERGENCES[name](log_p.double(), log_q.detach().double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@ALL
def test_it_is_zero_at_equality_and_so_is_its_gradient(name):
    log_p, _ = distributions()
    logits = log_p.clone().requires_grad_()
    value = ops.DIVERGENCES[name](log_p, logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.abs().max() < 1e-13
    if name != "total_variation":  # has a kink there
        assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize(("skew", "forward", "reverse"), [(0.0, "forward_kl", "reverse_kl"), (1.0, None, None)])
def test_the_ends_of_the_skew(skew, forward, reverse):
    log_p, log_q = distributions()
    for skewed, plain in ((ops.skew_forward_kl, forward), (ops.skew_reverse_kl, reverse)):
        expected = ops.DIVERGENCES[plain](log_p, log_q) if plain else torch.zeros(50).double()
        torch.testing.assert_close(skewed(log_p, log_q, skew), expected)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_js_of_any_mixture(weight):
    def found(log_p: Tensor, log_q: Tensor) -> Tensor:
        return ops.js(log_p, log_q, weight)

    def expected(log_p: Tensor, log_q: Tensor) -> Tensor:
        return js(log_p.exp(), log_q.exp(), weight)

    given = distributions()
    torch.testing.assert_close(found(*given), expected(*given))
    torch.testing.assert_close(gradients(found, *given), gradients(expected, *given))


def test_js_per_weight_goes_to_the_forward_kl():
    log_p, log_q = distributions(1.0)
    torch.testing.assert_close(ops.js(log_p, log_q, 1e-7) / 1e-7, ops.forward_kl(log_p, log_q), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ops.js(log_p, log_q, 1 - 1e-7) / 1e-7, ops.reverse_kl(log_p, log_q), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("head_mass", "crossing", "in_head"),
    [
        (0.5, "head", [1]),  # ascending 0.1, 0.3: the tail
        (0.5, "tail", [1]),  # descending 0.7 > 0.5: the first token all the same
        (0.8, "head", [1]),
        (0.8, "tail", [1]),
        (0.95, "tail", [0, 1]),
        (0.2, "head", [0, 1]),
        (0.05, "head", [0, 1, 2]),
    ],
)
def test_adaptive_kl_by_hand(head_mass, crossing, in_head):
    p, q = torch.tensor([[0.2, 0.7, 0.1]]).double(), torch.tensor([[0.5, 0.3, 0.2]]).double()
    gap = (p - q).abs()[0]
    head, both = gap[in_head].sum(), gap.sum()

    def expected(log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        return (head * kl(p, q) + (both - head) * kl(q, p)) / both

    def found(log_p: Tensor, log_q: Tensor) -> Tensor:
        return ops.adaptive_kl(log_p, log_q, head_mass, crossing)

    torch.testing.assert_close(found(p.log(), q.log()), expected(p.log(), q.log()))
    torch.testing.assert_close(gradients(found, p.log(), q.log()), gradients(expected, p.log(), q.log()))


@ALL
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_teachers_likeliest_tokens_and_the_rest(name, k):
    """Dropped: what the dense divergence is of a teacher that has them only. One token: of models that merge them."""
    log_p, log_q = distributions()
    places = log_p.argsort(-1, descending=True)
    top, others = places[:, :k], places[:, k:]
    only = log_p.scatter(-1, others, -torch.inf).log_softmax(-1)
    merged = [
        torch.cat([x.exp().gather(-1, top), x.exp().gather(-1, others).sum(-1, keepdim=True)], -1).log()
        for x in (log_p, log_q)
    ]
    found = ops.DIVERGENCES[name](*ops.top_k_and_rest(log_p, log_q, k, "dropped"))
    torch.testing.assert_close(found, ops.DIVERGENCES[name](only, log_q))
    found = ops.DIVERGENCES[name](*ops.top_k_and_rest(log_p, log_q, k, "one_token"))
    torch.testing.assert_close(found, ops.DIVERGENCES[name](*merged))


@pytest.mark.parametrize("k", [8, 9])
def test_all_tokens_have_no_rest(k):
    log_p, log_q = distributions()
    found = ops.top_k_and_rest(log_p, log_q, k, "dropped")
    assert found[0] is log_p and found[1] is log_q


def test_a_rest_that_both_models_exclude_has_no_gradient():
    log_p, log_q = distributions()
    logits = log_q.clone().requires_grad_()
    tokens = (3, 4, 5, 6, 7)
    given = excluding(log_p, *tokens), excluding(logits, *tokens)
    value = ops.forward_kl(*ops.top_k_and_rest(*given, 3, "one_token"))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(value, ops.forward_kl(*given))
    assert gradient.isfinite().all() and (gradient[:, 3:] == 0).all()


def test_the_label_is_the_top_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert ops.is_top(logits, torch.tensor([1, 1])).tolist() == [True, False]
