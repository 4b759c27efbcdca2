"""The gradients of the vocabulary pass: made chunk by chunk, handed to autograd when it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdzoo.api.chunk import Index
from kdzoo.api.head import Head
from kdzoo.api.models import Role
from kdzoo.api.ops import at_least_float32


@dataclass(frozen=True)
class HeadInput:
    """Hidden states on their way to a head."""

    hidden: Tensor  # [n, width]
    labels: Tensor  # [n]
    axis: str
    """"student", "teacher", or the stream's own name."""
    head: Role
    learns_head: bool
    group: Tensor | None = None  # [n]
    values: Mapping[str, Tensor] = field(default_factory=dict)  # [n, ...]
    tokens: Tensor | None = None  # [n]

    @property
    def trains(self) -> bool:
        return torch.is_grad_enabled() and (self.learns_head or self.hidden.requires_grad)


class Gradients:
    """Gradients of states and heads, summed over chunks; the head's in float32 whatever the model's dtype."""

    def __init__(self, streams: Mapping[str, HeadInput], heads: Mapping[Role, Head]) -> None:
        self._streams = streams
        self._heads = heads
        self.hidden: dict[str, Tensor] = {}
        self.weight: dict[Role, Tensor] = {}
        self.bias: dict[Role, Tensor] = {}

    def add(self, name: str, at: Index, product: Tensor) -> None:
        """`product` [n, V]: the gradient of the stream's states `at` [n, width] times the head's transpose."""
        stream = self._streams[name]
        head = self._heads[stream.head]
        if stream.hidden.requires_grad:
            if name not in self.hidden:
                self.hidden[name] = torch.zeros_like(stream.hidden)
            # Added, not set: tokens that a pair holds may have been walked alone before.
            self.hidden[name][at] += product @ head.rows.detach()
        if stream.learns_head:
            states = stream.hidden.detach()[at]
            if stream.head not in self.weight:
                self.weight[stream.head] = (product.t() @ states).to(at_least_float32(head.weight.dtype))
            elif product.dtype == self.weight[stream.head].dtype:
                self.weight[stream.head].addmm_(product.t(), states)
            else:
                self.weight[stream.head].add_(product.t() @ states)

    def add_bias(self, head: Role, gradient: Tensor) -> None:
        self.bias[head] = self.bias[head] + gradient if head in self.bias else gradient

    def of(self, streams: Iterable[str], heads: Iterable[Role]) -> list[Tensor | None]:
        """States in the order of `streams`, then weight and bias of each head."""
        found: list[Tensor | None] = [self.hidden.get(name) for name in streams]
        for name in heads:
            head = self._heads[name]
            weight = self.weight.get(name)
            found.append(None if weight is None else head.padded(weight.to(head.weight.dtype)))
            if head.bias is not None:
                bias = self.bias.get(name)
                found.append(None if bias is None else head.padded(bias.to(head.bias.dtype)))
        return found


class PrecomputedGradient(torch.autograd.Function):
    """A loss whose gradients are already there."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *_leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradient.device.type == "cpu" and gradient.item() == 1.0:
            return (None, None, *gradients)
        # In place: a copy of a head's gradient would double the pass's peak.
        return (None, None, *(None if g is None else g.mul_(gradient) for g in gradients))


class Recomputed(torch.autograd.Function):
    """Values of tokens whose chunks are computed again on the way back."""

    @staticmethod
    def forward(
        ctx: Any, recompute: Callable[[Sequence[Tensor]], list[Tensor | None]], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """The first `count` tensors are the values; the others receive the gradients that `recompute` returns."""
        ctx.recompute, ctx.count = recompute, count
        return tuple(value.clone() for value in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *([None] * ctx.count), *ctx.recompute(gradients))
