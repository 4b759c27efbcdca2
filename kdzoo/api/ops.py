"""Mathematics on tokens that more than one method uses. Plugins see this as `kdzoo.ops`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdzoo.api.batch import Side
from kdzoo.api.blocks import Block, BlockParams
from kdzoo.api.divergences import (
    DIVERGENCES,
    INFINITE_RATIO,
    Closed,
    DivergenceName,
    DivergenceParams,
    adaptive_kl,
    alpha_beta,
    closed_form,
    forward_kl,
    hellinger,
    js,
    log_ratio,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    smallest,
    top_k_and_rest,
    total_variation,
)
from kdzoo.api.entries import entries_by_student, first_sources, linked_entries, shared_entries
from kdzoo.api.relations import (
    Relation,
    RelationDistance,
    attention_of,
    means_of_sequences,
    relation_distance,
    relation_of,
)
from kdzoo.api.selection import VerdictParams, among_largest, ranks_within
from kdzoo.api.spans import Spans, by_text, groups_by_position, groups_by_text, is_followed, mean_by
from kdzoo.api.states import best_linear, linear_cka, regression_sums
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
    deviation = (square / (count - 1).clamp_min(1)).clamp_min(smallest(logits)).sqrt()
    return (logits / (temperature * (deviation + epsilon))).masked_fill(excluded, -math.inf)


def sinkhorn(p: Tensor, q: Tensor, in_p: Tensor, in_q: Tensor, regularisation: float, iterations: int) -> Tensor:
    """<P, W> per sequence [B]: W the L1 distances between p [B, n, K] and q [B, m, K], P their kernel, scaled.

    Rows, then columns, are scaled to sums of 1, again and again; `in_p` [B, n] and `in_q` [B, m] say which there are.
    Only the factors change, so that the way back keeps vectors of every iteration and no matrix.
    """
    cost = torch.cdist(p, q, p=1.0)
    kernel = torch.exp(-cost / regularisation) * (in_p[:, :, None] & in_q[:, None, :])
    tiny = smallest(kernel)
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
    "Block",
    "BlockParams",
    "Closed",
    "DivergenceName",
    "DivergenceParams",
    "LikelihoodDifference",
    "Relation",
    "RelationDistance",
    "Spans",
    "VerdictParams",
    "adaptive_kl",
    "alpha_beta",
    "among_largest",
    "at_least_float32",
    "attend",
    "attention_of",
    "best_linear",
    "by_text",
    "closed_form",
    "cross_entropy",
    "entries_by_student",
    "first_sources",
    "forward_kl",
    "gram_inverse",
    "greedy_match",
    "groups_by_position",
    "groups_by_text",
    "hellinger",
    "is_followed",
    "is_top",
    "js",
    "linear_cka",
    "linked_entries",
    "log_ratio",
    "mean_by",
    "means_of_sequences",
    "pad_tokens",
    "places_within",
    "product_of_heads",
    "projector_between_heads",
    "ranks_within",
    "regression_sums",
    "relation_distance",
    "relation_of",
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
