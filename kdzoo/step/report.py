"""What one micro-batch adds to the log, and how terms become one loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from kdzoo.api.batch import Reduction

Sums = Mapping[str, tuple[Tensor, Reduction]]
"""Term -> its sum, and what it is divided by."""

Counts = Mapping[Reduction, float]


@dataclass
class Report:
    """Terms already divided by their global counts, so that micro-batches and ranks just add up; watched values."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    """`<slot>/<term>` -> this micro-batch's share of the value."""
    watched: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """`<slot>/<name>` -> (total, count)."""

    products: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """Two slots -> this micro-batch's part of the product of their gradients: those of their weighted terms, for the
    student's last states. Of a slot with itself, of the squared norm."""
    _apart: dict[str, Tensor] = field(default_factory=dict)
    _scale: Tensor | None = None

    def take(self, slot: str, sums: Sums, watched: Mapping[str, tuple[Tensor, Tensor]], counts: Counts) -> None:
        for name, (value, per) in sums.items():
            key = f"{slot}/{name}"
            share = value.detach() / (counts[per] or 1.0)
            self.terms[key] = self.terms[key] + share if key in self.terms else share
        for name, (total, count) in watched.items():
            self._add_watched(f"{slot}/{name}", total, count)

    def watch(self, key: str, values: Tensor) -> None:
        """Values of tokens, by their mean."""
        self._add_watched(key, values.sum(), torch.tensor(float(len(values)), device=values.device))

    def _add_watched(self, key: str, total: Tensor, count: Tensor) -> None:
        if key in self.watched:
            total, count = self.watched[key][0] + total, self.watched[key][1] + count
        self.watched[key] = (total, count)

    # A slot's gradient at the student's last state has two parts: from the student's own tokens, which the pass makes
    # chunk by chunk, and from what the slot computes of the state itself, which arrives with the backward pass.

    def gradient_of(self, slot: str, state: Tensor) -> Tensor:
        """What is known so far of the slot's gradient at `state`, to be added to."""
        if slot not in self._apart:
            self._apart[slot] = torch.zeros_like(state, requires_grad=False)
        return self._apart[slot]

    @property
    def scale(self) -> Tensor:
        """What the engine has multiplied the loss with before the backward pass that is under way."""
        assert self._scale is not None
        return self._scale

    def listen(self, slot: str, state: Tensor, positions: Tensor | None = None) -> Tensor:
        """The same state, of which what comes back (at these `positions` of it) is kept as this slot's."""
        if not (state.requires_grad and torch.is_grad_enabled()):
            return state
        alias = state.view_as(state)
        alias.register_hook(lambda gradient: self._hear(slot, gradient if positions is None else gradient[positions]))
        return alias

    def _hear(self, slot: str, gradient: Tensor) -> None:
        self.gradient_of(slot, gradient).add_(gradient / self.scale)

    def listen_to_scale(self, loss: Tensor) -> None:
        if loss.requires_grad:
            loss.register_hook(self._keep_scale)

    def _keep_scale(self, gradient: Tensor) -> None:
        self._scale = gradient.detach()

    def close_gradients(self, slots: Iterable[str]) -> None:
        """After the backward pass of a micro-batch."""
        found = {slot: self._apart.get(slot) for slot in slots}
        for one, other in combinations_with_replacement(found, 2):
            mine, yours = found[one], found[other]
            product = torch.zeros((), dtype=torch.float64)
            if mine is not None and yours is not None:
                product = (mine.double() * yours.double()).sum()
            pair = (one, other)
            self.products[pair] = self.products[pair] + product if pair in self.products else product
        self._apart.clear()


def weighted_sum(sums: Sums, weight: float, counts: Counts) -> Tensor | None:
    """sum of weight * value / count over the terms of one loss; None where it has none."""
    parts = [value * (weight / (counts[per] or 1.0)) for value, per in sums.values()]
    return torch.stack(parts).sum() if parts else None
