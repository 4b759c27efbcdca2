"""Divergences between next-token distributions. Plugins see this as `kdzoo.ops`.

They take log-probabilities [n, V] of teacher `log_p` and student `log_q` and return one value per token [n].
Where p is 0 its terms are 0, also where log p is -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdzoo.api.plugin import Params

INFINITE_RATIO = 100.0
"""What an infinite log-ratio counts as, in nats: that of a token which only one of two models excludes altogether.

So divergences that would be infinite stay finite and say where to go. (Authors' code leaves such tokens out, which
makes divergences negative.)
"""

Derivative = Callable[[Tensor], Tensor]
"""From the gradient of a token's value [n, 1] to that of a log-probability [n, V]."""

Closed = tuple[Tensor, Derivative, Derivative]
"""Values per token [n], and their derivatives by the first and the second log-probability."""


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Callable[[Tensor, Tensor], Closed], first: Tensor, second: Tensor) -> Tensor:
        value, *derivatives = formula(first, second)
        # Those that nobody asks for are dropped, with the tensors that they hold.
        ctx.derivatives = [by if ctx.needs_input_grad[i] else None for i, by in enumerate(derivatives, start=1)]
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(None if by is None else by(gradient[:, None]) for by in ctx.derivatives))


def closed_form(formula: Callable[[Tensor, Tensor], Closed], log_p: Tensor, log_q: Tensor) -> Tensor:
    """`formula(log_p, log_q)` per token [n], with the derivatives that it states in place of autograd's.

    It saves passes over the vocabulary, and limits such as 0 log 0 have the gradient that the formula gives them.
    """
    return _ClosedForm.apply(formula, log_p, log_q)


def log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b [n, V]: 0 where both are excluded; see `INFINITE_RATIO` where one is."""
    return (log_a - log_b).nan_to_num_(nan=0.0, posinf=INFINITE_RATIO, neginf=-INFINITE_RATIO)


def _times_log_ratio(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b): 0 where a is 0; see `INFINITE_RATIO`."""
    return (log_a - log_b).nan_to_num_(nan=0.0, posinf=INFINITE_RATIO, neginf=0.0).mul_(a)


def smallest(like: Tensor) -> float:
    """The least normal number of its dtype: under it, logarithms and quotients lose digits."""
    return torch.finfo(like.dtype).tiny


def _kl(log_a: Tensor, log_b: Tensor) -> Closed:
    """sum_v a (log a - log b)"""
    a = log_a.exp()
    terms = _times_log_ratio(a, log_a, log_b)
    return terms.sum(-1), lambda g: (terms + a).mul_(g), lambda g: a * -g


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q)."""
    return closed_form(_kl, log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum_v q (log q - log p)."""
    return closed_form(_kl, log_q, log_p)


def js(log_p: Tensor, log_q: Tensor, teacher_weight: float = 0.5) -> Tensor:
    """w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q, w the `teacher_weight`.

    It is 0 at w = 0 and at w = 1, whatever p and q are; per w or 1 - w, its limits there are KL(p || q) and KL(q || p).
    """

    def formula(log_p: Tensor, log_q: Tensor) -> Closed:
        p, q = log_p.exp(), log_q.exp()
        log_m = torch.lerp(q, p, teacher_weight).clamp_min_(smallest(p)).log_()
        of_p = _times_log_ratio(p, log_p, log_m).mul_(teacher_weight)
        of_q = _times_log_ratio(q, log_q, log_m).mul_(1 - teacher_weight)
        # What m changes by cancels between the two terms.
        return of_p.sum(-1) + of_q.sum(-1), lambda g: of_p * g, lambda g: of_q * g

    return closed_form(formula, log_p, log_q)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew * p + (1 - skew) * q)."""

    def formula(log_p: Tensor, log_q: Tensor) -> Closed:
        p, q = log_p.exp(), log_q.exp()
        m = torch.lerp(q, p, skew).clamp_min_(smallest(p))
        by_q = (q / m).mul_(p).mul_(1 - skew)
        terms = _times_log_ratio(p, log_p, m.log_())
        return terms.sum(-1), lambda g: (terms + by_q).mul_(g), lambda g: by_q * -g

    return closed_form(formula, log_p, log_q) if skew else forward_kl(log_p, log_q)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || (1 - skew) * p + skew * q)."""
    return skew_forward_kl(log_q, log_p, skew)


def adaptive_kl(
    log_p: Tensor, log_q: Tensor, head_mass: float = 0.5, crossing: Literal["head", "tail"] = "head"
) -> Tensor:
    """(g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail), the weights without gradient.

    The gaps g sum |p - q| over the teacher's likely tokens (head) and the others (tail). `crossing` says where the
    token goes at which the cumulated probability passes `head_mass`. "head": counted from the least likely token up,
    the tail holds at most `head_mass`. "tail": counted from the likeliest down, the head does (or is one token).
    Equal weights where p = q.
    """

    head = _share_of_head(log_p.detach(), log_q.detach(), head_mass, crossing)[:, None].detach()

    def formula(log_p: Tensor, log_q: Tensor) -> Closed:
        p_share, q_share = log_p.exp() * head, log_q.exp() * (1 - head)
        ratio = log_ratio(log_p, log_q)
        return (
            ((p_share - q_share).mul_(ratio)).sum(-1),
            lambda g: (ratio + 1).mul_(p_share).sub_(q_share).mul_(g),
            lambda g: (1 - ratio).mul_(q_share).sub_(p_share).mul_(g),
        )

    return closed_form(formula, log_p, log_q)


def _share_of_head(log_p: Tensor, log_q: Tensor, head_mass: float, crossing: Literal["head", "tail"]) -> Tensor:
    """g_head / (g_head + g_tail) per token [n]."""
    p, q = log_p.exp(), log_q.exp()
    sorted_p, order = p.sort(-1, descending=crossing == "tail")
    first = sorted_p.cumsum(-1) <= head_mass
    first[:, :1] |= crossing == "tail"
    gap = (sorted_p - q.gather(-1, order)).abs_()
    g_first, g_both = gap.masked_fill(~first, 0).sum(-1), gap.sum(-1)
    share = torch.where(g_both > 0, g_first / g_both.clamp_min(smallest(p)), 0.5)
    return share if crossing == "tail" else 1 - share


def _total_variation(log_p: Tensor, log_q: Tensor) -> Closed:
    p, q = log_p.exp(), log_q.exp()
    larger = p - q
    return (
        0.5 * larger.abs().sum(-1),
        lambda g: larger.sign().mul_(p).mul_(0.5 * g),
        lambda g: larger.sign().mul_(q).mul_(-0.5 * g),
    )


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1/2 sum_v |p - q|."""
    return closed_form(_total_variation, log_p, log_q)


ALMOST_0 = 1e-6
"""Powers this small, beside the largest of them or all, make less of a difference than float32 shows."""

LARGEST_LOG = 60.0
"""Of a probability's negative power; less likely tokens count as this, so that sums of them are finite."""

SMALL_POWER = 0.01
"""Where no power is larger, the formula is a difference of almost equal numbers and taken in float64."""


def alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """- 1/(αβ) sum_v [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)], and its limits where α, β or α + β is 0.

    KL(p || q) at α = 1, β = 0, and KL(q || p) at α = 0, β = 1.
    """
    powers = _powers(alpha, beta)
    dtype = log_p.dtype
    if 0 < max(abs(power) for power in powers) < SMALL_POWER:
        log_p, log_q = log_p.double(), log_q.double()
    return closed_form(lambda log_p, log_q: _alpha_beta(log_p, log_q, *powers), log_p, log_q).to(dtype)


def _powers(alpha: float, beta: float) -> tuple[float, float, float]:
    """α, β and α + β; what is almost 0 beside the largest of them is 0, and the third is the sum of the two."""
    largest = max(abs(alpha), abs(beta), abs(alpha + beta))
    if largest < ALMOST_0:
        return 0.0, 0.0, 0.0
    alpha, beta = (x if abs(x) >= ALMOST_0 * largest else 0.0 for x in (alpha, beta))
    if abs(alpha + beta) < ALMOST_0 * largest:
        half = (alpha - beta) / 2
        return half, -half, 0.0
    return alpha, beta, alpha + beta


def _alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float, total: float) -> Closed:
    """With u = (q^(α+β) - p^α q^β) / α, which is the derivative by log q, w = (p^(α+β) - p^α q^β) / β, that by log p,
    and v = (q^(α+β) - p^(α+β)) / (α+β), it is the sum of (u + w) / (α+β), which is (v + w) / α. u, v and w have limits
    of their own, so that only the divisor outside must not be near 0.
    """
    if (lowest := min(alpha, beta, total)) < 0:
        floor = max(-INFINITE_RATIO, LARGEST_LOG / lowest)
        log_p, log_q = log_p.clamp_min(floor), log_q.clamp_min(floor)
    ratio = log_ratio(log_q, log_p)
    of_p, of_q = _times(log_p, total).exp(), _times(log_q, total).exp()
    of_both = (_times(log_p, alpha) + _times(log_q, beta)).exp()
    u, w = _difference(of_q, of_both, ratio, alpha), -_difference(of_both, of_p, ratio, beta)
    if not (alpha or beta):
        terms = 0.5 * ratio.square()
    elif abs(total) >= 0.5 * abs(alpha):
        terms = (u + w) / total
    else:
        terms = (_difference(of_q, of_p, ratio, total) + w) / alpha
    return terms.sum(-1).clamp_min(0), lambda g: w * g, lambda g: u * g


def _times(log_x: Tensor, power: float) -> Tensor:
    """The logarithm of x^power; x^0 is 1, also at 0."""
    return log_x * power if power else torch.zeros_like(log_x)


def _difference(x: Tensor, y: Tensor, ratio: Tensor, power: float) -> Tensor:
    """(x - y) / power, where log x - log y is power * ratio. At power 0 that is x * ratio."""
    if abs(power) >= 0.1:
        return (x - y) / power
    if not power:
        return x * ratio
    # From the larger of the two, so that nothing overflows.
    return torch.expm1(-abs(power) * ratio.abs()).mul_(torch.maximum(x, y)).mul_(ratio.sign()) / -abs(power)


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sqrt(1/2 sum_v (sqrt p - sqrt q)^2), between 0 and 1; a distance, whose gradient is infinite at p = q."""
    return ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1).mul(0.5).sqrt()


def top_k_and_rest(
    log_p: Tensor, log_q: Tensor, k: int, rest: Literal["one_token", "dropped"]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, k + 1] of the teacher's `k` likeliest tokens, and of all others as one token.

    "dropped": the teacher's own others have probability 0, and its k likeliest are divided by their sum. For every
    divergence that is a sum over tokens this is what it is on [n, V], since where p is 0 it is linear in q.
    """
    if k >= log_p.shape[-1]:
        return log_p, log_q
    top_p, where = log_p.topk(k, dim=-1)
    top_q = log_q.gather(-1, where)

    def others(log_x: Tensor) -> Tensor:
        # Summed up themselves: one less the sum of the likeliest would be rounding where that is almost one.
        return log_x.exp().scatter(-1, where, 0.0).sum(-1, keepdim=True).clamp_min(smallest(log_x)).log()

    if rest == "dropped":
        top_p = top_p - top_p.logsumexp(-1, keepdim=True)
        rest_p = torch.full_like(top_p[:, :1], -torch.inf)
    else:
        rest_p = others(log_p)
    return torch.cat([top_p, rest_p], -1), torch.cat([top_q, others(log_q)], -1)


DivergenceName = Literal[
    "forward_kl", "reverse_kl", "js", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "total_variation"
]

DIVERGENCES: dict[DivergenceName, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
}


class DivergenceParams(Params):
    """Parameters of a method that leaves its divergence open, for its own to inherit."""

    divergence: DivergenceName = "forward_kl"
    """D of the formula."""
    skew: float = Field(0.1, ge=0, le=1)
    """The mixture of the skewed divergences."""
    head_mass: float = Field(0.5, gt=0, lt=1)
    """Where adaptive_kl splits the teacher's distribution into head and tail."""

    def measure(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The chosen divergence per token [n]."""
        options = {
            "skew_forward_kl": {"skew": self.skew},
            "skew_reverse_kl": {"skew": self.skew},
            "adaptive_kl": {"head_mass": self.head_mass},
        }
        return DIVERGENCES[self.divergence](log_p, log_q, **options.get(self.divergence, {}))
