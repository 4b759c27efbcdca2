"""What one micro-batch adds to the log, and how terms become one loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdzoo.step.batch import Per
from kdzoo.step.terms import Terms


@dataclass
class Report:
    """Terms already divided by their global counts, so that micro-batches and ranks just add up; watched values."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    """`<slot>/<term>` -> this micro-batch's share of the value."""
    watched: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """`<slot>/<name>` -> (total, count)."""

    def take(self, slot: str, terms: Terms, counts: Mapping[Per, float]) -> None:
        for name, (value, per) in terms.sums.items():
            key = f"{slot}/{name}"
            share = value.detach() / max(counts[per], 1.0)
            self.terms[key] = self.terms[key] + share if key in self.terms else share
        for name, (total, count) in terms.watched.items():
            key = f"{slot}/{name}"
            if key in self.watched:
                total, count = self.watched[key][0] + total, self.watched[key][1] + count
            self.watched[key] = (total, count)


def weighted_sum(terms: Terms, weight: float, counts: Mapping[Per, float]) -> Tensor | None:
    """sum of weight * value / count over the terms of one loss; None where it has none."""
    parts = [value * (weight / max(counts[per], 1.0)) for value, per in terms.sums.values()]
    return torch.stack(parts).sum() if parts else None
