"""What kdzoo uses of DeepSpeed that is no public part of it. `tests/assumptions` fails first where a release changes
it.

Checked with the version in `CHECKED`.
"""

from __future__ import annotations

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from torch import Tensor, nn

CHECKED = "0.19.8"

ZeroConfig = DeepSpeedZeroConfig
"""DeepSpeed's own model of `zero_optimization`: it knows every key."""


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has marked the parameter as one of its own."""
    return bool(is_zero_param(parameter))


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's own shape, also where only a shard of it is here."""
    shape = parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]
    return tuple(shape)


def shard_of(parameter: nn.Parameter) -> Tensor | None:
    """This rank's part of a partitioned parameter."""
    shard = vars(parameter).get("ds_tensor")
    assert shard is None or isinstance(shard, Tensor)
    return shard


def gathered_state(engine: DeepSpeedEngine, trained_only: bool) -> dict[str, Tensor]:
    """The state of a ZeRO-3 engine's module, whole, in its own dtype, on rank 0; empty elsewhere. Collective."""
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only) or {}


def forget_module(module: nn.Module) -> None:
    """DeepSpeed keeps every module that it ever partitioned on a list, and with it the weights."""
    FWD_MODULE_STACK[:] = [kept for kept in FWD_MODULE_STACK if kept is not module]


def leave_out_shared_memory() -> None:
    """No C++ compiler at work when a run starts on a CPU.

    Shared memory serves DeepSpeed's all-reduce there. ZeRO-3 hardly uses one, and building it takes half a minute.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
