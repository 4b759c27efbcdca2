"""Random choices that are the same on every machine and Python version."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Choices seeded by names and numbers.

    Only `random.Random(text).random()` is used: of all methods it alone is promised to stay the same.
    """

    def __init__(self, *seed: str | int) -> None:
        self._random = random.Random("/".join(str(part) for part in seed))

    def below(self, count: int) -> int:
        """A whole number from 0 to `count` - 1."""
        return int(self._random.random() * count)

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def one(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def some(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different places of `choices`, in random order."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(count)]
