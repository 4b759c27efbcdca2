"""Weights & Biases: every metric of every step as `<stage>/<metric>`; the resolved recipe is the run's config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kdzoo

RUNS: dict[Path, Any] = {}


@kdzoo.hookimpl
def tracker() -> str:
    return "wandb"


@kdzoo.hookimpl
def run_started(folder: Path, recipe: Mapping[str, Any]) -> None:
    import wandb

    run = RUNS[folder] = wandb.init(project="kdzoo", name=folder.name, dir=str(folder), config=dict(recipe))
    for stage in recipe["stages"]:
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")


@kdzoo.hookimpl
def step_logged(step: int, metrics: Mapping[str, float], stage: str, folder: Path) -> None:
    # A step of its own per stage: each begins with 1.
    RUNS[folder].log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})


@kdzoo.hookimpl
def run_ended(folder: Path) -> None:
    RUNS.pop(folder).finish()
