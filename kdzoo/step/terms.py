"""What a loss hands back: named sums with the name of their denominator, and watched values."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kdzoo.step.batch import Per


@dataclass
class Terms:
    """Named sums of one loss. The core divides each by the global count that `per` names and adds them up.

    Nothing here is synchronised with the host: a loss never calls `.item()`.
    """

    sums: dict[str, tuple[Tensor, Per]] = field(default_factory=dict)
    watched: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, per: Per = "rows") -> Terms:
        """A term of the loss: `value` is a scalar sum over rows, pairs or sequences, not yet divided."""
        assert name not in self.sums, f"term '{name}' was added twice"
        self.sums[name] = (value, per)
        return self

    def watch(self, name: str, total: Tensor, count: Tensor | float) -> Terms:
        """A value that is logged as sum(total) / sum(count) over micro-batches and ranks; no gradient."""
        total = total.detach()
        self.watched[name] = (total, total.new_tensor(count) if isinstance(count, float | int) else count.detach())
        return self
