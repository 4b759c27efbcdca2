"""Weights of losses that follow their gradients at the student's last state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

How = Literal["gradient", "pcgrad"]


class Balance(nn.Module):
    """What the weights of losses are multiplied with, from measurement to measurement.

    "gradient" (GradMag; Minixhofer et al., NeurIPS 2025, arxiv.org/abs/2503.20083): so that each loss's gradient at the
    student's last state has a norm in proportion to the loss's weight, and the weights keep their sum.

    "pcgrad" (Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arxiv.org/abs/2001.06782): what a
    gradient has against another is taken off it. The sum of such gradients is a weighted sum of the gradients as they
    are, so that it is a matter of weights, too. (Each meets the others in the order of the recipe; the paper's is
    random.)

    A loss that never reaches the last state keeps its weight. Factors are buffers, so that a checkpoint has them.
    """

    factors: Tensor
    """[slots]"""

    def __init__(self, slots: Sequence[str], how: How) -> None:
        super().__init__()
        self.slots = tuple(slots)
        self.how = how
        self.register_buffer("factors", torch.ones(len(self.slots), dtype=torch.float64))

    def weights(self, given: Mapping[str, float]) -> dict[str, float]:
        """The weights of this step, from the recipe's."""
        factors = dict(zip(self.slots, self.factors.tolist(), strict=True))
        return {slot: weight * factors[slot] for slot, weight in given.items()}

    def measured(self, given: Mapping[str, float], products: Mapping[tuple[str, str], float]) -> None:
        """New factors. `products`: of the gradients of weighted losses in a step that has just been taken, over all
        ranks and micro-batches; of a pair in either order. `given`: the recipe's weights at that step."""
        gram = torch.tensor([[products.get((a, b), products.get((b, a), 0.0)) for b in self.slots] for a in self.slots])
        used = torch.tensor([given[slot] for slot in self.slots], dtype=torch.float64).abs() * self.factors.cpu()
        reached = gram.diagonal() > 0
        if not reached.any():
            return
        factors = torch.ones_like(used)
        if self.how == "gradient":
            norms = gram.diagonal().double().sqrt()[reached] / used[reached]  # of gradients that are not weighted
            wanted = torch.tensor([given[slot] for slot in self.slots], dtype=torch.float64)[reached]
            weights = wanted / norms
            factors[reached] = weights * wanted.sum() / weights.sum() / wanted
        else:
            scale = self.factors.cpu()  # of the gradients as the recipe weighs them
            factors[reached] = surgery((gram.double() / scale[:, None] / scale)[reached][:, reached])
        self.factors.copy_(factors)


def surgery(gram: Tensor) -> Tensor:
    """How often each of n vectors is in the sum of all of them, each without what it has against the others [n].

    `gram` [n, n]: their products.
    """
    n = len(gram)
    total = torch.zeros(n, dtype=gram.dtype)
    for i in range(n):
        kept = torch.zeros(n, dtype=gram.dtype)  # g_i as a weighted sum of all vectors
        kept[i] = 1
        for j in range(n):
            against = kept @ gram[j]
            if j != i and against < 0:
                kept[j] -= against / gram[j, j]
        total += kept
    return total
