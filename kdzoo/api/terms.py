"""What a loss hands back: named sums with the name of their denominator, and watched values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from kdzoo.api.batch import Reduction

Of = Reduction | Tensor
"""What values are of: tokens, pairs, ...; or [N] which of the values each of the student's tokens belongs to, -1 or
their number for none."""


class Term(NamedTuple):
    """One term of a loss."""

    value: Tensor
    """[n], or a sum."""
    per: Reduction
    """What the sum is divided by."""
    of: Of | None = None
    """What the values are of, where `per` or the visit does not say it."""


@dataclass
class Terms:
    """Named terms of one loss. The core sums each, divides it by the global count that `per` names, and adds them up.

    Nothing here is synchronised with the host: a loss never calls `.item()`.
    """

    values: dict[str, Term] = field(default_factory=dict)
    watched: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Name -> (total, count)."""

    def add(self, name: str, value: Tensor, per: Reduction = "tokens", of: Of | None = None) -> Terms:
        """A term of the loss: values [n], which the core weighs, sums and divides by the count that `per` names; or a
        sum, which cannot be weighed. Never a mean.

        In a visit, values are of the tokens that it sees. In `finish`, they are of what `per` names, unless `of` says
        what else they are of.
        """
        assert name not in self.values, f"term '{name}' was added twice"
        self.values[name] = Term(value, per, of)
        return self

    def watch(self, name: str, total: Tensor, count: Tensor | float) -> Terms:
        """A value that is logged as sum(total) / sum(count) over micro-batches and ranks; no gradient."""
        total = _sum(total.detach())
        self.watched[name] = (total, _sum(count.detach()) if isinstance(count, Tensor) else total.new_tensor(count))
        return self

    @property
    def sums(self) -> dict[str, tuple[Tensor, Reduction]]:
        """Every term as one number, not yet divided."""
        return {name: (_sum(term.value), term.per) for name, term in self.values.items()}


def _sum(value: Tensor) -> Tensor:
    return value.sum() if value.dim() else value
