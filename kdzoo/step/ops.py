"""Mathematics on rows that more than one method uses. Plugins see this as `kdzoo.ops`.

Divergences take log-probabilities [n, V] of teacher `log_p` and student `log_q` and return one value per row [n].
Where p is 0 its terms are 0, also where log p is -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdzoo.step.batch import Side
from kdzoo.step.view import pad_rows, places_within, unpad_rows


def cross_entropy(log_q: Tensor, labels: Tensor) -> Tensor:
    """-log q(label), per row [n]."""
    return -log_q.gather(-1, labels[:, None]).squeeze(-1)


def is_top(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the label's logit (or log-probability) is among the row's `k` largest [n] bool; ties count as in.

    Much cheaper than an argmax or a topk.
    """
    own = logits.gather(-1, labels[:, None])
    return (own >= logits.amax(-1, keepdim=True) if k == 1 else (logits > own).sum(-1, keepdim=True) < k).squeeze(-1)


class _KL(torch.autograd.Function):
    """sum_v a (log a - log b) per row, with two passes fewer over the vocabulary than autograd would make."""

    @staticmethod
    def forward(ctx: Any, log_a: Tensor, log_b: Tensor) -> Tensor:
        a = log_a.exp()
        # Where a is 0 the product is 0 times infinity at worst; its limit is 0.
        terms = (log_a - log_b).mul_(a).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        ctx.save_for_backward(a, terms if ctx.needs_input_grad[0] else None)
        return terms.sum(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, terms = ctx.saved_tensors
        for_log_a = (terms + a).mul_(gradient[:, None]) if ctx.needs_input_grad[0] else None
        for_log_b = a.mul(-gradient[:, None]) if ctx.needs_input_grad[1] else None
        return for_log_a, for_log_b


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q)."""
    return _KL.apply(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum_v q (log q - log p)."""
    return forward_kl(log_q, log_p)


def _mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight * a + (1 - weight) * b)"""
    if weight in (0.0, 1.0):
        return log_a if weight == 1.0 else log_b
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def js(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2."""
    log_m = _mixture(log_p, log_q, 0.5)
    return 0.5 * forward_kl(log_p, log_m) + 0.5 * forward_kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew * p + (1 - skew) * q)."""
    return forward_kl(log_p, _mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || (1 - skew) * p + skew * q)."""
    return forward_kl(log_q, _mixture(log_q, log_p, skew))


def adaptive_kl(log_p: Tensor, log_q: Tensor, head_mass: float = 0.5) -> Tensor:
    """(g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail), the weights without gradient.

    The gaps g sum |p - q| over the teacher's likely tokens (head) and the others: sorted ascending by p, the tail
    ends where the cumulated probability passes `head_mass`. Equal gaps where p = q.
    """
    with torch.no_grad():
        p, order = log_p.exp().sort(-1)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        tail = p.cumsum(-1) <= head_mass
        g_tail = gap.masked_fill(~tail, 0).sum(-1)
        g_head = gap.masked_fill(tail, 0).sum(-1)
        both = g_head + g_tail
        share = torch.where(both > 0, g_head / both.clamp_min(torch.finfo(both.dtype).tiny), 0.5)
    return share * forward_kl(log_p, log_q) + (1 - share) * reverse_kl(log_p, log_q)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1/2 sum_v |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
}


ATTENTION_BYTES = 16 * 2**20
"""Scores of one block of queries: what the memory of `attend` depends on."""


def attend(
    query: Tensor, keys: Tensor, values: Tensor, student: Side, teacher: Side, block_bytes: int = ATTENTION_BYTES
) -> tuple[Tensor, Tensor]:
    """Each query [N, A] attends to the keys [M, A] of its sequence: mixed values [N, width] and entropies [N], in nats.

    softmax(query . key / sqrt(A)), in float32 at least. Queries go in blocks whose scores are computed again on the
    way back, so that memory does not grow with N x M. A sequence without keys gives zeros. Entropies carry no gradient.
    """
    q, _ = pad_rows(query, student)
    k, mask = pad_rows(keys, teacher)
    v, _ = pad_rows(values, teacher)
    wide = torch.promote_types(k.dtype, torch.float32)
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
    return unpad_rows(mixed, student), unpad_rows(entropy, student)


def sequence_mean(values: Tensor, side: Side, mask: Tensor | None = None) -> Tensor:
    """The mean of per-row `values` [N] over each sequence's rows (those in `mask`), on every row [N]; 0 where none."""
    keep = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    kept = values if mask is None else torch.where(mask, values, torch.zeros_like(values))
    total = values.new_zeros(side.sequences).index_add(0, side.sample, kept)
    count = values.new_zeros(side.sequences).index_add(0, side.sample, keep)
    return (total / count.clamp_min(1))[side.sample]


def sequence_std(values: Tensor, side: Side) -> Tensor:
    """One unbiased standard deviation over all entries of a sequence's rows [N, width], on every row [N, 1]."""
    width = values.shape[-1]
    entries = width * values.new_zeros(side.sequences).index_add(0, side.sample, torch.ones_like(values[:, 0]))
    total = values.new_zeros(side.sequences).index_add(0, side.sample, values.sum(-1))
    mean = (total / entries.clamp_min(1))[side.sample]
    square = (values - mean[:, None]).square().sum(-1)
    variance = values.new_zeros(side.sequences).index_add(0, side.sample, square) / (entries - 1).clamp_min(1)
    return variance.sqrt()[side.sample][:, None]


__all__ = [
    "DIVERGENCES",
    "adaptive_kl",
    "attend",
    "cross_entropy",
    "forward_kl",
    "is_top",
    "js",
    "pad_rows",
    "places_within",
    "reverse_kl",
    "sequence_mean",
    "sequence_std",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "unpad_rows",
]
