"""An output head: the product of states with a vocabulary, and what a family does to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEAD_WEIGHT = "head.weight"
"""The site that is no part of a forward pass: `streams` may read it, inside the vocabulary pass."""


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * (h W^T + b) / cap); no cap, no bias and scale 1 for most families.

    `weight` [V, S] and `bias` [V] are the model's own parameters, which may be partitioned outside the pass.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    entries: int | None = None
    """How many of its V rows are entries of the tokenizer, where the others are padding that must not count."""

    @property
    def rows(self) -> Tensor:
        """The rows of `weight` that count; where it is whole."""
        return self.weight if self.entries is None else self.weight[: self.entries]

    @property
    def biases(self) -> Tensor | None:
        """Those of `rows`."""
        return self.bias if self.bias is None or self.entries is None else self.bias[: self.entries]

    def padded(self, gradient: Tensor) -> Tensor:
        """A gradient of `rows`, or of `biases`, as one of the whole parameter."""
        if self.entries is None:
            return gradient
        whole = gradient.new_zeros((self.weight.shape[0], *gradient.shape[1:]))
        whole[: self.entries] = gradient
        return whole

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def finish(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """`h W^T` [n, V] in the model's dtype to logits in at least float32."""
        logits = product if product.dtype == torch.float64 else product.float()
        if bias is not None:
            logits = logits + bias
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits
