"""Divergences against their definitions in probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdzoo import ops


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p / q).log(), 0).sum(-1)


DEFINITIONS = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "js": lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
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


@pytest.mark.parametrize("name", ["forward_kl", "js", "skew_forward_kl", "skew_reverse_kl", "total_variation"])
def test_a_token_that_the_teacher_excludes_counts_as_its_limit(name):
    log_p, log_q = distributions()
    log_p = torch.cat([log_p[:, :1].fill_(-torch.inf), log_p[:, 1:]], -1).log_softmax(-1)
    torch.testing.assert_close(ops.DIVERGENCES[name](log_p, log_q), DEFINITIONS[name](log_p.exp(), log_q.exp()))


@ALL
def test_it_is_never_negative(name):
    for spread in (0.01, 1.0, 30.0):
        assert (ops.DIVERGENCES[name](*distributions(spread)) > -1e-15).all()


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


def test_adaptive_kl_by_hand():
    """Ascending, the teacher's tail is what cumulates to at most the head's mass: here 0.1 and 0.2."""
    p, q = torch.tensor([[0.2, 0.7, 0.1]]).double(), torch.tensor([[0.5, 0.3, 0.2]]).double()
    tail, head = 0.3 + 0.1, 0.4
    expected = (head * kl(p, q) + tail * kl(q, p)) / (head + tail)
    torch.testing.assert_close(ops.adaptive_kl(p.log(), q.log(), 0.5), expected)


def test_the_label_is_the_top_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert ops.is_top(logits, torch.tensor([1, 1])).tolist() == [True, False]
