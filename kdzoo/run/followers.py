"""Who hears of a run's steps beside its log: plugins that always do, and the trackers that its recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdzoo.errors import KdzooError
from kdzoo.plugin.contracts import Tracker
from kdzoo.plugin.registry import Registry
from kdzoo.recipe.load import LoadedRecipe
from kdzoo.run.progress import say


class Followers:
    """Of the run in `folder`, on the first rank."""

    def __init__(self, registry: Registry, folder: Path) -> None:
        self.registry = registry
        self.folder = folder
        self.trackers: dict[str, Tracker] = {}

    @contextmanager
    def following(self, loaded: LoadedRecipe) -> Iterator[None]:
        """From before the first step to the run's end, whatever ends it. Raises KdzooError: no package, no login."""
        try:
            for name in dict.fromkeys(loaded.recipe.trackers):
                self.trackers[name] = self._made(name, loaded.resolved)
            yield
        finally:
            for name, tracker in list(self.trackers.items()):
                with self._left_out_if_it_fails(name):
                    tracker.close()

    def _made(self, name: str, recipe: Mapping[str, Any]) -> Tracker:
        try:
            return self.registry.trackers[name](self.folder, recipe)
        except ImportError as error:
            raise KdzooError(
                f"trackers: '{name}' needs the package '{error.name}', which is not there; "
                f"pip install 'kdzoo[{name}]', or leave it out"
            ) from error
        except Exception as error:  # each library has its own: no login, no network, no place to write
            raise KdzooError(
                f"trackers: '{name}' cannot start ({_one_line(error)}); mend it, or leave it out"
            ) from error

    def step_logged(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        self.registry.hook.step_logged(step=step, metrics=metrics, stage=stage, folder=self.folder)
        for name, tracker in list(self.trackers.items()):
            with self._left_out_if_it_fails(name):
                tracker.step_logged(step, metrics, stage)

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            del self.trackers[name]
            say(f"warning: the tracker '{name}' failed and hears no more ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
