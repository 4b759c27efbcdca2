"""The built-in lab: small English instruction data, two tokenizers. All of it is made here."""

from __future__ import annotations

from kdzoo.data.lab.rows import SPLITS, rows_of
from kdzoo.data.lab.tokenizers import lab_tokenizer
from kdzoo.errors import DataError, did_you_mean

__all__ = ["lab_rows", "lab_splits", "lab_tokenizer"]


def lab_splits() -> tuple[str, ...]:
    """The names of the splits. No question stands in two of them."""
    return tuple(SPLITS)


def lab_rows(split: str, limit: int | None = None) -> list[dict[str, str]]:
    """The first `limit` rows of a split, all by default: `id`, `instruction`, `input` (may be ""), `output`.

    Raises `DataError` for a split that the lab does not have.
    """
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise DataError(
            f"lab split '{split}': is not one of the lab's ({known}){did_you_mean(split, SPLITS)}; use one of them"
        )
    count = SPLITS[split].rows
    return list(rows_of(split, count if limit is None else min(limit, count)))
