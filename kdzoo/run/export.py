"""A trained model as a clean Hugging Face folder; or what was trained of it, as an adapter's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kdzoo.lora import merge_adapter, save_adapter
from kdzoo.quiet import quiet
from kdzoo.run.context import ModelRole


def save_trained(
    out: Path, base: Path, role: ModelRole, state: Mapping[str, Tensor], keep_adapter: bool = False
) -> None:
    """Write what a stage has trained of the model `role`, which started from `base`, into the folder `out`.

    With LoRA, `state` is the adapter's, and merged into the base unless `keep_adapter`.
    """
    tokenizer = role.encoder.tokenizer
    if role.lora is None:
        save_model(out, base, tokenizer, state)
        return
    named = role.model.hub or str(base.absolute())
    with quiet():
        if keep_adapter:
            save_adapter(out, base, named, role.lora, state)
        else:
            with TemporaryDirectory(prefix="kdzoo-adapter-") as folder:
                save_adapter(Path(folder), base, named, role.lora, state)
                model = AutoModelForCausalLM.from_pretrained(base, dtype=next(iter(state.values())).dtype)
                merge_adapter(model, Path(folder), "the trained adapter").save_pretrained(out)
        tokenizer.save_pretrained(out)


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
