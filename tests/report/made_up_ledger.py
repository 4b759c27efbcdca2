"""A ledger of two methods and a baseline whose numbers can be worked out in one's head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kdzoo.compare.ledger import (
    Answers,
    Cell,
    Compared,
    Cost,
    Gold,
    Model,
    write_cell,
    write_reference_models,
    write_suite,
)

ENVIRONMENT: dict[str, Any] = {
    "python": "3.11.7",
    "packages": {"kdzoo": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.24.0"},
    "device": {"type": "cpu", "cores": 2, "threads": 1},
    "ranks": 1,
    "data": {"data.train": "abc", "evaluation.sets.seen": "def"},
    "commit": {"commit": "0123456789abcdef", "dirty": False},
}

COMPARED = Compared(
    title="Two methods",
    description="Made up.",
    pairs={"mixtral_to_gpt2": "A to B, two tokenizers"},
    recipes={"sft": "The data alone", "residual": "Residual learning", "dskd": "DSKD", "abkd": "ABKD"},
    seeds=[1, 2, 3],
    baseline="sft",
    against={"dskd": "residual"},
    left_out={"mixtral_to_gpt2": {"abkd": "needs one tokenizer"}},
)

PROMPTS = 42
LIFT = {"sft": 0.0, "residual": 5.0, "dskd": 4.9}
"""Over the baseline, of every answer; DSKD's is another one in every seed."""


def scores(recipe: str, seed: int, decoding_seed: int = 0) -> list[float]:
    """A prompt's own level, which all share, and the method's lift."""
    moved = LIFT[recipe] + 0.1 * seed + (3.0 * (seed - 2) if recipe == "dskd" else 0.0)
    return [20.0 + prompt % 7 + moved + decoding_seed / 10 for prompt in range(PROMPTS)]


def cell(recipe: str, seed: int) -> Cell:
    texts = [f"answer {prompt}" for prompt in range(PROMPTS)]
    answers = {
        "greedy": [Answers(None, texts, scores(recipe, seed))],
        "sample": [Answers(draw, texts, scores(recipe, seed, draw)) for draw in (10, 20)],
    }
    entropy = 2.0 - LIFT[recipe] / 10 + seed / 100
    return Cell(
        pair="mixtral_to_gpt2",
        recipe=recipe,
        seed=seed,
        key="key",
        resolved={"title": recipe},
        environment=ENVIRONMENT,
        student=Model(
            {"seen": answers}, {"held out": Gold(entropy, 0.5, entropy - 1, entropy + 1), "seen": Gold(entropy, 0.5)}
        ),
        curve={
            "step": [20.0, 40.0],
            "loss": [4.0, 2.0],
            "sft/cross_entropy": [4.0, 1.0 + seed],
            "sft/gradient_at_state": [3.0, None],
            **({} if recipe == "sft" else {"kd/gradient_at_state": [1.0, None]}),
        },
        cost=Cost(seconds=10.0, rows_per_second=100.0 if recipe == "sft" else 50.0, memory_gb=1.5),
    )


def write_ledger(
    folder: Path,
    seeds: tuple[int, ...] = (1, 2, 3),
    without: tuple[tuple[str, int], ...] = (),
    environments: dict[tuple[str, int], dict[str, Any]] | None = None,
) -> Path:
    """The suite's file; `without` are cells that have not run, `environments` replace parts of some."""
    suite = folder / "two.json"
    write_suite(suite, replace(COMPARED, seeds=list(seeds)))
    for recipe in LIFT:
        for seed in seeds:
            if (recipe, seed) not in without:
                made = cell(recipe, seed)
                other = (environments or {}).get((recipe, seed), {})
                write_cell(suite, replace(made, environment={**made.environment, **other}))
    texts = ["?"] * PROMPTS
    teacher = Model({"seen": {"greedy": [Answers(None, texts, [40.0] * PROMPTS)]}}, {"held out": Gold(1.0, 0.75)})
    write_reference_models(suite, "mixtral_to_gpt2", {"teacher": teacher})
    return suite
