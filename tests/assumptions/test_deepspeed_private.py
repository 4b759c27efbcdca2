"""The private parts of DeepSpeed that `kdzoo.engine.deepspeed_private` uses are as they were when it was written."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from kdzoo.engine import deepspeed_private as PRIVATE
from kdzoo.testing.ranks import on_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def test_the_list_of_modules_is_a_list(changed):
    offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    assert isinstance(offload.FWD_MODULE_STACK, list), changed("runtime.zero.parameter_offload.FWD_MODULE_STACK")


def test_a_plain_parameter_is_not_partitioned(changed):
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    assert not PRIVATE.is_partitioned(parameter), changed("runtime.zero.partition_parameters.is_zero_param")
    assert PRIVATE.whole_shape(parameter) == (2, 3)
    assert PRIVATE.shard_of(parameter) is None


def test_the_state_is_gathered_with_or_without_frozen_parameters(changed):
    name = "_zero3_consolidated_16bit_state_dict"
    method = getattr(deepspeed.DeepSpeedEngine, name, None)
    assert method is not None, changed(f"DeepSpeedEngine.{name}")
    assert "exclude_frozen_parameters" in inspect.signature(method).parameters, changed(f"DeepSpeedEngine.{name}")


def test_an_operation_can_be_left_out(changed):
    name = "ops.__compatible_ops__['deepspeed_shm_comm']"
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, changed(name)
    PRIVATE.leave_out_shared_memory()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False, changed(name)


def test_the_model_of_the_configuration_refuses_an_unknown_key(changed):
    assert "reduce_bucket_size" in PRIVATE.ZeroConfig.model_fields, changed("DeepSpeedZeroConfig")
    with pytest.raises(ValueError, match="stagee"):
        PRIVATE.ZeroConfig(stagee=3)


def partitioned() -> dict[str, Any]:
    """What the functions say of one parameter in a ZeRO-3 engine, on one rank."""
    from kdzoo.engine.close import close_engine

    module = torch.nn.Linear(3, 2, bias=False)
    engine = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(module.parameters()), config=CONFIG)[0]
    engine(torch.ones(1, 3))
    offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    (parameter,) = module.parameters()
    shard = PRIVATE.shard_of(parameter)
    found = {
        "is_zero_param": PRIVATE.is_partitioned(parameter),
        "ds_shape": PRIVATE.whole_shape(parameter) == (2, 3) and parameter.shape != (2, 3),
        "ds_tensor": shard is not None and shard.numel() == 6,
        "_zero3_consolidated_16bit_state_dict": PRIVATE.gathered_state(engine, False)["weight"].shape == (2, 3),
        "FWD_MODULE_STACK": any(kept is module for kept in offload.FWD_MODULE_STACK),
    }
    close_engine(engine)
    found["FWD_MODULE_STACK, which is emptied,"] = not any(kept is module for kept in offload.FWD_MODULE_STACK)
    return found


@pytest.mark.slow
def test_a_partitioned_parameter_is_what_it_was(changed, tmp_path: Path):
    (found,) = on_ranks(1, tmp_path, partitioned)
    for name, as_it_was in found.items():
        assert as_it_was, changed(name)
