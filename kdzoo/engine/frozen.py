"""A model that only runs: the teacher, or any model under evaluation. Never gathered whole where it is sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdzoo.api.batch import Side
from kdzoo.api.fusion import Fusion
from kdzoo.api.head import Head
from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.api.models import ModelInfo
from kdzoo.engine.close import close_engine
from kdzoo.engine.config import zero_stage
from kdzoo.engine.deepspeed_private import is_partitioned, whole_shape
from kdzoo.engine.loading import load_model
from kdzoo.lora import add_adapter
from kdzoo.step.capture import NO_FUSIONS, capture


class _Sites(nn.Module):
    """The model with its captured sites as its output, so that one engine call is one forward pass."""

    def __init__(self, model: nn.Module, model_adapter: ModelAdapter, fusions: Mapping[str, Fusion]) -> None:
        super().__init__()
        self.model = model
        self._model_adapter = model_adapter
        self._fusions = fusions

    def forward(self, *, side: Side, sites: Iterable[str]) -> dict[str, Tensor]:
        return capture(self.model, self._model_adapter, side, sites, self._fusions)


class FrozenModel:
    """A causal language model without gradients, in an engine of its own if `config` shards parameters.

    `adapter`: a folder of LoRA weights that are not merged into its own.
    """

    def __init__(
        self,
        folder: Path,
        model_adapters: Mapping[str, ModelAdapter],
        precision: str,
        config: dict[str, Any],
        device: torch.device,
        fusions: Mapping[str, Fusion] = NO_FUSIONS,
        adapter: Path | None = None,
    ) -> None:
        self.model = load_model(folder, precision, config, device)
        self.model_adapter = model_adapters[self.model.config.model_type]
        self.head: Head = self.model_adapter.head(self.model)
        if adapter is not None:
            self.model = add_adapter(self.model, self.model_adapter, adapter, f"model {folder}")
        self.model.requires_grad_(False).eval()
        self.info = model_info(self.model, self.model_adapter)
        self.device = device
        self.partitioned = zero_stage(config) == 3
        self._call: Any = _Sites(self.model, self.model_adapter, fusions)
        if self.partitioned:
            self._call = deepspeed.initialize(model=self._call, config=config)[0]
            self._call.eval()

    @torch.no_grad()
    def sites(self, side: Side, sites: Iterable[str]) -> dict[str, Tensor]:
        """The wanted sites, packed to the rows of `side`."""
        return self._call(side=side, sites=tuple(sites))

    def close(self) -> None:
        """Let go of hooks and weights."""
        if self.partitioned:
            close_engine(self._call)


def gather(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Partitioned parameters made whole for a `with` block, on all ranks together; others are left alone."""
    if not any(is_partitioned(p) for p in parameters):
        return nullcontext()
    return deepspeed.zero.GatheredParameters(list(parameters))


def model_info(model: PreTrainedModel, model_adapter: ModelAdapter) -> ModelInfo:
    """Sizes, from the configuration and the (possibly partitioned) head."""
    weight = model_adapter.head(model).weight
    vocabulary, width = whole_shape(weight)
    attention = model_adapter.attention(model, 0)
    heads = None if attention is None else attention.heads
    layers = len(model_adapter.blocks(model))
    return ModelInfo(int(width), int(vocabulary), layers, model.config.model_type, heads=heads)
