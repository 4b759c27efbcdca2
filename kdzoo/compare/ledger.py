"""The ledger of a comparison: for every trained student what it was made from and every answer it gave, in plain files.

    <suite>.json                    what is compared: titles, recipes in their order, seeds, the baseline
    <pair>/<recipe>-<seed>.json.gz  one trained student, for every suite of the folder
    <pair>/beside.json.gz           the reference models of all of them: the teacher, the untrained student, ...

A report is made from these files alone, so that its numbers can be made again by anybody who has them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kdzoo.errors import KdzooError


@dataclass(frozen=True)
class Answers:
    """What a model answered to the prompts of a set, in their order, under one decoding and decoding seed."""

    seed: int | None
    """The decoding seed; none where nothing is drawn."""
    texts: list[str]
    rouge_l: list[float]
    """Rouge-L of each answer, 0 to 100."""


@dataclass(frozen=True)
class Gold:
    """How a model reads the gold responses of a set."""

    cross_entropy: float
    """Nats per token of the model's own tokenizer."""
    token_accuracy: float
    """The share of response tokens that are its first choice, 0 to 1."""
    right: float | None = None
    """A student's cross-entropy where the teacher's first choice is gold ..."""
    wrong: float | None = None
    """... and elsewhere."""


@dataclass(frozen=True)
class Model:
    """What is known of one model on every evaluation set."""

    answers: dict[str, dict[str, list[Answers]]]
    """Set -> decoding -> one entry per decoding seed."""
    gold: dict[str, Gold]
    """Set -> how it reads the gold responses; "held out" are the rows of `data.held_out`."""


@dataclass(frozen=True)
class Cost:
    """What the stage `distill` took on one machine."""

    seconds: float
    rows_per_second: float
    """Response tokens per second."""
    memory_gb: float
    """The most that rank 0 held (on a GPU: allocated) after any step, in GiB."""


@dataclass(frozen=True)
class Cell:
    """One recipe on one pair with one training seed."""

    pair: str
    recipe: str
    seed: int
    key: str
    """A hash of the resolved recipe."""
    resolved: dict[str, Any]
    """The resolved recipe."""
    environment: dict[str, Any]
    """Versions, commit and device; under `data` a hash of the rows of every source."""
    student: Model
    curve: dict[str, list[float | None]]
    """Of some optimizer steps ("step"), the metrics of that step by name: "loss", "<slot>/<term>", ..., and
    "<slot>/gradient_at_state", the norm of a slot's weighted gradient at the student's last state."""
    cost: Cost


@dataclass(frozen=True)
class Compared:
    """What a comparison compares: the suite's file of the ledger."""

    title: str
    description: str
    pairs: dict[str, str]
    """Pair -> which models, in words; in the order of the report."""
    recipes: dict[str, str]
    """Recipe -> its title, in the order of the report."""
    seeds: list[int]
    baseline: str
    """The recipe that every other one is compared with ..."""
    against: dict[str, str] = field(default_factory=dict)
    """... but for these: recipe -> what it is compared with."""
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    """Pair -> recipe -> why it does not fit the pair."""


@dataclass(frozen=True)
class PairLedger:
    """All that a comparison knows on one pair. Cells that have not run yet are not there."""

    cells: dict[str, dict[int, Cell]]
    """Recipe -> training seed -> the student."""
    reference_models: dict[str, Model]
    """The models that every student is shown with: the teacher, the untrained student, ..."""


@dataclass(frozen=True)
class Ledger:
    """A whole ledger, read."""

    suite: Compared
    pairs: dict[str, PairLedger]


def cell_file(suite: Path, pair: str, recipe: str, seed: int) -> Path:
    """Where a student is kept; `suite` is the suite's file."""
    return suite.parent / pair / f"{recipe}-{seed}.json.gz"


def reference_models_file(suite: Path, pair: str) -> Path:
    return suite.parent / pair / "beside.json.gz"


def read_ledger(suite: Path) -> Ledger:
    """The suite in the file `suite` with all its cells. Raises KdzooError where a file is not what it should be."""
    compared = _read(suite, Compared)
    return Ledger(compared, {pair: _read_pair(suite, pair, compared) for pair in compared.pairs})


def _read_pair(suite: Path, pair: str, compared: Compared) -> PairLedger:
    cells: dict[str, dict[int, Cell]] = {}
    for recipe in compared.recipes:
        found = {seed: cell_file(suite, pair, recipe, seed) for seed in compared.seeds}
        kept = {seed: read_cell(file) for seed, file in found.items() if file.is_file()}
        if kept:
            cells[recipe] = kept
    file = reference_models_file(suite, pair)
    return PairLedger(cells, _read(file, dict[str, Model]) if file.is_file() else {})


def write_suite(suite: Path, compared: Compared) -> None:
    _write(suite, compared, Compared)


def write_cell(suite: Path, cell: Cell) -> None:
    _write(cell_file(suite, cell.pair, cell.recipe, cell.seed), cell, Cell)


def read_cell(file: Path) -> Cell:
    return _read(file, Cell)


def write_reference_models(suite: Path, pair: str, models: Mapping[str, Model]) -> None:
    _write(reference_models_file(suite, pair), dict(models), dict[str, Model])


def mean_rouge(model: Model) -> float | None:
    """Rouge-L under the first decoding, its mean over sets; none where nothing was generated."""
    first = [next(iter(by_decoding.values())) for by_decoding in model.answers.values() if by_decoding]
    return fmean(fmean(fmean(one.rouge_l) for one in answers) for answers in first) if first else None


def _read(file: Path, kind: Any) -> Any:
    try:
        content = file.read_bytes()
        return TypeAdapter(kind).validate_json(gzip.decompress(content) if file.suffix == ".gz" else content)
    except FileNotFoundError as error:
        raise KdzooError(f"{file}: no such file; give the JSON file of a suite that 'kdzoo compare' wrote") from error
    except (OSError, EOFError, zlib.error) as error:
        raise KdzooError(f"{file}: cannot be read ({error}); check that '{file.parent}' is a ledger") from error
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"]) or "the file"
        raise KdzooError(
            f"{file}: {at}: {first['msg'].lower()}; write the ledger again with 'kdzoo compare'"
        ) from error


def _write(file: Path, content: Any, kind: Any) -> None:
    """Whole or not at all: an interrupted comparison leaves no half file. The same content gives the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = TypeAdapter(kind).dump_python(content, mode="json")
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=None if file.suffix == ".gz" else 2) + "\n"
    work = file.with_name(f".{file.name}.part")
    work.write_bytes(gzip.compress(text.encode(), mtime=0) if file.suffix == ".gz" else text.encode())
    work.replace(file)
