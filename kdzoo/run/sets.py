"""One model on every evaluation set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from kdzoo.data.rows import Row
from kdzoo.engine.distributed import rank, world
from kdzoo.evaluate.scoring import Scored
from kdzoo.recipe.model import Decoding
from kdzoo.run.progress import stage_progress

Sets = Mapping[str, Sequence[Row]]

Score = Callable[[str, Sequence[Row], Callable[[int], None]], Scored]
"""A model on the rows of the set of this name; the function hears how many answers this rank has of them."""


def score_sets(title: str, sets: Sets, decodings: Mapping[str, Decoding], score: Score) -> Iterator[tuple[str, Scored]]:
    """Set after set, under one bar. Every rank walks through it together."""
    runs = sum(len(decoding.seeds) if decoding.sample else 1 for decoding in decodings.values())
    shares = {name: runs * -(-len(rows) // world()) for name, rows in sets.items()}
    before = 0
    with stage_progress(title, sum(shares.values()), enabled=rank() == 0) as bar:
        for name, rows in sets.items():
            yield name, score(name, rows, lambda done, before=before: bar.update(before + done))  # type: ignore[misc]
            before += shares[name]
