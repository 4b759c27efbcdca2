"""Closing an engine for good, so that the next stage has the memory."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from kdzoo.engine.deepspeed_private import forget_module, shard_of


def close_engine(engine: DeepSpeedEngine) -> None:
    """Take DeepSpeed's hooks off and give its memory back. What is wanted of the engine was taken before."""
    module, optimizer = engine.module, engine.optimizer
    engine.destroy()
    # Hooks that torch holds keep the optimizer alive for good: the states, buffers and shards in it go one by one.
    _empty(vars(optimizer) if optimizer is not None else {}, set())
    for parameter in module.parameters():
        _empty([parameter, shard_of(parameter)], set())
    forget_module(module)


def _empty(value: Any, seen: set[int]) -> None:
    """Free the storage of every tensor within containers and dataclasses."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.device.type != "meta" and value.untyped_storage().resizable():
            value.untyped_storage().resize_(0)
        _empty(value.grad if value.is_leaf else None, seen)
    elif isinstance(value, Mapping):
        for part in tuple(value.values()):
            _empty(part, seen)
    elif isinstance(value, list | tuple | set):
        for part in tuple(value):
            _empty(part, seen)
    elif is_dataclass(value) or isinstance(value, torch.optim.Optimizer):
        _empty(vars(value), seen)


def release() -> None:
    """Collect what closed engines leave in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
