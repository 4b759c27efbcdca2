"""Weights & Biases: every metric of every step; the resolved recipe is the run's config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kdzoo
from kdzoo import Register, Tracker


class Wandb(Tracker):
    """Sends `<stage>/<metric>` over `<stage>/step` to the project of `$WANDB_PROJECT`, else `kdzoo`; with
    `WANDB_MODE=offline` it stays in the run folder. An extra: `pip install 'kdzoo[wandb]'`."""

    name = "wandb"

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "kdzoo")
        self.run = wandb.init(project=project, name=folder.name, dir=str(folder), config=dict(recipe))
        for stage in recipe["stages"]:  # each counts its steps from 1
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def step_logged(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        self.run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

    def close(self) -> None:
        self.run.finish()


@kdzoo.hookimpl
def register_plugins(register: Register) -> None:
    register(Wandb)
