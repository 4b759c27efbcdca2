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

from kdzoo.adapters import add_adapter
from kdzoo.engine.close import close_engine
from kdzoo.engine.config import zero_stage
from kdzoo.engine.loading import load_model
from kdzoo.plugin.contracts import Anatomy, Fusion, ModelFacts
from kdzoo.step.batch import Side
from kdzoo.step.capture import NO_FUSIONS, capture
from kdzoo.step.head import Head


class _Sites(nn.Module):
    """The model with its captured sites as its output, so that one engine call is one forward pass."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, fusions: Mapping[str, Fusion]) -> None:
        super().__init__()
        self.model = model
        self._anatomy = anatomy
        self._fusions = fusions

    def forward(self, *, side: Side, sites: Iterable[str]) -> dict[str, Tensor]:
        return capture(self.model, self._anatomy, side, sites, self._fusions)


class FrozenModel:
    """A causal language model without gradients, in an engine of its own if `config` shards parameters.

    `adapter`: a folder of LoRA weights that stay beside its own.
    """

    def __init__(
        self,
        folder: Path,
        anatomies: Mapping[str, Anatomy],
        precision: str,
        config: dict[str, Any],
        device: torch.device,
        fusions: Mapping[str, Fusion] = NO_FUSIONS,
        adapter: Path | None = None,
    ) -> None:
        self.model = load_model(folder, precision, config, device)
        self.anatomy = anatomies[self.model.config.model_type]
        self.head: Head = self.anatomy.head(self.model)
        if adapter is not None:
            self.model = add_adapter(self.model, self.anatomy, adapter, f"model {folder}")
        self.model.requires_grad_(False).eval()
        self.facts = model_facts(self.model, self.anatomy)
        self.device = device
        self.partitioned = zero_stage(config) == 3
        self._call: Any = _Sites(self.model, self.anatomy, fusions)
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


def is_partitioned(parameter: nn.Parameter) -> bool:
    return deepspeed.runtime.zero.partition_parameters.is_zero_param(parameter)


def whole_shape(parameter: nn.Parameter) -> Sequence[int]:
    """The parameter's own shape, also where only a shard of it is here."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


def model_facts(model: PreTrainedModel, anatomy: Anatomy) -> ModelFacts:
    """Sizes, from the configuration and the (possibly partitioned) head."""
    weight = anatomy.head(model).weight
    vocabulary, width = whole_shape(weight)
    return ModelFacts(int(width), int(vocabulary), len(anatomy.blocks(model)), model.config.model_type)
