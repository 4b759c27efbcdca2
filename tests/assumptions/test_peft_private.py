"""The private parts of peft that `kdzoo.peft_private` uses are as they were when it was written."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import kdzoo.peft_private as PRIVATE
from kdzoo.quiet import quiet

TARGET = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def wrapped() -> Any:
    config = LlamaConfig(
        hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, vocab_size=5, head_dim=4
    )
    with quiet():
        return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=1, target_modules=["q_proj"]))


def test_an_adapter_that_nobody_named_has_the_name_default(changed, wrapped):
    assert list(wrapped.peft_config) == [PRIVATE.ADAPTER], changed("the name of an adapter ('default')")


def test_a_configuration_lists_parameters_apart_from_modules(changed, wrapped):
    assert PRIVATE.config_of(wrapped).target_parameters is None, changed("LoraConfig.target_parameters")


def test_an_adapted_module_is_known_by_its_class(changed, wrapped):
    adapted = [name for name, module in wrapped.get_base_model().named_modules() if PRIVATE.is_adapted(module)]
    assert adapted == [TARGET], changed("tuners.tuners_utils.BaseTunerLayer")


def test_modules_with_weights_of_their_own_have_one_class(changed):
    from peft import utils

    assert issubclass(utils.ModulesToSaveWrapper, utils.AuxiliaryTrainingWrapper), changed(
        "utils.AuxiliaryTrainingWrapper"
    )


def test_an_adapters_weights_are_named_after_their_module(changed, wrapped):
    own = {n: p for n, p in wrapped.get_base_model().named_parameters() if p.requires_grad}
    assert PRIVATE.adapted_modules(own) == [TARGET], changed("the names of LoRA's weights ('.lora_')")
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert set(PRIVATE.as_wrapped(own)) == trained, changed("the prefix of wrapped names ('base_model.model.')")
