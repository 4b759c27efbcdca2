"""A kind of plugin: which tokens of two tokenizers belong together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdzoo.api.plugin import Plugin


@dataclass(frozen=True)
class Tokens:
    """The scored tokens of one response on one side, as an aligner sees them."""

    ids: Sequence[int]
    starts: Sequence[int]  # first character of each token in the response text
    ends: Sequence[int]  # one past its last character; an end-of-sequence token stands at (length, length)
    text: str


@dataclass(frozen=True)
class Alignment:
    """Which tokens of two sides belong together.

    `pairs`: one-to-one, ascending. `spans`: groups (student tokens, teacher tokens) covering the same text, as
    half-open index ranges (student start, student end, teacher start, teacher end), ascending, disjoint.
    """

    pairs: Sequence[tuple[int, int]]
    spans: Sequence[tuple[int, int, int, int]]


class Aligner(Plugin):
    """Aligns the tokens of one response under two tokenizers. Runs in the collator, on the CPU."""

    kind = "aligner"

    def __init__(self, params: Any) -> None:
        self.params = params

    @abstractmethod
    def align(self, student: Tokens, teacher: Tokens) -> Alignment: ...
