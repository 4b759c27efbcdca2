"""TensorBoard: every metric of every step as a curve, in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kdzoo
from kdzoo import Register, Tracker


class TensorBoard(Tracker):
    """Writes `<stage>/<metric>` into `tensorboard/` of the run folder: `tensorboard --logdir runs`."""

    name = "tensorboard"

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]
        self.writer.add_text("title", str(recipe["title"]))

    def step_logged(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


@kdzoo.hookimpl
def register_plugins(register: Register) -> None:
    register(TensorBoard)
