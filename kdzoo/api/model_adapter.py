"""A kind of plugin: where a model family keeps its parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kdzoo.api.head import Head
from kdzoo.api.models import Heads
from kdzoo.api.plugin import Plugin, is_text


@dataclass(frozen=True)
class Mixture:
    """The parts of a block that mixes experts. A pass calls each of its modules once, the router before the experts."""

    block: nn.Module
    """Takes [B, T, D]: what router and experts read."""
    norm: nn.Module
    """The norm before it; its input is the residual stream that the block's output is added to."""
    router: nn.Module
    """[n, D] -> logits [n, E], weights of the routed experts [n, K], and which they are [n, K]."""
    experts: nn.Module
    """[n, D], which [n, K], weights [n, K] -> their weighted sum [n, D]."""
    shared: Callable[[Tensor], Tensor] | None = None
    """[n, D] -> [n, D]: what the block adds whatever the router says."""


@dataclass(frozen=True)
class Projection:
    """A linear module that makes queries, keys or values [B, T, width] of states; or all of them, side by side."""

    module: nn.Module
    start: int = 0
    stop: int | None = None
    """Which of its outputs: all, by default."""

    def of(self, output: Tensor) -> Tensor:
        """Its part of what the module returns."""
        return output[..., self.start : self.stop]


@dataclass(frozen=True)
class Attention:
    """The parts of a block's self-attention."""

    module: nn.Module
    """Calls the attention function of Transformers, with queries and keys as they are compared."""
    query: Projection
    key: Projection
    value: Projection
    heads: Heads


class ModelAdapter(Plugin):
    """Where a model family keeps its parts. One instance serves every model of the family; no model is rewritten."""

    kind = "model_adapter"
    texts = ()
    families: ClassVar[tuple[str, ...]] = ()
    """The `model_type`s of Hugging Face configurations that it covers."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return cls.families

    @classmethod
    def declared_fault(cls) -> str | None:
        if not (cls.families and isinstance(cls.families, tuple) and all(map(is_text, cls.families))):
            return "has no 'families'; give it a tuple of strings"
        return None

    @abstractmethod
    def backbone(self, model: nn.Module) -> nn.Module:
        """The model without its head; its `last_hidden_state` is what the head reads (`hidden.last`)."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The transformer blocks; `hidden.<k>` is the output of block k."""

    @abstractmethod
    def embedding(self, model: nn.Module) -> nn.Module:
        """The input embedding module."""

    def embed_scale(self, model: nn.Module) -> float:
        """The factor that the embedding module multiplies its table with."""
        return 1.0

    @abstractmethod
    def head(self, model: nn.Module) -> Head:
        """The output head: weight, bias, scale and soft cap as the family has them."""

    def experts(self, config: Any) -> int:
        """How many experts a block of a model with this configuration has; 0 where it is no mixture."""
        return 0

    def mixture(self, model: nn.Module, block: int) -> Mixture | None:
        """The experts of block `block`, counted from 0; None where it is dense."""
        return None

    def attention(self, model: nn.Module, block: int) -> Attention | None:
        """The attention of block `block`, counted from 0; None: losses that read it are refused for this family."""
        return None

    @abstractmethod
    def norm(self, model: nn.Module) -> nn.Module:
        """The norm after the last block, whose output the head reads."""

    @abstractmethod
    def block_prefix(self) -> str:
        """The name of the blocks in a state dict, with a trailing dot (`model.layers.`)."""

    @abstractmethod
    def cut_config(self, config: Any, layers: Sequence[int]) -> Any:
        """A copy of a configuration that keeps only these blocks, in this order."""
