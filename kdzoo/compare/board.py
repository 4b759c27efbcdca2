"""What the user sees of a comparison: a table of cells that fills up; without a terminal, a line per cell."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdzoo.compare.suite import Cell
from kdzoo.run.progress import SCREEN, duration, print_message

State = Literal["waiting", "running", "done", "failed"]


@dataclass
class Shown:
    """One cell as the table shows it."""

    cell: Cell
    steps: int | None
    state: State = "waiting"
    rouge_l: float | None = None
    since: float = 0.0
    metrics: Path | None = None


class Board:
    """Receives the state of each cell, from any thread."""

    def __init__(self, cells: Sequence[Cell], jobs: int, console: Console = SCREEN) -> None:
        self.shown = {(cell.pair, cell.name): Shown(cell, cell.loaded.recipe.stages["distill"].steps) for cell in cells}
        self.jobs = jobs
        self.console = console
        self.live = console.is_terminal and not console.is_dumb_terminal
        self.failed: dict[str, tuple[str, Path]] = {}
        """Cell -> why, and its log."""
        self.took: list[float] = []
        self.lock = threading.Lock()

    def waiting(self, cell: Cell) -> None:
        self._of(cell).state = "waiting"

    def started(self, cell: Cell, metrics: Path) -> None:
        shown = self._of(cell)
        shown.state, shown.since, shown.metrics = "running", time.monotonic(), metrics

    def done(self, cell: Cell, rouge_l: float | None, seconds: float | None = None) -> None:
        """`seconds`: what it took; none for a cell that was there."""
        shown = self._of(cell)
        shown.state, shown.rouge_l = "done", rouge_l
        if seconds is not None:
            with self.lock:
                self.took.append(seconds)
            self._line(cell, f"Rouge-L {_score(rouge_l)}, took {duration(seconds)}{self._left()}")

    def fail(self, cell: Cell, why: str, log: Path) -> None:
        self._of(cell).state = "failed"
        self.failed[f"{cell.pair} {cell.name}"] = (why, log)
        self._line(cell, f"failed: {why} ({log})")

    def count(self, *states: State) -> int:
        return sum(shown.state in states for shown in self.shown.values())

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """The table on the screen while the block runs, where there is a terminal."""
        if not self.live:
            yield
            return
        with Live(get_renderable=self.table, console=self.console, refresh_per_second=2, transient=True):
            yield

    def table(self) -> Group:
        seeds = list(dict.fromkeys(shown.cell.seed for shown in self.shown.values()))
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right", min_width=9)
        pairs = list(dict.fromkeys(pair for pair, _ in self.shown))
        for pair in pairs:
            table.add_row(Text(pair, style="bold"))
            of_pair = [shown for (of, _), shown in self.shown.items() if of == pair]
            for recipe in self._near_the_work(of_pair, self.console.height - 4 - len(pairs)):
                cells = {shown.cell.seed: shown for shown in of_pair if shown.cell.recipe == recipe}
                table.add_row(f"  {recipe}", *(_cell(cells[seed]) if seed in cells else "" for seed in seeds))
        return Group(Text(self.summary()), table)

    def summary(self) -> str:
        failed = f", {self.count('failed')} failed" if self.failed else ""
        return f"{self.count('done')} of {len(self.shown)} cells done{failed}{self._left()}"

    def _near_the_work(self, shown: Sequence[Shown], height: int) -> list[str]:
        """A screen too low for every recipe shows those that are running or next."""
        recipes = list(dict.fromkeys(one.cell.recipe for one in shown))
        fits = max(3, height)
        if len(recipes) <= fits:
            return recipes
        at_work = [one for state in ("running", "waiting") for one in shown if one.state == state]
        first = recipes.index(at_work[0].cell.recipe) if at_work else 0
        start = max(0, min(first - 1, len(recipes) - fits))
        return recipes[start : start + fits]

    def _left(self) -> str:
        waiting = self.count("waiting", "running")
        if not self.took or not waiting:
            return ""
        return f", about {duration(sum(self.took) / len(self.took) * waiting / self.jobs)} left"

    def _line(self, cell: Cell, text: str) -> None:
        if not self.live:
            done = self.count("done", "failed")
            print_message(
                f"{done:>{len(str(len(self.shown)))}}/{len(self.shown)}  {cell.pair}  {cell.name}  {text}",
                console=self.console,
            )

    def _of(self, cell: Cell) -> Shown:
        return self.shown[cell.pair, cell.name]


def _cell(shown: Shown) -> Text:
    match shown.state:
        case "waiting":
            return Text("·", style="dim")
        case "failed":
            return Text("failed", style="red")
        case "done":
            return Text(_score(shown.rouge_l), style="green")
    return Text(f"{_share(shown)} {duration(time.monotonic() - shown.since)}", style="yellow")


def _share(shown: Shown) -> str:
    """How far the stage `distill` is, from the log that the run writes."""
    if shown.metrics is None or not shown.steps or not shown.metrics.is_file():
        return "…"
    with shown.metrics.open("rb") as lines:
        return f"{sum(1 for _ in lines) / shown.steps:.0%}"


def _score(rouge_l: float | None) -> str:
    return "–" if rouge_l is None else f"{rouge_l:.2f}"
