"""The private parts of transformers that `kdzoo.transformers_private` uses are as they were when it was written."""

from __future__ import annotations

import inspect

import torch
from transformers import GPT2Config, GPT2LMHeadModel, modeling_utils
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
