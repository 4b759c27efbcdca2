"""From a folder of weights to a module, partitioned on arrival where the engine shards parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdzoo.engine.config import zero_stage
from kdzoo.errors import ModelError
from kdzoo.quiet import quiet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(folder: Path, precision: str, config: dict[str, Any] | None, device: torch.device) -> PreTrainedModel:
    """A causal language model from `folder`. With a stage-3 `config`, no rank ever holds it whole."""
    partitioned = config is not None and zero_stage(config) == 3
    if partitioned:
        from transformers.integrations import HfDeepSpeedConfig

        # transformers holds it by a weak reference and partitions while it lives.
        alive = HfDeepSpeedConfig(config)
    try:
        with quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[precision], trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"model {folder}: cannot be loaded ({first}); it must be a Hugging Face folder") from error
    if partitioned:
        del alive
        return model
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return model
