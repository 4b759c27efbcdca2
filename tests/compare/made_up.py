"""Runs that are made up."""

from __future__ import annotations

from pathlib import Path

from kdzoo.compare.suite import Cell
from kdzoo.evaluate import ByVerdict, ModelScores, RougeScores
from kdzoo.evaluate.scoring import Answer
from kdzoo.run.folder import RunFolder


def made_up_run(folder: Path, cell: Cell, score: float = 50.0, text: str = "answer") -> None:
    """What a run of two prompts leaves, as far as a comparison reads it."""
    run = RunFolder.create(cell.loaded.recipe.title, folder)
    run.write_recipe(cell.loaded.resolved)
    run.write_environment({"ranks": 1, "data": {"data.train": "abc"}})
    for step in range(1, 41):
        shares = {"sft/gradient_at_state": 0.25} if step % 20 == 1 else {}
        run.log_step(
            {"step": step, "loss": 4.0 / step, **shares, "rows": 100.0, "rows_per_second": 50.0, "memory_gb": 1.0},
            "distill",
        )
    scores: dict[str, dict[str, ModelScores]] = {
        "held out": {
            "student": ModelScores(
                rouge_l={},
                cross_entropy=2.0,
                token_accuracy=0.5,
                by_verdict=ByVerdict(right=1.0, wrong=3.0, wrong_share=0.5),
            )
        },
        "seen": {},
    }
    for model in ("copy of the input", "teacher", "student"):
        copied = model.startswith("copy")
        decodings: dict[str, list[int | None]] = {"greedy": [None], "sample": [10, 20]}
        for decoding, seeds in ({"copy": [None]} if copied else decodings).items():
            answers = [
                Answer(str(row), seed, "?", f"{text} {row}", ["gold"], score + row)
                for seed in seeds
                for row in range(2)
            ]
            run.write_predictions("seen", model, decoding, answers)
        rouge = {
            name: RougeScores(mean=score + 0.5, per_seed=[score + 0.5] * len(seeds))
            for name, seeds in decodings.items()
        }
        gold = (None, None) if copied else (1.5, 0.25)
        scores["seen"][model] = ModelScores(rouge_l=rouge, cross_entropy=gold[0], token_accuracy=gold[1])
    run.write_scores(scores)
