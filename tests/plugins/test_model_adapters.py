from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdzoo import ModelAdapter
from kdzoo_model_adapters import GPT2, Gemma3, Llama, Mixtral, Qwen2MoE, QwenMoE, Routed

CLASSES = (Llama, Routed, Mixtral, QwenMoE, Qwen2MoE, Gemma3, GPT2)
SHAPES: dict[str, ModelAdapter] = {family: shape() for shape in CLASSES for family in shape.families}
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
OWN = {
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None},
    "mixtral": {"num_local_experts": 3},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "decoder_sparse_step": 2,
    },
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "head_dim": 8,
        "mlp_only_layers": [1, 3],
    },
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 0.05},
}
IDS = torch.tensor([[3, 4, 5, 6, 7]])


def config_of(family: str) -> Any:
    content = {key: value for key, value in {**SIZES, **OWN.get(family, {})}.items() if key == "pad_token_id" or value}
    return AutoConfig.for_model(family, **content)


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_the_parts_are_the_models_own(family: str) -> None:
    model, model_adapter = model_of(config_of(family)), SHAPES[family]
    with torch.no_grad():
        before_norm: list[torch.Tensor] = []
        model_adapter.norm(model).register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
        expected = model(IDS, output_hidden_states=True)
        hidden = model_adapter.backbone(model)(IDS).last_hidden_state
        head = model_adapter.head(model)
        embedded = model_adapter.embedding(model)(IDS)
        after_norm = model_adapter.norm(model).forward(before_norm[0])
    assert hidden.equal(expected.hidden_states[-1])
    assert hidden.equal(after_norm)
    torch.testing.assert_close(head.finish(hidden @ head.weight.T, head.bias), expected.logits)
    assert len(model_adapter.blocks(model)) == 4
    table = model_adapter.embedding(model).weight
    torch.testing.assert_close(embedded, table[IDS] * model_adapter.embed_scale(model))
    names = set(model.state_dict())
    for number, block in enumerate(model_adapter.blocks(model)):
        assert {f"{model_adapter.block_prefix()}{number}.{name}" for name in block.state_dict()} <= names


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_a_cut_configuration_keeps_the_kinds_of_the_kept_blocks(family: str) -> None:
    config, model_adapter = config_of(family), SHAPES[family]
    model = model_of(config)
    before = config.to_dict()
    layers = [3, 0, 1]
    cut = model_of(model_adapter.cut_config(config, layers))
    assert config.to_dict() == before
    for place, layer in enumerate(layers):
        kept, block = model_adapter.blocks(cut)[place], model_adapter.blocks(model)[layer]
        shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (kept, block)]
        assert shapes[0] == shapes[1]
    kinds = before.get("layer_types")
    if kinds is not None:
        assert cut.config.layer_types == [kinds[layer] for layer in layers]


def test_gemmas_embedding_is_scaled_and_its_logits_capped() -> None:
    model = model_of(config_of("gemma3_text"))
    assert Gemma3().embed_scale(model) == 4.0
    assert Gemma3().head(model).soft_cap == 0.05
    assert model(IDS).logits.abs().max() <= 0.05
    assert Llama().embed_scale(model_of(config_of("llama"))) == 1.0
