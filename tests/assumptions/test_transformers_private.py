"""The private parts of transformers that `kdzoo.transformers_private` uses are as they were when it was written."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, modeling_utils
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import kdzoo.transformers_private as PRIVATE


def small() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5, n_positions=3))


def test_gpt2_has_linear_modules_of_its_own_with_a_transposed_matrix(changed):
    attention = small().transformer.h[0].attn.c_attn
    assert isinstance(attention, PRIVATE.Conv1D), changed("pytorch_utils.Conv1D")
    assert attention.weight.shape == (4, 12), changed("pytorch_utils.Conv1D.weight")
    assert not isinstance(attention, torch.nn.Linear)


def test_a_model_is_marked_as_quantised_by_two_attributes(changed):
    assert callable(load_gguf_checkpoint), changed("modeling_gguf_pytorch_utils")
    saved = inspect.getsource(modeling_utils.PreTrainedModel.save_pretrained)
    assert "hf_quantizer" in saved, changed("PreTrainedModel.hf_quantizer")


def test_the_mark_is_taken_off(changed, tmp_path):
    model = small()
    model.hf_quantizer = object()
    model.config.quantization_config = {"quant_method": "gguf"}
    PRIVATE.take_off_quantisation(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text(), changed("config.quantization_config")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "mixtral", "olmoe", "qwen3"])
def test_every_family_calls_one_attention_function_with_what_it_compares(changed, family, attention):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 7}
    few = {"num_experts": 2, "num_experts_per_tok": 1} if family == "olmoe" else {}
    few |= {"head_dim": 4} if family in ("gemma3_text", "qwen3") else {}
    few |= {"num_key_value_heads": 1, "intermediate_size": 8} if family != "gpt2" else {}
    config = AutoConfig.for_model(family, **sizes, **few, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    functions = modeling_utils.ALL_ATTENTION_FUNCTIONS
    before, heard, ids = dict(functions._local_mapping), [], torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = model(ids).logits
        with PRIVATE.attention_heard(model, lambda *call: heard.append(call)):
            same = model(ids).logits
    assert len(heard) == 2, changed("modeling_utils.ALL_ATTENTION_FUNCTIONS")
    assert same.equal(plain)
    assert functions._local_mapping == before, changed("AttentionInterface._local_mapping")
    for module, query, key, given in heard:
        assert query.shape == (1, 2, 3, 4) and key.shape[0] == 1 and key.shape[2:] == (3, 4)
        assert given["scaling"] is not None, changed("the argument 'scaling' of attention functions")
        assert "eager_attention_forward" in vars(sys.modules[type(module).__module__]), changed(
            "eager_attention_forward"
        )
