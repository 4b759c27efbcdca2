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
    student's last state has a norm in proportion to the size of the loss's weight, and these keep their sum.

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
        found = [[products.get((a, b), products.get((b, a), 0.0)) for b in self.slots] for a in self.slots]
        gram = torch.tensor(found, dtype=torch.float64)  # squares, which float32 may have none of
        wanted = torch.tensor([given[slot] for slot in self.slots], dtype=torch.float64).abs()
        scale = self.factors.cpu()
        reached = gram.diagonal() > 0
        if not reached.any():
            return
        gram, wanted, scale = gram[reached][:, reached], wanted[reached], scale[reached]
        as_given = gram / scale[:, None] / scale  # of the gradients as the recipe weighs them
        factors = torch.ones_like(self.factors, device="cpu")
        if self.how == "gradient":
            per_norm = wanted / as_given.diagonal().sqrt()  # of gradients that are not weighted
            factors[reached] = per_norm * wanted.sum() / (wanted * per_norm).sum()
        else:
            factors[reached] = surgery(as_given)
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
