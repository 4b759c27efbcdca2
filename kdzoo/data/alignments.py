"""Alignments of a whole dataset, made once per dataset, pair of tokenizers and aligner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kdzoo.api.aligner import Aligner, Alignment, Tokens
from kdzoo.cache import cached_folder

FILE = "alignments.npz"


def cached_alignments(
    aligner: Aligner, made_from: Mapping[str, Any], student: Sequence[Tokens], teacher: Sequence[Tokens]
) -> list[Alignment]:
    """The alignment of every response, from the cache where `made_from` is there.

    `made_from` names all that decides them: rows, both encodings, the aligner with its parameters and its code.
    """

    def build(folder: Path) -> None:
        found = [aligner.align(mine, yours) for mine, yours in zip(student, teacher, strict=True)]
        pairs, pair_ends = _stacked([alignment.pairs for alignment in found], 2)
        spans, span_ends = _stacked([alignment.spans for alignment in found], 4)
        np.savez(folder / FILE, pairs=pairs, pair_ends=pair_ends, spans=spans, span_ends=span_ends)

    with np.load(cached_folder("alignments", made_from, build) / FILE) as stored:
        pairs = _apart(stored["pairs"], stored["pair_ends"])
        spans = _apart(stored["spans"], stored["span_ends"])
    return [Alignment(p, s) for p, s in zip(pairs, spans, strict=True)]


def _stacked(groups: Sequence[Sequence[tuple[int, ...]]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """All tuples below each other, and where each group ends."""
    rows = np.array([row for group in groups for row in group], dtype=np.int32).reshape(-1, width)
    return rows, np.cumsum([len(group) for group in groups])


def _apart(rows: np.ndarray, ends: np.ndarray) -> list[Any]:
    return [list(map(tuple, rows[start:end].tolist())) for start, end in pairwise([0, *ends.tolist()])]
