"""Where model families keep their parts, by shape: Llama's (most of today's), Gemma 3's and GPT-2's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from kdzoo import Attention, Head, Heads, Mixture, ModelAdapter, Projection, Register, hookimpl


class Llama(ModelAdapter):
    """`model.layers` under one norm, a head without bias; a mixture of experts changes nothing of it."""

    families = ("llama", "mistral", "qwen2", "qwen3")

    def backbone(self, model: Any) -> nn.Module:
        return model.model

    def blocks(self, model: Any) -> nn.ModuleList:
        return model.model.layers

    def embedding(self, model: Any) -> nn.Module:
        return model.model.embed_tokens

    def norm(self, model: Any) -> nn.Module:
        return model.model.norm

    def head(self, model: Any) -> Head:
        return Head(model.lm_head.weight)

    def attention(self, model: Any, block: int) -> Attention:
        config, module = model.config, model.model.layers[block].self_attn
        projections = (Projection(made) for made in (module.q_proj, module.k_proj, module.v_proj))
        return Attention(
            module, *projections, Heads(config.num_attention_heads, config.num_key_value_heads, module.head_dim)
        )

    def block_prefix(self) -> str:
        return "model.layers."

    def cut_config(self, config: Any, layers: Sequence[int]) -> Any:
        cut = copy.deepcopy(config)
        cut.num_hidden_layers = len(layers)
        kinds = config.to_dict().get("layer_types")  # families with sliding windows name the kind of every block
        if kinds is not None:
            cut.layer_types = [kinds[layer] for layer in layers]
        return cut


class Routed(Llama):
    """Llama's shape with experts; one of Transformers' layouts serves all such families."""

    families = ("olmoe",)

    def experts(self, config: Any) -> int:
        return config.num_experts

    def mixture(self, model: Any, block: int) -> Mixture | None:
        layer = model.model.layers[block]
        return Mixture(layer.mlp, layer.post_attention_layernorm, layer.mlp.gate, layer.mlp.experts)


class Mixtral(Routed):
    """The same under another name in the configuration."""

    families = ("mixtral",)

    def experts(self, config: Any) -> int:
        return config.num_local_experts


class QwenMoE(Routed):
    """Some blocks may be dense."""

    families = ("qwen3_moe",)

    @staticmethod
    def dense(config: Any, layer: int) -> bool:
        return layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step > 0

    def mixture(self, model: Any, block: int) -> Mixture | None:
        return None if self.dense(model.config, block) else super().mixture(model, block)

    def cut_config(self, config: Any, layers: Sequence[int]) -> Any:
        cut = super().cut_config(config, layers)
        cut.decoder_sparse_step = 1
        cut.mlp_only_layers = [place for place, layer in enumerate(layers) if self.dense(config, layer)]
        return cut


class Qwen2MoE(QwenMoE):
    """Beside the routed experts, one is shared by all tokens, behind a gate of its own."""

    families = ("qwen2_moe",)

    def mixture(self, model: Any, block: int) -> Mixture | None:
        routed = super().mixture(model, block)
        return None if routed is None else replace(routed, shared=partial(self.shared, routed.block))

    @staticmethod
    def shared(mixture: Any, x: Tensor) -> Tensor:
        return mixture.shared_expert_gate(x).sigmoid() * mixture.shared_expert(x)


class Gemma3(Llama):
    """Llama's shape, but the embedding is multiplied by sqrt(width), and the logits may be capped."""

    families = ("gemma3_text",)

    def embed_scale(self, model: Any) -> float:
        return model.model.embed_tokens.scalar_embed_scale

    def head(self, model: Any) -> Head:
        return Head(model.lm_head.weight, soft_cap=model.config.final_logit_softcapping)


class GPT2(ModelAdapter):
    """`transformer.h`, with learned positions and a head that is usually the embedding."""

    families = ("gpt2",)

    def backbone(self, model: Any) -> nn.Module:
        return model.transformer

    def blocks(self, model: Any) -> nn.ModuleList:
        return model.transformer.h

    def embedding(self, model: Any) -> nn.Module:
        return model.transformer.wte

    def norm(self, model: Any) -> nn.Module:
        return model.transformer.ln_f

    def head(self, model: Any) -> Head:
        return Head(model.lm_head.weight)

    def attention(self, model: Any, block: int) -> Attention:
        module = model.transformer.h[block].attn
        n, width = module.num_heads, module.embed_dim
        thirds = (Projection(module.c_attn, width * i, width * (i + 1)) for i in range(3))
        return Attention(module, *thirds, Heads(n, n, module.head_dim))

    def block_prefix(self) -> str:
        return "transformer.h."

    def cut_config(self, config: Any, layers: Sequence[int]) -> Any:
        cut = copy.deepcopy(config)
        cut.n_layer = len(layers)
        return cut


@hookimpl
def register_plugins(register: Register) -> None:
    register(Llama)
    register(Mixtral)
    register(Routed)
    register(QwenMoE)
    register(Qwen2MoE)
    register(Gemma3)
    register(GPT2)
