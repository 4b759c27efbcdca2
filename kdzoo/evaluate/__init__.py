"""What a run's models are worth: answers, Rouge-L, and the shape of the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict


class RougeScores(TypedDict):
    """Rouge-L of one model on one set under one decoding, 0 to 100."""

    mean: float
    per_seed: list[float]
    """One mean per decoding seed, all of one training run; one value for greedy decoding."""


class ByVerdict(TypedDict):
    """A student's cross-entropy on held-out rows, apart where the teacher is right and where it is wrong there."""

    right: float
    wrong: float
    wrong_share: float
    """The share of the student's response tokens where the teacher is wrong, 0 to 1."""


class ModelScores(TypedDict):
    """Everything that is known of one model on one evaluation set."""

    rouge_l: dict[str, RougeScores]
    """By the name of the decoding."""
    cross_entropy: float | None
    """Nats per token of the model's own tokenizer: two tokenizers do not compare."""
    token_accuracy: float | None
    """The share of response tokens that are the model's first choice, 0 to 1."""
    by_verdict: NotRequired[ByVerdict]


HELD_OUT = "held out"
"""What scores call the rows of `data.held_out`, next to the evaluation sets."""

STUDENT, COPY = "student", "copy of the input"
"""What scores call the trained student, and an answer that repeats the input."""

Scores = Mapping[str, Mapping[str, ModelScores]]
"""Evaluation set -> model (`teacher`, `untrained`, `sft`, `student`, ...) -> its scores, as shown."""
