"""Numbers that others have published for a cell, to stand beside our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

HERE = Path(__file__)
FILES = (HERE.with_name("published.json"), HERE.parents[2] / "docs" / "published.json")
"""In an installed package, and in a checkout."""


@dataclass(frozen=True)
class Published:
    source: str
    measure: str
    """What the numbers are, such as a mean of certain sets."""
    pairs: Mapping[str, Mapping[str, float]]
    """Pair -> recipe, or reference model -> its score."""

    def of(self, pair: str) -> Mapping[str, float]:
        return self.pairs.get(pair, {})


def read_published() -> Published:
    file = next(file for file in FILES if file.is_file())
    return TypeAdapter(Published).validate_json(file.read_bytes())
