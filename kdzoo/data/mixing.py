"""Which rows of a data set learn from another response, and the rows with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from kdzoo.data.rows import Row


@dataclass(frozen=True)
class Response:
    """A response that a model has generated."""

    text: str
    ended: bool
    """Whether the model has ended it. False: it was cut."""


def row_order(count: int, seed: int) -> list[int]:
    """The order in which rows are taken for a share: random by the seed, the same on every rank and machine."""
    return sorted(range(count), key=lambda row: sha256(f"{seed} {row}".encode()).digest())


def taken(count: int, share: float) -> int:
    """How many of `count` rows a share is, 0 to 1: the nearest whole number."""
    return int(share * count + 0.5)


def with_responses(rows: Sequence[Row], responses: Mapping[int, Response]) -> list[Row]:
    """The rows, with these responses in place of their own, by the row's number; an empty one replaces nothing."""
    return [_answered(row, responses.get(number)) for number, row in enumerate(rows)]


def _answered(row: Row, response: Response | None) -> Row:
    if response is None or not response.text:
        return row
    return replace(row, references=(response.text,), ended=response.ended)


__all__ = ["Response", "row_order", "taken", "with_responses"]
