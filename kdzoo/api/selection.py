"""Which tokens count: the largest by some score, or those that the teacher gets wrong. Part of `kdzoo.ops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor

from kdzoo.api.batch import Side
from kdzoo.api.plugin import Params


class VerdictParams(Params):
    """When the teacher is right about a token, for the parameters of a method that asks."""

    temperature: float = Field(1.0, gt=0)
    """Divides the teacher's logits for the probability of the soft indicator."""
    top_k: int = Field(1, ge=1)
    """The teacher is right where the gold token is among its k likeliest."""

    @property
    def verdict(self) -> str:
        """The fact that says where the teacher is right."""
        return "teacher.correct" if self.top_k == 1 else f"teacher.correct@{self.top_k}"

    @property
    def gold_logprob(self) -> str:
        """The fact that a soft indicator is made from."""
        return "teacher.label_logprob" if self.temperature == 1 else f"teacher.label_logprob@{self.temperature}"

    def doubt(self, facts: Mapping[str, Tensor], soft: bool) -> Tensor:
        """How wrong the teacher is about each token [N]: 1 or 0, or one less its probability of the gold token."""
        return -facts[self.gold_logprob].expm1() if soft else (~facts[self.verdict]).float()


def among_largest(
    scores: Tensor, everything: Tensor, share: float, rounded: Callable[[Tensor], Tensor] = torch.ceil
) -> Tensor:
    """Which of `scores` [n] are among the `share` largest of `everything` [N], at least one of them [n] bool.

    As large as the smallest of these counts as in.
    """
    count = len(everything)
    if not count:
        return torch.ones_like(scores, dtype=torch.bool)
    wanted = int(rounded(torch.tensor(count * share, dtype=torch.float64)))
    return scores >= everything.topk(min(max(wanted, 1), count)).values[-1]


def ranks_within(scores: Tensor, side: Side) -> Tensor:
    """The rank of each token among those of its sequence, the largest score first, from 0 [N]; the first of ties is
    first."""
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[side.sample[by_score].argsort(stable=True)]
    count = torch.bincount(side.sample, minlength=side.sequences)
    first = count.cumsum(0) - count
    places = torch.arange(len(order), device=order.device) - first[side.sample[order]]
    return torch.empty_like(order).index_copy_(0, order, places)
