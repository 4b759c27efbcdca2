"""What the user sees: one bar per stage, lines that do not break it, and the table of scores.

Progress goes to standard error, the table to standard output. On a terminal there is a bar; elsewhere plain
lines that read well in a log file. Ranks other than 0 show nothing. rich honours NO_COLOR.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import stdev

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from kdzoo.evaluate import ModelScores, RougeScores, Scores

SCREEN = Console(stderr=True, highlight=False)
"""Progress and messages. One console for both: a line printed to it appears above the bar."""

OUTPUT = Console(highlight=False)
"""Results."""

CROSS_ENTROPY = ("cross-", "entropy")
WHERE_RIGHT = ("teacher", "right")
WHERE_WRONG = ("teacher", "wrong")
ACCURACY = ("token", "accuracy")
"""Column titles are of two lines."""

LINE_SECONDS = 60.0
"""Without a terminal: a line at least this often."""

LINES = 10
"""Without a terminal: this many lines in a stage, however fast it is, and one after its first step."""


class StageProgress(ABC):
    """Told after every step; shows what it thinks fit."""

    @abstractmethod
    def update(self, step: int, loss: float | None = None, rows_per_second: float | None = None) -> None:
        """`step` of the total is done (counted from 1)."""


@contextmanager
def stage_progress(
    name: str,
    total: int,
    enabled: bool,
    console: Console = SCREEN,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[StageProgress]:
    """The progress of one stage with `total` steps; silent where not `enabled` (every rank but 0)."""
    if not enabled:
        yield _Silent()
    elif console.is_terminal and not console.is_dumb_terminal:
        with _bar_columns(console) as progress:
            yield _Bar(progress, name, total, clock)
    else:
        yield _Lines(console, name, total, clock)


def print_message(text: str, enabled: bool = True, console: Console = SCREEN) -> None:
    """One line for the user, above a bar that is running. `enabled` is false on every rank but 0."""
    if enabled:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Silent(StageProgress):
    def update(self, step: int, loss: float | None = None, rows_per_second: float | None = None) -> None:
        pass


class _Bar(StageProgress):
    """Drawn from `update` itself, ten times a second at most: no thread runs next to the training loop."""

    def __init__(self, progress: Progress, name: str, total: int, clock: Callable[[], float]) -> None:
        self.progress = progress
        self.total = total
        self.clock = clock
        self.drawn = clock()
        self.task = progress.add_task(name, total=total, facts="")
        progress.refresh()

    def update(self, step: int, loss: float | None = None, rows_per_second: float | None = None) -> None:
        self.progress.update(self.task, completed=step, facts="  ".join(_facts(loss, rows_per_second)))
        now = self.clock()
        if now - self.drawn >= 0.1 or step >= self.total:
            self.drawn = now
            self.progress.refresh()


class _Lines(StageProgress):
    """`distill  120/400  loss 2.313  1,204 rows/s  0:32 left`, every tenth of the steps, or every minute."""

    def __init__(self, console: Console, name: str, total: int, clock: Callable[[], float]) -> None:
        self.console = console
        self.name = name
        self.total = total
        self.clock = clock
        self.started = self.shown = clock()
        self.first: tuple[int, float] | None = None  # the first step shown, and when: a resumed run starts late
        self.share = -1

    def update(self, step: int, loss: float | None = None, rows_per_second: float | None = None) -> None:
        now = self.clock()
        if self.first is None:
            self.first = (step, now)
        share = step * LINES // self.total
        if share == self.share and now - self.shown < LINE_SECONDS:
            return
        self.share, self.shown = share, now
        count = f"{step:>{len(str(self.total))}}/{self.total}"
        line = "  ".join([self.name, count, *_facts(loss, rows_per_second), *self._time(step, now)])
        print_message(line, console=self.console)

    def _time(self, step: int, now: float) -> list[str]:
        """What is left, from the second step shown on; at the end, what it took."""
        assert self.first is not None
        if step >= self.total:
            return [f"took {duration(now - self.started)}"]
        first_step, first_time = self.first
        if step == first_step:
            return []
        return [f"{duration((now - first_time) / (step - first_step) * (self.total - step))} left"]


def _bar_columns(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left", style="progress.remaining"),
        console=console,
        auto_refresh=False,
        expand=True,
    )


def _facts(loss: float | None, rows_per_second: float | None) -> list[str]:
    return [
        *([] if loss is None else [f"loss {loss:.3f}"]),
        *([] if rows_per_second is None else [f"{rows_per_second:,.0f} rows/s"]),
    ]


def duration(seconds: float) -> str:
    """`0:32`, `12:05`, `3:04:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class ScoreColumn:
    """One column of a score table: one measure on one set, as text for every model that has it."""

    title: tuple[str, str]
    cells: Mapping[str, str]


def score_columns(models: Mapping[str, ModelScores]) -> list[ScoreColumn]:
    """One set's columns: Rouge-L of every decoding, cross-entropy, token accuracy.

    A measure that no model has is left out.
    """
    decodings = dict.fromkeys(decoding for scores in models.values() for decoding in scores["rouge_l"])
    columns = [
        ScoreColumn(
            ("Rouge-L", decoding),
            {m: _rouge(s["rouge_l"][decoding]) for m, s in models.items() if decoding in s["rouge_l"]},
        )
        for decoding in decodings
    ]
    entropy = {m: s["cross_entropy"] for m, s in models.items()}
    accuracy = {m: s["token_accuracy"] for m, s in models.items()}
    apart = {m: s["by_verdict"] for m, s in models.items() if "by_verdict" in s}
    columns += [
        ScoreColumn(CROSS_ENTROPY, {m: f"{value:.3f}" for m, value in entropy.items() if value is not None}),
        ScoreColumn(WHERE_RIGHT, {m: f"{found['right']:.3f}" for m, found in apart.items()}),
        ScoreColumn(WHERE_WRONG, {m: f"{found['wrong']:.3f}" for m, found in apart.items()}),
        ScoreColumn(ACCURACY, {m: f"{value:.1%}" for m, value in accuracy.items() if value is not None}),
    ]
    return [column for column in columns if column.cells]


def score_legend(scores: Scores) -> list[str]:
    """One line for every measure in the table: its unit, its direction, and what a spread is over."""
    columns = [column for models in scores.values() for column in score_columns(models)]
    titles = {column.title for column in columns}
    legend = []
    if titles - {CROSS_ENTROPY, WHERE_RIGHT, WHERE_WRONG, ACCURACY}:
        legend.append("Rouge-L: 0 to 100, higher is better.")
    if any("±" in cell for column in columns for cell in column.cells.values()):
        legend.append("±: standard deviation over decoding seeds of one trained model.")
    if CROSS_ENTROPY in titles:
        legend.append("cross-entropy: nats per token of the model's own tokenizer, lower is better.")
    if WHERE_RIGHT in titles:
        legend.append("teacher right, wrong: cross-entropy where the teacher's first choice is gold, and elsewhere.")
    if ACCURACY in titles:
        legend.append("token accuracy: response tokens that are the first choice, higher is better.")
    return legend


def print_scores(scores: Scores, console: Console = OUTPUT) -> None:
    """The table of scores: a row per model, columns per set, in as few tables as the width allows."""
    for group in _groups_that_fit(scores, console):
        console.print(_Unsqueezed(_score_table(group, console)), crop=False)
        console.print()
    for line in score_legend(scores):
        print_message(line, console=console)


@dataclass(frozen=True)
class _Unsqueezed:
    """A table that runs over a screen too narrow for it, where rich would drop digits."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width, _natural_width(self.table, console))
        yield from console.render(self.table, options.update_width(width))


def _groups_that_fit(scores: Scores, console: Console) -> list[dict[str, Mapping[str, ModelScores]]]:
    """The sets, as many side by side as fit the console's width; at least one."""
    groups: list[dict[str, Mapping[str, ModelScores]]] = []
    for name, models in scores.items():
        wider = {**groups[-1], name: models} if groups else {}
        if wider and _natural_width(_score_table(wider, console), console) <= console.width:
            groups[-1] = wider
        else:
            groups.append({name: models})
    return groups


def _score_table(scores: Scores, console: Console) -> Table:
    lines = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=lines, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    rows = {model: [Text(model)] for models in scores.values() for model in models}
    for place, (name, models) in enumerate(scores.items()):
        if place:
            table.add_column("")  # air between two sets
            for row in rows.values():
                row.append(Text())
        for first, column in enumerate(score_columns(models)):
            title = "\n".join(["" if first else name, *column.title])
            table.add_column(Text(title, justify="right"), justify="right", no_wrap=True)
            for model, row in rows.items():
                row.append(Text(column.cells.get(model, "–")))
    for model, row in rows.items():
        table.add_row(*row, style="bold" if model == "student" else None)
    return table


def _natural_width(table: Table, console: Console) -> int:
    """The characters that the table takes where nothing is wrapped."""
    return console.measure(table, options=console.options.update_width(10_000)).maximum


def _rouge(score: RougeScores) -> str:
    spread = f" ± {stdev(score['per_seed']):.2f}" if len(score["per_seed"]) > 1 else ""
    return f"{score['mean']:.2f}{spread}"
