"""The hooks: what a plugin may implement, marked with `@kdzoo.hookimpl`.

Hooks register; hot work is plain method calls. None stops at a first result: the order of plugins must not
change what a recipe means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from kdzoo.plugin.contracts import Aligner, Anatomy, Fusion, Loss

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
def run_started(folder: Path, recipe: Mapping[str, Any]) -> None:
    """A run with this resolved recipe has its folder, and nothing is trained yet; called on the first rank alone."""


@hookspec
def step_logged(step: int, metrics: Mapping[str, float], stage: str, folder: Path) -> None:
    """An optimizer step was written to the log of the run in `folder`; called on the first rank alone."""


@hookspec
def run_ended(folder: Path) -> None:
    """The run in `folder` is over, well or not; called on the first rank alone."""


@hookspec
def tracker() -> str:  # type: ignore[empty-body]
    """Of a plugin that sends steps somewhere: the name by which a recipe's `trackers` asks for it.

    Such a plugin hears of a run only where the recipe names it. What it raises in `run_started` ends the run; in the
    other hooks it is told once, and the plugin hears no more of the run.
    """
