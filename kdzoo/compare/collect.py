"""A finished run folder as an entry of the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from kdzoo.compare import ledger
from kdzoo.compare.suite import Cell
from kdzoo.evaluate import COPY, STUDENT, ModelScores, Scores
from kdzoo.run.folder import RunFolder

POINTS = 20
"""Of a curve; each is the mean over the steps since the one before."""

ELSEWHERE = ("command", "git")
"""Of the environment: what says where somebody works."""


def collect(cell: Cell, folder: Path) -> tuple[ledger.Cell, dict[str, ledger.Model]]:
    """The cell's student, and the reference models that were evaluated with it."""
    scores: Scores = _read(folder / "scores.json")
    models = dict.fromkeys(name for found in scores.values() for name in found)
    read = {name: _model(RunFolder(folder), scores, name) for name in models}
    metrics = _json_lines(folder / "metrics.jsonl")
    environment = _read(folder / "environment.json")
    entry = ledger.Cell(
        pair=cell.pair,
        recipe=cell.recipe,
        seed=cell.seed,
        key=cell.key,
        resolved=cell.loaded.resolved,
        environment={
            **{name: value for name, value in environment.items() if name not in ELSEWHERE},
            "commit": environment["git"]["kdzoo"],
        },
        student=read.pop(STUDENT),
        curve=curve(metrics),
        cost=cost(metrics),
    )
    if any(source.lab is None for source in cell.loaded.recipe.evaluation.sets.values()):
        # It is the rows' own text, which somebody who shares a ledger may not be free to share.
        read.pop(COPY, None)
    return entry, {name: model for name, model in read.items() if model.answers}


def curve(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Every metric as means over windows of steps; none where no step of a window has it."""
    size = max(1, len(metrics) // POINTS)
    windows = [metrics[start : start + size] for start in range(0, len(metrics), size)]
    names = dict.fromkeys(name for step in metrics for name in step if name != "step")
    found: dict[str, list[float | None]] = {"step": [float(window[-1]["step"]) for window in windows]}
    for name in names:
        values = [[step[name] for step in window if step.get(name) is not None] for window in windows]
        found[name] = [_short(fmean(some)) if some else None for some in values]
    return found


def cost(metrics: Sequence[Mapping[str, float]]) -> ledger.Cost:
    """A slow step (a checkpoint, another process) counts for the time, not for the speed."""
    speeds = [step["rows_per_second"] for step in metrics]
    return ledger.Cost(
        seconds=round(sum(step["rows"] / step["rows_per_second"] for step in metrics), 2),
        rows_per_second=round(median(speeds), 1),
        memory_gb=round(max(step["memory_gb"] for step in metrics), 3),
    )


def _model(folder: RunFolder, scores: Scores, name: str) -> ledger.Model:
    answers: dict[str, dict[str, list[ledger.Answers]]] = {}
    gold: dict[str, ledger.Gold] = {}
    for set_name, models in scores.items():
        if name not in models:
            continue
        found = models[name]
        if found["rouge_l"]:
            files = {decoding: folder.predictions_of(set_name, name, decoding) for decoding in found["rouge_l"]}
            copied = folder.predictions_of(set_name, name, "copy")  # of the input, whatever is decoded
            answers[set_name] = {d: _answers(file if file.is_file() else copied) for d, file in files.items()}
        if found["cross_entropy"] is not None:
            gold[set_name] = _gold(found)
    return ledger.Model(answers, gold)


def _answers(file: Path) -> list[ledger.Answers]:
    """By decoding seed, in the order in which they ran."""
    rows = _json_lines(file)
    return [
        ledger.Answers(
            seed,
            [row["prediction"] for row in rows if row["seed"] == seed],
            [round(row["rouge_l"], 4) for row in rows if row["seed"] == seed],
        )
        for seed in dict.fromkeys(row["seed"] for row in rows)
    ]


def _json_lines(file: Path) -> list[Any]:
    with file.open(encoding="utf-8") as lines:  # which end at line feeds alone: an answer may hold U+2028 as it is
        return [json.loads(line) for line in lines]


def _gold(scores: ModelScores) -> ledger.Gold:
    entropy, accuracy = scores["cross_entropy"], scores["token_accuracy"]
    assert entropy is not None and accuracy is not None
    apart = scores.get("by_verdict")
    right, wrong = (None, None) if apart is None else (apart["right"], apart["wrong"])
    return ledger.Gold(entropy, accuracy, right, wrong)


def _short(value: float) -> float:
    """Six digits are more than a curve shows."""
    return float(f"{value:.6g}")


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
