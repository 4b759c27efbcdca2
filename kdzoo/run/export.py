"""A trained model as a clean Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kdzoo.quiet import quiet


def save_model(out: Path, base: Path, tokenizer: PreTrainedTokenizerFast, state: Mapping[str, Tensor]) -> None:
    """Weights (safetensors) in `state`, with the configuration of `base` and the tokenizer, into the folder `out`."""
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=next(iter(state.values())).dtype)
    # A tied head is one tensor under two names; the state holds whichever the engine named.
    model.load_state_dict(dict(state), assign=True, strict=False)
    model.tie_weights()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not absent, f"the engine's state lacks {absent}"
    with quiet():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
