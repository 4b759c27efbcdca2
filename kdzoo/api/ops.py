"""Mathematics on tokens that more than one method uses. Plugins see this as `kdzoo.ops`.

Divergences take log-probabilities [n, V] of teacher `log_p` and student `log_q` and return one value per token [n].
Where p is 0 its terms are 0, also where log p is -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdzoo.api.batch import Side
from kdzoo.api.entries import entries_by_student, first_sources, linked_entries, shared_entries
from kdzoo.api.plugin import Params
from kdzoo.api.spans import Spans, groups_by_position, groups_by_text, is_followed
from kdzoo.api.view import pad_tokens, places_within, unpad_tokens


def cross_entropy(log_q: Tensor, labels: Tensor) -> Tensor:
    """-log q(label), per token [n]."""
    return -log_q.gather(-1, labels[:, None]).squeeze(-1)


def is_top(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the label's logit (or log-probability) is among its token's `k` largest [n] bool; ties count as in.

    Much cheaper than an argmax or a topk.
    """
    own = logits.gather(-1, labels[:, None])
    return (own >= logits.amax(-1, keepdim=True) if k == 1 else (logits > own).sum(-1, keepdim=True) < k).squeeze(-1)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in: float32 for half precision, and float64 where it is float64."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(at_least_float32(x.dtype))


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


def _times_log_ratio(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b): 0 where a is 0; see `INFINITE_RATIO`."""
    return (log_a - log_b).nan_to_num_(nan=0.0, posinf=INFINITE_RATIO, neginf=0.0).mul_(a)


def _smallest(like: Tensor) -> float:
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
        log_m = torch.lerp(q, p, teacher_weight).clamp_min_(_smallest(p)).log_()
        of_p = _times_log_ratio(p, log_p, log_m).mul_(teacher_weight)
        of_q = _times_log_ratio(q, log_q, log_m).mul_(1 - teacher_weight)
        # What m changes by cancels between the two terms.
        return of_p.sum(-1) + of_q.sum(-1), lambda g: of_p * g, lambda g: of_q * g

    return closed_form(formula, log_p, log_q)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew * p + (1 - skew) * q)."""

    def formula(log_p: Tensor, log_q: Tensor) -> Closed:
        p, q = log_p.exp(), log_q.exp()
        m = torch.lerp(q, p, skew).clamp_min_(_smallest(p))
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
        ratio = (log_p - log_q).nan_to_num_(nan=0.0, posinf=INFINITE_RATIO, neginf=-INFINITE_RATIO)
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
    share = torch.where(g_both > 0, g_first / g_both.clamp_min(_smallest(p)), 0.5)
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
        return log_x.exp().scatter(-1, where, 0.0).sum(-1, keepdim=True).clamp_min(_smallest(log_x)).log()

    if rest == "dropped":
        top_p = top_p - top_p.logsumexp(-1, keepdim=True)
        rest_p = torch.full_like(top_p[:, :1], -torch.inf)
    else:
        rest_p = others(log_p)
    return torch.cat([top_p, rest_p], -1), torch.cat([top_q, others(log_q)], -1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
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

    divergence: Literal[
        "forward_kl", "reverse_kl", "js", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "total_variation"
    ] = "forward_kl"
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


LikelihoodDifference = Literal[
    "binary_ce", "reverse_binary_kl", "binary_kl_temp_limit", "abs", "abs_exp", "renyi", "joschu_k2", "joschu_k3"
]


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0."""
    return (-x.expm1()).log()


def _binary_renyi(a: Tensor, b: Tensor, order: float) -> Tensor:
    """log(p^order q^(1 - order) + (1 - p)^order (1 - q)^(1 - order)) / (order - 1)"""
    outcomes = (order * x + (1 - order) * y for x, y in ((a, b), (_log1mexp(a), _log1mexp(b))))
    return torch.logaddexp(*outcomes) / (order - 1)


LIKELIHOOD_DIFFERENCES: dict[LikelihoodDifference, Callable[[Tensor, Tensor, float], Tensor]] = {
    "binary_ce": lambda a, b, _: a.expm1() * _log1mexp(b) - a.exp() * b,
    "reverse_binary_kl": lambda a, b, _: b.exp() * (b - a) - b.expm1() * (_log1mexp(b) - _log1mexp(a)),
    "binary_kl_temp_limit": lambda a, b, _: a - b + a * (b / a).log(),
    "abs": lambda a, b, _: (a - b).abs(),
    "abs_exp": lambda a, b, _: (a.exp() - b.exp()).abs(),
    "renyi": _binary_renyi,
    "joschu_k2": lambda a, b, _: (a - b).square() / 2,
    "joschu_k3": lambda a, b, _: (r := (a - b).clamp_max(80)).expm1() - r,  # e^88 is infinite in float32
}
"""How far the likelihood that two models give one text is apart: of the teacher's and the student's log-probabilities
[n] < 0, and of the order of Renyi's divergence."""


ATTENTION_BYTES = 16 * 2**20
"""Scores of one block of queries: what the memory of `attend` depends on."""


def attend(
    query: Tensor, keys: Tensor, values: Tensor, student: Side, teacher: Side, block_bytes: int = ATTENTION_BYTES
) -> tuple[Tensor, Tensor]:
    """Each query [N, A] attends to the keys [M, A] of its sequence: mixed values [N, width] and entropies [N], in nats.

    softmax(query . key / sqrt(A)), in float32 at least. Queries go in blocks whose scores are computed again on the
    way back, so that memory does not grow with N x M. A sequence without keys gives zeros. Entropies carry no gradient.
    """
    q, _ = pad_tokens(query, student)
    k, mask = pad_tokens(keys, teacher)
    v, _ = pad_tokens(values, teacher)
    wide = at_least_float32(k.dtype)
    size = max(1, block_bytes // max(1, mask.numel() * wide.itemsize))

    def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = (q @ k.transpose(1, 2)).to(wide) / math.sqrt(k.shape[-1])
        weights = scores.masked_fill(~mask[:, None], torch.finfo(wide).min).softmax(-1)
        weights = torch.where(mask[:, None], weights, torch.zeros_like(weights))
        with torch.no_grad():
            entropy = torch.special.entr(weights).sum(-1)
        return weights.to(v.dtype) @ v, entropy

    if not mask.shape[1]:
        found = [((q @ k.transpose(1, 2)).to(v.dtype) @ v, q.new_zeros(q.shape[:2], dtype=wide))]
    elif size >= q.shape[1]:
        found = [block(q, k, v)]
    else:
        found = [checkpoint(block, part, k, v, use_reentrant=False) for part in q.split(size, dim=1)]
    mixed, entropy = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return unpad_tokens(mixed, student), unpad_tokens(entropy, student)


@torch.no_grad()
def greedy_match(p: Tensor, q: Tensor, paired: Tensor, columns: int) -> Tensor:
    """For each column of p [B, n, K], the nearest of q [B, n, C] that no column before it has taken [B, K].

    Distances are over the tokens that are `paired` [B, n]. Those of q from `columns` on are no tokens, and taken last.
    """
    p, q = (x.masked_fill(~paired[:, :, None], 0).transpose(1, 2) for x in (p, q))
    cost = torch.cdist(p, q, p=1.0)  # [B, K, C]
    cost[:, :, columns:] = torch.finfo(cost.dtype).max
    chosen = []
    for column in cost.unbind(1):
        chosen.append(column.argmin(-1, keepdim=True))
        cost.scatter_(2, chosen[-1][:, None].expand(-1, cost.shape[1], -1), math.inf)  # of the columns to come
    return torch.cat(chosen, -1)


def standardised(logits: Tensor, temperature: float = 1.0, epsilon: float = 1e-4) -> Tensor:
    """Logits [n, V] over temperature times (their standard deviation over the vocabulary plus `epsilon`).

    Unbiased, and of the tokens that are not excluded: those stay at -inf.
    """
    excluded = logits == -math.inf
    kept = ~excluded
    logits = logits.masked_fill(excluded, 0)
    count = kept.sum(-1, keepdim=True)
    mean = logits.sum(-1, keepdim=True) / count.clamp_min(1)
    square = ((logits - mean) * kept).square().sum(-1, keepdim=True)
    deviation = (square / (count - 1).clamp_min(1)).clamp_min(_smallest(logits)).sqrt()
    return (logits / (temperature * (deviation + epsilon))).masked_fill(excluded, -math.inf)


def sinkhorn(p: Tensor, q: Tensor, in_p: Tensor, in_q: Tensor, regularisation: float, iterations: int) -> Tensor:
    """<P, W> per sequence [B]: W the L1 distances between p [B, n, K] and q [B, m, K], P their kernel, scaled.

    Rows, then columns, are scaled to sums of 1, again and again; `in_p` [B, n] and `in_q` [B, m] say which there are.
    Only the factors change, so that the way back keeps vectors of every iteration and no matrix.
    """
    cost = torch.cdist(p, q, p=1.0)
    kernel = torch.exp(-cost / regularisation) * (in_p[:, :, None] & in_q[:, None, :])
    tiny = _smallest(kernel)
    rows = of_rows = in_p[:, :, None].to(kernel.dtype)
    columns = of_columns = in_q[:, :, None].to(kernel.dtype)
    for _ in range(iterations):
        rows = of_rows / (kernel @ columns).clamp_min(tiny)
        columns = of_columns / (kernel.transpose(1, 2) @ rows).clamp_min(tiny)
    return (rows * kernel * columns.transpose(1, 2) * cost).sum((1, 2))


ENTRIES = 8192
"""How many entries of a head are copied at a time: a head in a higher precision would be many times the model."""


def product_of_heads(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, dtype: torch.dtype) -> Tensor:
    """A' B [width of a, width of b] of two heads, over entries `of_a` [O] of the one and `of_b` [O] of the other."""
    total = a.new_zeros(a.shape[1], b.shape[1], dtype=dtype)
    for rows, columns in zip(of_a.to(a.device).split(ENTRIES), of_b.to(a.device).split(ENTRIES), strict=True):
        total.addmm_(a[rows].to(dtype).T, b[columns].to(dtype))
    return total


def gram_inverse(head: Tensor, entries: Tensor) -> Tensor:
    """(A' A)^+ [width, width] of a head's entries [O], in float64.

    Without the directions that a pseudo-inverse of A in float32 leaves out.
    """
    smallest = max(len(entries), head.shape[1]) * torch.finfo(torch.float32).eps
    gram = product_of_heads(head, head, entries, entries, torch.float64)
    return torch.linalg.pinv(gram, rtol=smallest**2, hermitian=True)


def projector_between_heads(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    """P [width of a, width of b] in float64, for which A P is nearest to B over these entries."""
    return gram_inverse(a, of_a) @ product_of_heads(a, b, of_a, of_b, torch.float64)


def sequence_mean(values: Tensor, side: Side, mask: Tensor | None = None) -> Tensor:
    """The mean of `values` [N] over each sequence's tokens (those in `mask`), on every token [N]; 0 where none."""
    keep = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    kept = values if mask is None else torch.where(mask, values, torch.zeros_like(values))
    total = values.new_zeros(side.sequences).index_add(0, side.sample, kept)
    count = values.new_zeros(side.sequences).index_add(0, side.sample, keep)
    return (total / count.clamp_min(1))[side.sample]


def sequence_std(values: Tensor, side: Side) -> Tensor:
    """One unbiased standard deviation over all entries of a sequence's tokens [N, width], on every token [N, 1]."""
    width = values.shape[-1]
    entries = width * values.new_zeros(side.sequences).index_add(0, side.sample, torch.ones_like(values[:, 0]))
    total = values.new_zeros(side.sequences).index_add(0, side.sample, values.sum(-1))
    mean = (total / entries.clamp_min(1))[side.sample]
    square = (values - mean[:, None]).square().sum(-1)
    variance = values.new_zeros(side.sequences).index_add(0, side.sample, square) / (entries - 1).clamp_min(1)
    return variance.sqrt()[side.sample][:, None]


__all__ = [
    "DIVERGENCES",
    "INFINITE_RATIO",
    "LIKELIHOOD_DIFFERENCES",
    "Closed",
    "DivergenceParams",
    "LikelihoodDifference",
    "Spans",
    "adaptive_kl",
    "at_least_float32",
    "attend",
    "closed_form",
    "cross_entropy",
    "entries_by_student",
    "first_sources",
    "forward_kl",
    "gram_inverse",
    "greedy_match",
    "groups_by_position",
    "groups_by_text",
    "is_followed",
    "is_top",
    "js",
    "linked_entries",
    "pad_tokens",
    "places_within",
    "product_of_heads",
    "projector_between_heads",
    "reverse_kl",
    "sequence_mean",
    "sequence_std",
    "shared_entries",
    "sinkhorn",
    "skew_forward_kl",
    "skew_reverse_kl",
    "standardised",
    "top_k_and_rest",
    "total_variation",
    "unpad_tokens",
    "widened",
]
