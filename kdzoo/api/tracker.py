"""A kind of plugin: where the steps of a run are sent."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdzoo.api.plugin import Plugin


class Tracker(Plugin):
    """Sends the steps of one run somewhere. Made on the first rank before anything is trained, where a recipe's
    `trackers` names it; what it raises then ends the run, an ImportError as the extra that has to be installed.
    What it raises later is printed once, and the tracker is disabled for this run: hours of training are worth more
    than its curves."""

    kind = "tracker"

    @abstractmethod
    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Of the run in `folder`, with its resolved recipe."""

    @abstractmethod
    def step_logged(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """What the log got after an optimizer step; every stage counts from 1."""

    @abstractmethod
    def close(self) -> None:
        """The run is over, well or not."""
