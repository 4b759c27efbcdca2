"""Where model families keep their parts, by shape: Llama's (most of today's), Gemma 3's and GPT-2's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from kdzoo import Anatomy, Head, hookimpl


class Llama(Anatomy):
    """`model.layers` under one norm, a head without bias; a mixture of experts changes nothing of it."""

    families = ("llama", "mistral", "qwen2", "qwen3")

    def backbone(self, model: Any) -> nn.Module:
        return model.model

    def blocks(self, model: Any) -> nn.ModuleList:
        return model.model.layers

    def embedding(self, model: Any) -> nn.Module:
        return model.model.embed_tokens

    def head(self, model: Any) -> Head:
        return Head(model.lm_head.weight)

    def block_prefix(self) -> str:
        return "model.layers."

    def cut_config(self, config: Any, layers: Sequence[int]) -> Any:
        cut = copy.deepcopy(config)
        cut.num_hidden_layers = len(layers)
        kinds = config.to_dict().get("layer_types")  # families with sliding windows name the kind of every block
        if kinds is not None:
            cut.layer_types = [kinds[layer] for layer in layers]
        return cut


class Mixtral(Llama):
    """Llama's shape with experts in every block."""

    families = ("mixtral",)

    def experts(self, config: Any) -> int:
        return config.num_local_experts


class OLMoE(Llama):
    """Llama's shape with experts in every block."""

    families = ("olmoe",)

    def experts(self, config: Any) -> int:
        return config.num_experts


class QwenMoE(Llama):
    """Llama's shape with experts, where some blocks may be dense."""

    families = ("qwen2_moe", "qwen3_moe")

    def experts(self, config: Any) -> int:
        return config.num_experts

    def cut_config(self, config: Any, layers: Sequence[int]) -> Any:
        cut = super().cut_config(config, layers)
        dense = [layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step > 0 for layer in layers]
        cut.decoder_sparse_step = 1
        cut.mlp_only_layers = [place for place, plain in enumerate(dense) if plain]
        return cut


class Gemma3(Llama):
    """Llama's shape, but the embedding is multiplied by sqrt(width), and the logits may be capped."""

    families = ("gemma3_text",)

    def embed_scale(self, model: Any) -> float:
        return model.model.embed_tokens.scalar_embed_scale

    def head(self, model: Any) -> Head:
        return Head(model.lm_head.weight, soft_cap=model.config.final_logit_softcapping)


class GPT2(Anatomy):
    """`transformer.h`, with learned positions and a head that is usually the embedding."""

    families = ("gpt2",)

    def backbone(self, model: Any) -> nn.Module:
        return model.transformer

    def blocks(self, model: Any) -> nn.ModuleList:
        return model.transformer.h

    def embedding(self, model: Any) -> nn.Module:
        return model.transformer.wte

    def head(self, model: Any) -> Head:
        return Head(model.lm_head.weight)

    def block_prefix(self) -> str:
        return "transformer.h."

    def cut_config(self, config: Any, layers: Sequence[int]) -> Any:
        cut = copy.deepcopy(config)
        cut.n_layer = len(layers)
        return cut


@hookimpl
def register_anatomies(register: Callable[[type[Anatomy]], None]) -> None:
    register(Llama)
    register(Mixtral)
    register(OLMoE)
    register(QwenMoE)
    register(Gemma3)
    register(GPT2)
