"""Tokens of two models put together by the text that they cover, or by their place. Part of `kdzoo.ops`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdzoo.api.batch import Side
from kdzoo.api.view import places_within

Skips = tuple[bool, bool]
"""Whether the last token of every sequence is left out, of the student's and of the teacher's."""


def mean_by(values: Tensor, index: Tensor, count: int, otherwise: float = 0.0) -> Tensor:
    """Means [count, ...] of `values` [n, ...] by `index` [n], and `otherwise` where nothing is.

    -1, and what is not below `count`, is no place.
    """
    place = torch.where((index < 0) | (index >= count), count, index)
    total = values.new_zeros((count + 1, *values.shape[1:])).index_add(0, place, values)[:count]
    number = place.bincount(minlength=count + 1)[:count].to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    return torch.where(number > 0, total / number.clamp_min(1), otherwise)


def is_followed(side: Side) -> Tensor:
    """Whether another token of its sequence comes after each token [N] bool: all but the last."""
    followed = torch.zeros_like(side.sample, dtype=torch.bool)
    followed[:-1] = side.sample[1:] == side.sample[:-1]
    return followed


def groups_by_position(student: Side, teacher: Side, skips: Skips) -> tuple[Tensor, Tensor]:
    """The group of each token [N] and [M], -1 for none: place k of a sequence, as far as both sides go."""
    sides = (student, teacher)
    lengths = [s.sample.bincount(minlength=s.sequences) - int(skip) for s, skip in zip(sides, skips, strict=True)]
    n = torch.minimum(*lengths).clamp_min(0)  # [B]
    before = n.cumsum(0) - n
    places = [places_within(side) for side in sides]
    mine, theirs = (
        torch.where(place < n[side.sample], before[side.sample] + place, -1)
        for side, place in zip(sides, places, strict=True)
    )
    return mine, theirs


def groups_by_text(student: Side, teacher: Side, skips: Skips) -> tuple[Tensor, Tensor]:
    """The group of each token [N] and [M], -1 for none: aligned spans with tokens on both sides, none left out."""
    none = student.span.new_full((1,), -1)
    spans = 1 + int(torch.cat([student.span, teacher.span, none]).max())
    whole = torch.ones(spans + 1, dtype=torch.bool, device=none.device)
    for side, skip in zip((student, teacher), skips, strict=True):
        whole &= torch.zeros_like(whole).index_fill(0, side.span, True)
        if skip:
            whole[side.span[~is_followed(side)]] = False
    whole[-1] = False  # the place of tokens without a span
    group = torch.where(whole, whole.cumsum(0) - 1, -1)
    return group[student.span], group[teacher.span]


@dataclass(frozen=True)
class Spans:
    """Aligned spans of a batch, each at one of K places; what has tokens on one side alone is none."""

    of: Mapping[str, Tensor]  # by model [n]: the place of each token's span; K for none
    held: Tensor  # [K] bool: where a span is

    @classmethod
    def aligned(cls, sides: Mapping[str, Side]) -> Spans:
        """Those of the aligner."""
        # Every span has a token: a bound on their number, so that no device is waited for.
        places = max(side.input_ids.numel() for side in sides.values())
        held = sides["teacher"].span.new_ones(places + 1, dtype=torch.bool)
        for side in sides.values():
            present = torch.zeros_like(held)
            present[side.span] = True
            held &= present
        held[-1] = False  # a span of -1 is none
        of = {model: torch.where(held[side.span], side.span, places) for model, side in sides.items()}
        return cls(of, held[:-1])

    def sum(self, model: str, values: Tensor) -> Tensor:
        """Values of tokens [n], added up over each span [K]."""
        return values.new_zeros(len(self.held) + 1).index_add(0, self.of[model], values)[:-1]

    def mean(self, model: str, values: Tensor) -> Tensor:
        """The mean over each span's tokens [K, ...] of values [n, ...]; 0 without a span."""
        return mean_by(values, self.of[model], len(self.held))

    def last(self, model: str, values: Tensor) -> Tensor:
        """The value [n] of each span's last token [K]; 0 without a span."""
        of = self.of[model]
        token = torch.arange(len(of), device=of.device)
        token = of.new_full((len(self.held) + 1,), -1).scatter_reduce(0, of, token, "amax")[:-1]
        return torch.cat([values, values.new_zeros(1)])[token]

    def joined(self, closes: Tensor, sample: Tensor) -> Spans:
        """Spans up to one that `closes` [K], or a sequence's last, as one at its place. `sample` is the teacher's."""
        places = len(self.held)
        place = torch.arange(places, device=closes.device)
        sequence = self.last("teacher", sample)
        ends = torch.zeros_like(place).scatter_reduce(0, sequence, torch.where(self.held, place, 0), "amax")
        final = self.held & (closes | (place == ends[sequence]))
        to = torch.where(final, place, places).flip(0).cummin(0).values.flip(0)
        to = torch.cat([to, to.new_full((1,), places)])
        return Spans({model: to[of] for model, of in self.of.items()}, final)


def by_text(student: Side, teacher: Side, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values x [N, ...] of the student's tokens and y [M, ...] of the teacher's where both say the same text.

    Means over the tokens of each aligned span [K, ...], and the span's sequence [K], -1 where there is no span.
    """
    spans = Spans.aligned({"student": student, "teacher": teacher})
    sample = torch.where(spans.held, spans.last("teacher", teacher.sample), -1)
    return spans.mean("student", x), spans.mean("teacher", y), sample
