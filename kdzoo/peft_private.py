"""What kdzoo uses of peft that is no public part of it. `tests/assumptions` fails first where a release changes it.

Checked with the version in `CHECKED`. peft is imported only where a recipe has an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CHECKED = "0.21.2"

ADAPTER = "default"
"""The name of an adapter that nobody named."""

_WRAPPED = "base_model.model."  # what peft puts before the names of the model that it wraps
_LORA = ".lora_"  # what follows a module's name in the names of its adapter's weights


def is_adapted(module: nn.Module) -> bool:
    """Whether peft has put the module in the place of one of the model's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def config_of(wrapped: Any) -> Any:
    """The configuration of the adapter of a wrapped model."""
    return wrapped.peft_config[ADAPTER]


def adapted_modules(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the modules that the adapter weights in `state` belong to, sorted."""
    return sorted({name.split(_LORA)[0] for name in state})


def as_wrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that they have in the wrapped model."""
    return {_WRAPPED + name: value for name, value in state.items()}
