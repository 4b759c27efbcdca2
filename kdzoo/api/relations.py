"""Relations between the positions of a sequence: rows of scores, compared between two models. Part of `kdzoo.ops`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdzoo.api.batch import Side
from kdzoo.api.models import Heads
from kdzoo.api.spans import mean_by
from kdzoo.api.view import pad_tokens, unpad_tokens

RelationDistance = Literal["kl", "mse", "mse_of_softmax"]

RELATION_BYTES = 16 * 2**20
"""Scores of both models in one block of rows: what the memory of `relation_distance` depends on."""


class Relation(NamedTuple):
    """What scores are the products of, head by head."""

    query: Tensor  # [B * T, R, d], scaled
    key: Tensor  # [B * T, R, d]


def relation_of(x: Tensor, of: Heads, heads: int) -> Relation:
    """The vectors x [B * T, width] of all heads side by side, split anew into `heads`, each with each, over sqrt(d).

    Where x has the heads of keys and values, each stands there once for every query head of its group.
    """
    if x.shape[-1] != of.width:
        x = x.unflatten(-1, (of.key_value, of.size)).repeat_interleave(of.query // of.key_value, -2).flatten(-2)
    split = x.unflatten(-1, (heads, of.width // heads))
    return Relation(split * split.shape[-1] ** -0.5, split)


def attention_of(query: Tensor, key: Tensor, of: Heads) -> Relation:
    """Of the sites `attention_query` and `attention_key` [B * T, width], head by head."""
    return Relation(*(x.unflatten(-1, (of.query, of.size)) for x in (query, key)))


def means_of_sequences(values: Tensor, rows: Side, scored: Side) -> Tensor:
    """The mean of values [n] of `rows` over each sequence [B]; 0 where it has no token that is scored."""
    means = mean_by(values, rows.sample, rows.sequences)
    return means * torch.zeros_like(means).index_fill(0, scored.sample, 1)


def relation_distance(
    student: Relation,
    teacher: Relation,
    rows: Side,
    distance: RelationDistance,
    *,
    causal: bool,
    block_bytes: int = RELATION_BYTES,
) -> Tensor:
    """How far the scores of each of `rows` are apart in two models of one tokenizer, as the mean over R heads [n].

    A row holds the scores of its position against all real ones of its sequence; if `causal`, of those up to its own.
    "kl": KL(teacher's softmax || student's). "mse": the mean of squared differences of scores over the row,
    "mse_of_softmax": of their softmaxes. In float32 at least. Rows go in blocks whose scores are computed again on the
    way back, so that memory does not grow with the square of a sequence.
    """
    real = rows.attention_mask.bool()
    b, t = real.shape
    q_s, mask = pad_tokens(student.query[rows.positions], rows)  # [B, n, R, d]
    q_t, _ = pad_tokens(teacher.query[rows.positions], rows)
    place, _ = pad_tokens(rows.positions % t, rows)  # [B, n]
    k_s, k_t = (side.key.unflatten(0, (b, t)) for side in (student, teacher))
    wide = torch.promote_types(q_s.dtype, torch.float32)
    at = torch.arange(t, device=place.device)

    def block(q_s: Tensor, q_t: Tensor, place: Tensor, k_s: Tensor, k_t: Tensor) -> Tensor:
        seen = real[:, None] & (at <= place[:, :, None]) if causal else real[:, None].expand(-1, place.shape[1], -1)
        # Products in half precision would round scores, and so gradients, far more than their vectors are rounded.
        ours, theirs = (torch.einsum("bnrd,btrd->brnt", q.to(wide), k.to(wide)) for q, k in ((q_s, k_s), (q_t, k_t)))
        return _distance(ours, theirs, seen[:, None], distance).mean(1)

    size = max(1, block_bytes // max(1, 2 * b * t * q_s.shape[2] * wide.itemsize))
    if size >= mask.shape[1]:
        return unpad_tokens(block(q_s, q_t, place, k_s, k_t), rows)
    parts = zip(*(x.split(size, dim=1) for x in (q_s, q_t, place)), strict=True)
    found = [checkpoint(block, *part, k_s, k_t, use_reentrant=False) for part in parts]
    return unpad_tokens(torch.cat(found, dim=1), rows)


def _distance(ours: Tensor, theirs: Tensor, seen: Tensor, distance: RelationDistance) -> Tensor:
    """Of scores [B, R, n, T], over those that are `seen` [B, 1, n, T]: [B, R, n]."""
    if distance == "mse":
        error = ours - theirs
    else:
        least = torch.finfo(ours.dtype).min
        log_q, log_p = (scores.masked_fill(~seen, least).log_softmax(-1) for scores in (ours, theirs))
        if distance == "kl":
            value = (log_p.exp() * (log_p - log_q)).masked_fill(~seen, 0).sum(-1)
            return value - value.detach().clamp_max(0)  # below 0 is rounding
        error = log_q.exp() - log_p.exp()
    return error.square().masked_fill(~seen, 0).sum(-1) / seen.sum(-1).clamp_min(1)
