"""Trackio: every metric of every step; the resolved recipe is the run's config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kdzoo
from kdzoo import Register, Tracker


class Trackio(Tracker):
    """Keeps `<stage>/<metric>` in the project `kdzoo`: `trackio show`. An extra: `pip install 'kdzoo[trackio]'`."""

    name = "trackio"

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        import trackio

        self.run = trackio.init(project="kdzoo", name=folder.name, config=dict(recipe))

    def step_logged(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        # Without a step of its own: one count goes over all stages, which each begin with 1.
        self.run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

    def close(self) -> None:
        self.run.finish()


@kdzoo.hookimpl
def register_plugins(register: Register) -> None:
    register(Trackio)
