"""Plugins that follow a run: those that always do, and the trackers that its recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pluggy

from kdzoo.errors import KdzooError, RecipeError, did_you_mean
from kdzoo.run.progress import say


class Followers:
    """Of the run in `folder`. Made on every rank, so that a wrong name ends all; called on the first alone."""

    def __init__(self, manager: pluggy.PluginManager, wanted: Sequence[str], folder: Path) -> None:
        known: dict[str, object] = {str(each.function()): each.plugin for each in manager.hook.tracker.get_hookimpls()}
        for name in wanted:
            if name not in known:
                raise RecipeError(
                    f"trackers: '{name}' is none of {', '.join(sorted(known))}{did_you_mean(name, known)}; name one, "
                    "or install its plugin"
                )
        self.manager = manager
        self.folder = folder
        self.trackers = {name: known[name] for name in wanted}
        self.others = [plugin for plugin in manager.get_plugins() if plugin not in known.values()]

    @contextmanager
    def following(self, recipe: Mapping[str, Any]) -> Iterator[None]:
        """From the run's start to its end, whatever ends it."""
        self._call_others("run_started", recipe=recipe)
        for name, plugin in self.trackers.items():
            try:
                self._call([plugin], "run_started", recipe=recipe)
            except ImportError as error:
                raise KdzooError(
                    f"trackers: '{name}' needs the package '{error.name}', which is not there; "
                    f"pip install 'kdzoo[{name}]', or leave it out"
                ) from error
        try:
            yield
        finally:
            self._tell_trackers("run_ended")
            self._call_others("run_ended")

    def step_logged(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        self._call_others("step_logged", step=step, metrics=metrics, stage=stage)
        self._tell_trackers("step_logged", step=step, metrics=metrics, stage=stage)

    def _tell_trackers(self, hook: str, **told: Any) -> None:
        """A tracker that fails is left out from then on: hours of training are worth more than its curves."""
        for name, plugin in list(self.trackers.items()):
            try:
                self._call([plugin], hook, **told)
            except Exception as error:
                del self.trackers[name]
                first = (str(error).splitlines() or [""])[0]
                say(f"warning: the tracker '{name}' failed and hears no more ({type(error).__name__}: {first})")

    def _call_others(self, hook: str, **told: Any) -> None:
        self._call(self.others, hook, **told)

    def _call(self, plugins: Sequence[object], hook: str, **told: Any) -> None:
        unasked = [plugin for plugin in self.manager.get_plugins() if plugin not in plugins]
        self.manager.subset_hook_caller(hook, unasked)(folder=self.folder, **told)
