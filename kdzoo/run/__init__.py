"""A run: a recipe, on ranks, into a folder."""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdzoo.errors import KdzooError
from kdzoo.recipe.load import load_recipe


@dataclass(frozen=True)
class RunTask:
    """What every rank gets; it loads the recipe itself, so that nothing but text crosses processes."""

    recipe_path: Path
    on: tuple[Path, ...]
    sets: tuple[str, ...]
    plugins: tuple[Path, ...]
    out: Path | None

    def __call__(self) -> None:
        from kdzoo.run.pipeline import run_recipe

        run_recipe(load_recipe(self.recipe_path, self.on, self.sets, self.plugins), self.out)


@dataclass(frozen=True)
class Job:
    """A task on one rank."""

    task: Callable[[], None]
    faults: Path
    """A folder where ranks leave what ended them, since several may end at once."""

    def __call__(self) -> int:
        from kdzoo.engine import distributed

        try:
            self.task()
        except KdzooError as error:
            self._leave("fault", distributed.rank(), str(error))
            return 2
        except Exception as error:
            kind: Kind = "lost" if distributed.lost_a_rank(error) else "internal"
            self._leave(kind, distributed.rank(), traceback.format_exc())
            return 1
        finally:
            distributed.stop()  # and the others notice: what ended this rank must be on disk by now
        return 0

    def _leave(self, kind: Kind, rank: int, text: str) -> None:
        (self.faults / f"{kind}-{rank:05d}").write_text(text)


Kind = Literal["fault", "internal", "lost"]
"""Why a rank ended: the user can mend it; we have to; another rank ended first."""


def raise_or_print(faults: Path, code: int) -> None:
    """What the ranks left in `faults`, each text once: raises a user's fault, else prints tracebacks."""
    left: dict[str, list[str]] = {"fault": [], "internal": [], "lost": []}
    for file in sorted(faults.iterdir()):
        left[file.name.partition("-")[0]].append(file.read_text())
    if left["fault"]:
        raise KdzooError(left["fault"][0])
    if code < 0:
        raise KdzooError(f"ranks: one was ended by {signal.Signals(-code).name}; if nobody sent it, memory ran out")
    for text in dict.fromkeys(left["internal"] or left["lost"]):
        sys.stderr.write(text)


def launch_run(
    recipe_path: Path,
    on: Sequence[Path] = (),
    sets: Sequence[str] = (),
    plugins: Sequence[Path] = (),
    ranks: int | None = None,
    out: Path | None = None,
) -> int:
    """Validate, start the ranks, run. Returns the exit code; a user fault of any rank is raised once, here."""
    recipe = load_recipe(recipe_path, on, sets, plugins).recipe
    from kdzoo.data.schedule import micro_batch_of
    from kdzoo.engine.distributed import default_ranks, launched_from_outside

    ranks = ranks or default_ranks()
    if not launched_from_outside():
        for name, stage in recipe.stages.items():
            micro_batch_of(stage, ranks, f"stages.{name}")  # before a process is started for nothing
    return launch(RunTask(recipe_path, tuple(on), tuple(sets), tuple(plugins), out), ranks)


def launch(task: Callable[[], None], ranks: int | None) -> int:
    """The task on every rank. Returns the exit code; a user fault of any rank is raised once, here."""
    from kdzoo.engine.distributed import default_ranks, run_on_ranks

    with tempfile.TemporaryDirectory(prefix="kdzoo-") as faults:
        code = run_on_ranks(ranks or default_ranks(), Job(task, Path(faults)))
        raise_or_print(Path(faults), code)
    return code
