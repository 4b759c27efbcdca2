"""What a loss hands back: named sums with the name of their denominator, and watched values."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kdzoo.api.batch import Reduction


@dataclass
class Terms:
    """Named terms of one loss. The core sums each, divides it by the global count that `per` names, and adds them up.

    Nothing here is synchronised with the host: a loss never calls `.item()`.
    """

    values: dict[str, tuple[Tensor, Reduction]] = field(default_factory=dict)
    """Name -> values of tokens, pairs or sequences [n], or their sum; and what the sum is divided by."""
    watched: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Name -> (total, count)."""

    def add(self, name: str, value: Tensor, per: Reduction = "tokens") -> Terms:
        """A term of the loss: values [n] (the core sums them, and weighs tokens), or a sum. Never a mean."""
        assert name not in self.values, f"term '{name}' was added twice"
        self.values[name] = (value, per)
        return self

    def watch(self, name: str, total: Tensor, count: Tensor | float) -> Terms:
        """A value that is logged as sum(total) / sum(count) over micro-batches and ranks; no gradient."""
        total = _sum(total.detach())
        self.watched[name] = (total, _sum(count.detach()) if isinstance(count, Tensor) else total.new_tensor(count))
        return self

    @property
    def sums(self) -> dict[str, tuple[Tensor, Reduction]]:
        """Every term as one number, not yet divided."""
        return {name: (_sum(value), per) for name, (value, per) in self.values.items()}


def _sum(value: Tensor) -> Tensor:
    return value.sum() if value.dim() else value
