"""What gets the metrics of each step besides the log: the plugins' hook, and the trackers that the recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdzoo.api.tracker import Tracker
from kdzoo.errors import KdzooError
from kdzoo.plugin.registry import Registry
from kdzoo.recipe.load import LoadedRecipe
from kdzoo.run import messages
from kdzoo.run.progress import print_message


class Trackers:
    """The trackers of the run in `folder`, on the first rank."""

    def __init__(self, registry: Registry, folder: Path) -> None:
        self.registry = registry
        self.folder = folder
        self.trackers: dict[str, Tracker] = {}

    @contextmanager
    def open(self, loaded: LoadedRecipe) -> Iterator[None]:
        """Start them, and close them when the block ends, however it ends. Raises KdzooError: no package, no login."""
        try:
            for name in dict.fromkeys(loaded.recipe.trackers):
                self.trackers[name] = self._make(name, loaded.resolved)
            yield
        finally:
            for name, tracker in list(self.trackers.items()):
                with self._disabled_if_it_fails(name):
                    tracker.close()

    def _make(self, name: str, recipe: Mapping[str, Any]) -> Tracker:
        try:
            return self.registry.of(Tracker)[name](self.folder, recipe)
        except ImportError as error:
            raise KdzooError(
                f"trackers: '{name}' needs the package '{error.name}', which is not there; "
                f"pip install 'kdzoo[{name}]', or leave it out"
            ) from error
        except Exception as error:  # each library has its own: no login, no network, no place to write
            raise KdzooError(
                f"trackers: '{name}' cannot start ({messages.first_line(error)}); mend it, or leave it out"
            ) from error

    def step_logged(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        self.registry.hook.step_logged(step=step, metrics=metrics, stage=stage, folder=self.folder)
        for name, tracker in list(self.trackers.items()):
            with self._disabled_if_it_fails(name):
                tracker.step_logged(step, metrics, stage)

    @contextmanager
    def _disabled_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            del self.trackers[name]
            print_message(messages.tracker_disabled(name, error))
