"""Rouge-L as this literature reports it: F-measure of stemmed words, the best reference, times 100."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rouge_score.rouge_scorer import RougeScorer

from kdzoo.errors import KdzooError


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Rouge-L of every prediction against its own references, 0 to 100.

    `rouge_score` lower-cases and keeps a-z and 0-9 only: a text in another script has no words and scores 0.
    Raises KdzooError where predictions and references differ in number, or a row has no reference.
    """
    if len(predictions) != len(references):
        raise KdzooError(
            f"rouge-l: {len(predictions)} predictions for {len(references)} rows of references; "
            "score every row, none is cut off in silence"
        )
    for row, texts in enumerate(references):
        assert not isinstance(texts, str), "references are a list of texts per row"
        if not texts:
            raise KdzooError(f"rouge-l: row {row} has no reference; give it one, or leave the row out")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        100.0 * scorer.score_multi(texts, prediction)["rougeL"].fmeasure
        for prediction, texts in zip(predictions, references, strict=True)
    ]


def mean_score(scores: Sequence[float]) -> float:
    """The mean over rows. Raises KdzooError where there are none."""
    if not scores:
        raise KdzooError("rouge-l: no row was scored; an evaluation set needs at least one")
    return fmean(scores)
