"""A comparison from its first cell to its report: what is missing runs, what is there is kept, failures stop nothing.

Each cell is a run of its own, in processes of its own, from a file that holds its whole recipe. A folder of cells
serves any number of suites: a cell is found again by the hash of all that its numbers depend on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from kdzoo.compare import ledger
from kdzoo.compare.board import Board
from kdzoo.compare.collect import collect
from kdzoo.compare.suite import Cell, LoadedSuite
from kdzoo.errors import KdzooError, RecipeError
from kdzoo.plugin.registry import load_plugins
from kdzoo.recipe.merge import merge_patch
from kdzoo.run.context import open_context
from kdzoo.run.losses import check_tokenizers, resolve_losses
from kdzoo.run.progress import print_message

TWO_TOKENIZERS = "compares two models token by token, and the pair has two tokenizers"

GRACE = 20.0
"""Seconds that a run has to end after it was interrupted."""


@dataclass
class Comparison:
    """A suite, and where its cells and its ledger are."""

    suite: LoadedSuite
    cells: Path
    """Run folders, `<pair>/<recipe>-<seed>-<key>`."""
    ledger: Path
    """The suite's file of the ledger; cells are kept in folders next to it."""
    report: Callable[[Path], None]
    """Makes the report of a ledger's suite, however much of it there is."""
    jobs: int = 1
    ranks: int | None = None
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    """Pair -> recipe -> why it does not fit."""

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.guard = threading.Lock()

    def run(self) -> int:
        """Everything that is missing, and the report. Returns the exit code: 1 where a cell failed."""
        with alone(self.cells), terminated_as_interrupted():
            board, missing = self.look()
            self.write_suite()
            print_message(board.summary())
            try:
                with board.drawn():
                    for cells in missing.values():
                        # The first one makes what the others share: the trained teacher, the reference models.
                        self.run_cells(cells[:1], board)
                        self.run_cells(cells[1:], board)
            except KeyboardInterrupt:
                print_message(f"{board.summary()}; run the same command again to continue")
                raise
            finally:
                if board.count("done"):
                    self.report(self.ledger)
        print_message(board.summary())
        for name, (why, log) in board.failed.items():
            print_message(f"failed: {name}: {why} ({log})")
        return 1 if board.failed else 0

    def list_missing(self) -> int:
        board, missing = self.look()
        print_message(board.summary())
        for pair, cells in missing.items():
            for recipe in dict.fromkeys(cell.recipe for cell in cells):
                seeds = ", ".join(str(cell.seed) for cell in cells if cell.recipe == recipe)
                print_message(f"missing: {pair}  {recipe}  seeds {seeds}")
        return 0

    def look(self) -> tuple[Board, dict[str, list[Cell]]]:
        """What there is and what is missing, pair by pair; prints what does not fit."""
        self.leave_out_what_does_not_fit()
        board = Board([cell for pair in self.suite.pairs for cell in self.fitting(pair)], self.jobs)
        for pair, recipes in self.left_out.items():
            for why in dict.fromkeys(recipes.values()):
                names = ", ".join(name for name, reason in recipes.items() if reason == why)
                print_message(f"{pair}: leaves out {names}: {why}")
        return board, {
            pair: [cell for cell in self.fitting(pair) if not self.kept(cell, board)] for pair in self.suite.pairs
        }

    def fitting(self, pair: str) -> list[Cell]:
        left_out = self.left_out.get(pair, {})
        return [cell for cell in self.suite.of(pair) if cell.recipe not in left_out]

    def leave_out_what_does_not_fit(self) -> None:
        """A loss that needs one tokenizer is no fault of a suite with two: the report shows that it does not fit."""
        for pair in self.suite.pairs:
            cells = self.suite.of(pair)
            first = cells[0].loaded
            context = open_context(first.recipe, load_plugins(first.plugin_files), torch.device("cpu"))
            for cell in cells:
                own = replace(context, recipe=cell.loaded.recipe)
                losses = resolve_losses(own, cell.loaded.recipe.losses, own.models, "losses")
                try:
                    check_tokenizers(own, losses)
                except RecipeError:
                    self.left_out.setdefault(pair, {})[cell.recipe] = TWO_TOKENIZERS

    def write_suite(self) -> None:
        suite = self.suite.suite
        titles = {cell.recipe: cell.loaded.recipe.title for cell in self.suite.cells}
        pairs = {cell.pair: cell.loaded.recipe.pair or cell.pair for cell in self.suite.cells}
        compared = ledger.Compared(
            title=suite.title,
            description=suite.description,
            pairs=pairs,
            recipes=titles,
            seeds=suite.seeds,
            baseline=self.suite.baseline,
            against=suite.against,
            left_out=self.left_out,
        )
        ledger.write_suite(self.ledger, compared)

    def kept(self, cell: Cell, board: Board) -> bool:
        """Whether the cell is in the ledger, or can be put there from a run folder that is finished."""
        file = ledger.cell_file(self.ledger, cell.pair, cell.recipe, cell.seed)
        if file.is_file():
            found = ledger.read_cell(file)
            if found.key != cell.key:
                raise KdzooError(
                    f"{file}: '{cell.name}' was made from another recipe; "
                    "name another folder with '--ledger', or remove this file"
                )
            board.done(cell, ledger.mean_rouge(found.student))
            return True
        if (self.folder(cell) / "scores.json").is_file():
            self.keep(cell, board)
            return True
        board.waiting(cell)
        return False

    def folder(self, cell: Cell) -> Path:
        return self.cells / cell.pair / f"{cell.name}-{cell.key[:8]}"

    def keep(self, cell: Cell, board: Board, seconds: float | None = None) -> None:
        """A finished run into the ledger."""
        entry, reference_models = collect(cell, self.folder(cell))
        ledger.write_cell(self.ledger, entry)
        if not ledger.reference_models_file(self.ledger, cell.pair).is_file():
            ledger.write_reference_models(self.ledger, cell.pair, reference_models)
        board.done(cell, ledger.mean_rouge(entry.student), seconds)

    def run_cells(self, cells: Sequence[Cell], board: Board) -> None:
        pool = ThreadPoolExecutor(self.jobs)
        try:
            futures: list[Future[None]] = [pool.submit(self.run_cell, cell, board) for cell in cells]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            self.stopping.set()
            self.interrupt()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def run_cell(self, cell: Cell, board: Board) -> None:
        """One run, into a folder that gets its name when it is whole."""
        if self.stopping.is_set():
            return
        target = self.folder(cell)
        work = target.with_name(f".{target.name}.part")
        shutil.rmtree(work, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        recipe, log = target.with_suffix(".json"), target.with_suffix(".log")
        recipe.write_text(json.dumps(whole(cell), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        board.started(cell, work / "metrics.jsonl")
        began = time.monotonic()
        code = self.process(cell, recipe, work, log)
        if self.stopping.is_set():
            shutil.rmtree(work, ignore_errors=True)
            return
        if code:
            board.fail(cell, reason(log), log)
            return
        shutil.rmtree(work / "checkpoints", ignore_errors=True)  # the student is exported; nobody resumes a cell
        work.rename(target)
        self.keep(cell, board, time.monotonic() - began)

    def process(self, cell: Cell, recipe: Path, work: Path, log: Path) -> int:
        command = [sys.executable, "-m", "kdzoo", "run", str(recipe), "--out", str(work)]
        command += ["--ranks", str(self.ranks)] if self.ranks else []
        with log.open("wb") as output:
            # A session of its own: ctrl-C reaches us alone, and we decide what it means for a run.
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=self.threads(), start_new_session=True
            )
            with self.guard:
                self.running.add(process)
            try:
                return process.wait()
            finally:
                with self.guard:
                    self.running.discard(process)

    def threads(self) -> dict[str, str]:
        """The environment of a run: runs at a time share the cores."""
        each = max(1, (os.cpu_count() or 1) // (self.jobs * (self.ranks or 1)))
        return {"OMP_NUM_THREADS": str(each), **os.environ}

    def interrupt(self) -> None:
        """End the runs that are under way, with all their ranks."""
        with self.guard:
            running = list(self.running)
        for process in running:
            _signal(process, signal.SIGINT)
        until = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)


def whole(cell: Cell) -> Mapping[str, object]:
    """The cell's resolved recipe as a file that stands anywhere: loose plugins by their whole path."""
    plugins = [str(file.resolve()) for file in cell.loaded.plugin_files]
    return merge_patch(cell.loaded.resolved, {"plugins": plugins or None})


def reason(log: Path) -> str:
    """Why a run failed, from its log: the line with the error, else the last one."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines[-1:] or ["the run printed nothing"])[0]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One comparison at a time works in a folder of cells."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        with lock:
            yield
    except Timeout as error:
        raise KdzooError(f"--out: another comparison is using '{folder}'; wait for it, or name another") from error
    except OSError as error:
        raise KdzooError(f"--out: '{folder}' cannot be written ({error.strerror}); name another folder") from error


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """A scheduler's SIGTERM ends the runs as ctrl-C does: they are in sessions of their own and would go on."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
