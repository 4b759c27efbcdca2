"""One micro-batch as one loss sees it: the only argument of a loss's methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from kdzoo.api.batch import Batch
from kdzoo.api.terms import Terms
from kdzoo.api.view import View

if TYPE_CHECKING:
    from kdzoo.api.loss import Stream

RanksFirst = Callable[[Tensor, Tensor], Tensor]
"""Whether the student's head puts each gold token [n] first, from states [n, S]: [n] bool, without gradient."""


@dataclass
class Step:
    """What is known grows with the step: views first, then streams and facts, then values."""

    batch: Batch
    student: View
    teacher: View
    """Without gradient."""
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    """The teacher's facts that the loss declares, on student tokens [N] where there is a student."""
    streams: Mapping[str, Stream] = field(default_factory=dict)
    """What `streams` returned; there in `finish`."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """What scans added up over each sequence [B, ...]; there in `scan`."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """What visits of kind "tokens" returned, `<visit>.<name>`, of all tokens; there in `finish`."""
    student_ranks_first: RanksFirst | None = None
    """For `carry_facts`: what the student's head says of states that the loss makes."""
    watched: Terms = field(default_factory=Terms)

    def watch(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """A value that is logged as sum(total) / sum(count) over micro-batches and ranks; no gradient."""
        self.watched.watch(name, total, count)
