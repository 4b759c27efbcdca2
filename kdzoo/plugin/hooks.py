"""The hooks: what a plugin may implement, marked with `@kdzoo.hookimpl`.

Hooks register; hot work is plain method calls. None stops at a first result: the order of plugins must not
change what a recipe means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kdzoo.plugin.contracts import Aligner, Anatomy, Fusion, Loss, Tracker

hookspec = pluggy.HookspecMarker("kdzoo")
hookimpl = pluggy.HookimplMarker("kdzoo")


@hookspec
def register_losses(register: Callable[[type[Loss]], None]) -> None:
    """Call `register` once for every loss class of the plugin."""


@hookspec
def register_aligners(register: Callable[[type[Aligner]], None]) -> None:
    """Call `register` once for every aligner class of the plugin."""


@hookspec
def register_fusions(register: Callable[[type[Fusion]], None]) -> None:
    """Call `register` once for every fusion class of the plugin."""


@hookspec
def register_anatomies(register: Callable[[type[Anatomy]], None]) -> None:
    """Call `register` once for every anatomy class of the plugin."""


@hookspec
def register_trackers(register: Callable[[type[Tracker]], None]) -> None:
    """Call `register` once for every tracker class of the plugin."""


@hookspec
def step_logged(step: int, metrics: Mapping[str, float], stage: str, folder: Path) -> None:
    """An optimizer step was written to the log of the run in `folder`; called on the first rank alone."""
