"""The hooks: what a plugin module may implement, marked with `@kdzoo.hookimpl`.

Hooks register; hot work is plain method calls. None stops at a first result: the order of plugins must not change what
a recipe means.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kdzoo.api.plugin import Register

hookspec = pluggy.HookspecMarker("kdzoo")
hookimpl = pluggy.HookimplMarker("kdzoo")


@hookspec
def register_plugins(register: Register) -> None:
    """Call `register` once for every plugin class of the module: losses, aligners, fusions, ..."""


@hookspec
def step_logged(step: int, metrics: Mapping[str, float], stage: str, folder: Path) -> None:
    """An optimizer step was written to the log of the run in `folder`; called on the first rank alone."""
