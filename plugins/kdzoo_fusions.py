"""Expert fusions: what a mixture-of-experts teacher's block would say if all its experts were heard.

The ablation of the residual-learning paper compares the four. Shapes: n tokens, E experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kdzoo import Experts, Fusion, Register, hookimpl, ops


def mix(weights: Tensor, outputs: Tensor) -> Tensor:
    """sum_m w_m e_m of weights [n, E] and outputs [n, E, D], in float32 at least."""
    wide = ops.widened(outputs)
    return torch.einsum("ne,ned->nd", weights.to(wide.dtype), wide).to(outputs.dtype)


def attention(outputs: Tensor) -> Tensor:
    """alpha [n, E, E]: alpha_mj = softmax_j(e_m . e_j / sqrt(D))."""
    wide = ops.widened(outputs)
    return (wide @ wide.transpose(1, 2) / math.sqrt(outputs.shape[-1])).softmax(-1)


class ExpertAttention(Fusion):
    """The paper's: every expert attends to all; the router weighs what its chosen ones have gathered.

    fused = sum_{m in top-k} g_m sum_j alpha_mj e_j, g as the model itself uses it.
    """

    name = "expert_attention"

    def fuse(self, experts: Experts) -> Tensor:
        alpha = attention(experts.outputs)
        return mix((experts.weights.to(alpha.dtype)[:, None] @ alpha).squeeze(1), experts.outputs)

    def watch(self, experts: Experts) -> Mapping[str, Tensor]:
        """The mean of alpha_mm: near 1/E attention is the plain mean, near 1 the identity."""
        return {"self_attention": attention(experts.outputs).diagonal(dim1=1, dim2=2).mean(-1)}


class ExpertMean(Fusion):
    """The plain mean over all experts ("average pooling")."""

    name = "expert_mean"

    def fuse(self, experts: Experts) -> Tensor:
        return experts.outputs.mean(1)  # torch sums bf16 in float32


class ExpertRouterAll(Fusion):
    """All experts by the router's softmax over all of them ("8/8")."""

    name = "expert_router_all"

    def fuse(self, experts: Experts) -> Tensor:
        return mix(ops.widened(experts.logits).softmax(-1), experts.outputs)


class RouterWeighted(Fusion):
    """The routed experts by the model's own weights: its own output, computed once more ("sparse 2/8")."""

    name = "router_weighted"

    def fuse(self, experts: Experts) -> Tensor:
        return mix(experts.weights, experts.outputs)


@hookimpl
def register_plugins(register: Register) -> None:
    register(ExpertAttention)
    register(ExpertMean)
    register(ExpertRouterAll)
    register(RouterWeighted)
