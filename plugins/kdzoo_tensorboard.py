"""TensorBoard: every metric of every step as a curve, `<stage>/<metric>`, in the run folder's `tensorboard/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kdzoo

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

WRITERS: dict[Path, SummaryWriter] = {}


@kdzoo.hookimpl
def tracker() -> str:
    return "tensorboard"


@kdzoo.hookimpl
def run_started(folder: Path, recipe: Mapping[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = WRITERS[folder] = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]
    writer.add_text("title", str(recipe["title"]))  # type: ignore[no-untyped-call]


@kdzoo.hookimpl
def step_logged(step: int, metrics: Mapping[str, float], stage: str, folder: Path) -> None:
    for name, value in metrics.items():
        WRITERS[folder].add_scalar(f"{stage}/{name}", value, step)  # type: ignore[no-untyped-call]


@kdzoo.hookimpl
def run_ended(folder: Path) -> None:
    WRITERS.pop(folder).close()  # type: ignore[no-untyped-call]
