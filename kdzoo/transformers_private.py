"""What kdzoo uses of transformers that is no public part of it. `tests/assumptions` fails first where a release changes
it.

Checked with the version in `CHECKED`. Where a model family keeps its parts is the business of its plugin.
"""

from __future__ import annotations

from typing import Any

from transformers.pytorch_utils import Conv1D

CHECKED = "5.24.0"

__all__ = ["CHECKED", "Conv1D", "take_off_quantisation"]  # Conv1D: the linear module of GPT-2, its matrix transposed


def take_off_quantisation(model: Any) -> None:
    """Let a model that was read from a GGUF file be saved: its weights are plain, but it is marked as quantised."""
    model.hf_quantizer = None
    del model.config.quantization_config
