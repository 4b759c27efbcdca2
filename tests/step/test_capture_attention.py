"""Sites of attention, through real models of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kdzoo import KdzooError, ModelAdapter
from kdzoo.api.batch import Side
from kdzoo.engine.frozen import model_info
from kdzoo.lora import add_lora
from kdzoo.recipe.model import Lora
from kdzoo.step.capture import capture
from kdzoo.testing.promises.world import registry
from kdzoo.testing.tiny import CONFIGS, LLAMA, tiny_batch

V = 61
LENGTHS = [(4, 5, 5), (6, 1, 1), (3, 7, 7)]
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3"), LLAMA),
    "gemma3_text": LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 9, "layer_types": ["full_attention"] * 2},
    **CONFIGS,
}
OWN["gpt2"] = OWN["gpt2"] | {"scale_attn_by_inverse_layer_idx": True}
FAMILIES = sorted(OWN)


def model_of(family: str, attention: str = "sdpa", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=V, **OWN[family] | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    return model


def adapter_of(family: str) -> ModelAdapter:
    return registry().model_adapters[family]


def side_of() -> Side:
    side = tiny_batch(LENGTHS, V, V, same_tokens=True).teacher
    assert side is not None
    return side


def by_head(flat: Tensor, heads: int) -> Tensor:
    """[B * T, heads x size] as [B, heads, T, size]"""
    return flat.view(*side_of().input_ids.shape, heads, -1).transpose(1, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_products_of_what_attention_compares_are_its_scores(family, attention):
    model, eager = model_of(family, attention), model_of(family, "eager")
    heads = model_info(model, adapter_of(family)).heads
    assert heads is not None
    side = side_of()
    with torch.no_grad():
        expected = eager(side.input_ids, attention_mask=side.attention_mask, output_attentions=True).attentions
        sites = [f"attention_{what}.{block}@all" for what in ("query", "key") for block in (0, 1)]
        found = capture(model, adapter_of(family), side, sites)
    causal = torch.ones(side.input_ids.shape[1:] * 2, dtype=torch.bool).tril()
    for block in (0, 1):
        query, key = (by_head(found[f"attention_{what}.{block}@all"], heads.query) for what in ("query", "key"))
        seen = causal & side.attention_mask.bool()[:, None, None]
        weights = (query @ key.transpose(2, 3)).masked_fill(~seen, -torch.inf).softmax(-1)
        real = side.attention_mask.bool()[:, None, :, None].expand_as(weights)
        torch.testing.assert_close(weights[real], expected[block][real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_are_what_the_projections_make(family):
    model, side = model_of(family), side_of()
    heads = model_info(model, adapter_of(family)).heads
    assert heads is not None
    with torch.no_grad():
        sites = [f"{what}.{block}" for what in ("query", "key", "value") for block in ("0", "last@all")]
        found = capture(model, adapter_of(family), side, sites)
        states = model(side.input_ids, attention_mask=side.attention_mask, output_hidden_states=True).hidden_states
        block = adapter_of(family).blocks(model)[-1]
        if family == "gpt2":
            made = block.attn.c_attn(block.ln_1(states[-2])).split(32, dim=-1)
        else:
            normed = block.input_layernorm(states[-2])
            made = [getattr(block.self_attn, f"{name}_proj")(normed) for name in "qkv"]
    for what, expected in zip(("query", "key", "value"), made, strict=True):
        torch.testing.assert_close(found[f"{what}.last@all"], expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
        width = (heads.query if what == "query" else heads.key_value) * heads.size
        assert found[f"{what}.0"].shape == (len(side), width)


def gradients(model: Any, family: str) -> dict[str, Tensor]:
    sites = [f"{what}.{block}@all" for what in ("query", "value", "attention_key") for block in (0, 1)]
    found = capture(model, adapter_of(family), side_of(), [*sites, "hidden.last"])
    sum(value.square().mean() for value in found.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_gradient_checkpointing_changes_no_gradient(family):
    plain, again = model_of(family).train(), model_of(family).train()
    again.activation_checkpointing_enable({"use_reentrant": False})
    expected, found = gradients(plain, family), gradients(again, family)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_of_lora_is_part_of_what_projections_make(family):
    model, side = model_of(family), side_of()
    sites = ["query.1", "value.1", "attention_query.1"]
    with torch.no_grad():
        before = capture(model, adapter_of(family), side, sites)
        adapted = add_lora(model, adapter_of(family), Lora(rank=2), 0, "student.lora")
        same = capture(adapted, adapter_of(family), side, sites)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)
        other = capture(adapted, adapter_of(family), side, sites)
    for site in sites:
        assert same[site].equal(before[site])
        assert not torch.allclose(other[site], before[site])


def test_a_sequence_longer_than_a_blocks_window_is_refused():
    model = model_of("mistral", sliding_window=8)
    longest = side_of().input_ids.shape[1]
    with pytest.raises(
        KdzooError, match=f"sees a window of 8 tokens, and a sequence has {longest}; set data.max_length"
    ):
        capture(model, adapter_of("mistral"), side_of(), ["attention_query.0", "attention_key.0"])
    assert capture(model, adapter_of("mistral"), side_of(), ["query.0"])["query.0"].isfinite().all()


def test_a_family_whose_adapter_names_no_attention_is_refused(monkeypatch):
    monkeypatch.setattr(type(adapter_of("llama")), "attention", ModelAdapter.attention)
    assert model_info(model_of("llama"), adapter_of("llama")).heads is None
    with pytest.raises(
        KdzooError, match=r"^site 'key\.-1': the model adapter of this family names no attention; add it"
    ):
        capture(model_of("llama"), adapter_of("llama"), side_of(), ["key.-1"])


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(KdzooError, match=r"^site 'value\.2': the model has 2 blocks"):
        capture(model_of("llama"), adapter_of("llama"), side_of(), ["value.2"])
