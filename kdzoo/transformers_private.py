"""What kdzoo uses of transformers that is no public part of it. `tests/assumptions` fails first where a release changes
it.

Checked with the version in `CHECKED`. Where a model family keeps its parts is the business of its plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

CHECKED = "5.24.0"

# Conv1D: the linear module of GPT-2, its matrix transposed
__all__ = ["CHECKED", "Conv1D", "attention_heard", "take_off_quantisation"]


def take_off_quantisation(model: Any) -> None:
    """Let a model that was read from a GGUF file be saved: its weights are plain, but it is marked as quantised."""
    model.hf_quantizer = None
    del model.config.quantization_config


Hear = Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], None]
"""(attention module, queries [B, H, T, size], keys [B, key/value heads, T, size], what else the function is given)"""


@contextmanager
def attention_heard(model: Any, hear: Hear) -> Iterator[None]:
    """Within the block, `hear` is shown what every call of the model's attention function compares, before the call.

    Every family calls one function of Transformers, whichever implementation the model has, with queries and keys that
    are normalised and rotated as the family does it. An entry of the one mapping that all families look it up in stands
    before the function meanwhile; "eager" is no entry of it, but a function of the family's own module.
    """
    name = model.config._attn_implementation
    functions = ALL_ATTENTION_FUNCTIONS
    usual = functions.get(name)
    before = functions._local_mapping.get(name)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **given: Any
    ) -> Any:
        hear(module, query, key, given)
        function = usual
        if function is None:
            function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return function(module, query, key, value, mask, *args, **given)

    functions[name] = attend
    try:
        yield
    finally:
        del functions[name]
        if before is not None:
            functions[name] = before
