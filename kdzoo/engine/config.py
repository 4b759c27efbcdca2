"""DeepSpeed's configuration: the recipe's, verbatim, with what the recipe itself decides."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kdzoo.engine.deepspeed_private import ZeroConfig
from kdzoo.errors import RecipeError, did_you_mean
from kdzoo.recipe.merge import merge_patch
from kdzoo.recipe.model import Recipe, Stage


def engine_config(recipe: Recipe, stage: Stage, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """The configuration of a stage's engine."""
    config = merge_patch(recipe.deepspeed, stage.deepspeed)
    config |= {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Written out always: left out, DeepSpeed clips at 1.0.
        "gradient_clipping": stage.clip,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
    }
    config.setdefault("steps_per_print", 10**9)
    # The optimizer is torch's, which needs no compiled extension, also where its states are offloaded.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def frozen_config(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The configuration of an engine that trains nothing: its sharding, without optimizer or offload of its states."""
    config = engine_config(recipe, stage, micro_batch=1, accumulation=1)
    zero = dict(config.get("zero_optimization", {}))
    zero.pop("offload_optimizer", None)
    return config | {"zero_optimization": zero}


def generating_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same for a model that generates between its other passes.

    ZeRO-3 fetches ahead in the order of an earlier pass, generation included. What it then fetches in vain is still in
    flight when the head is gathered, and the next pass fails.
    """
    return config | {"zero_optimization": {**config.get("zero_optimization", {}), "stage3_prefetch_bucket_size": 0}}


def check_zero(recipe: Recipe) -> None:
    """Refuse what DeepSpeed's own model of `zero_optimization` refuses, in one line, before anything is loaded."""
    for name, stage in recipe.stages.items():
        zero = merge_patch(recipe.deepspeed, stage.deepspeed).get("zero_optimization", {})
        try:
            ZeroConfig(**zero)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            hint = did_you_mean(key, ZeroConfig.model_fields) if first["type"] == "extra_forbidden" else ""
            raise RecipeError(
                f"deepspeed.zero_optimization.{key}: DeepSpeed refuses it ({first['msg'].lower()}){hint} (in '{name}')"
            ) from error


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))
