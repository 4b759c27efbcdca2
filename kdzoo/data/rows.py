"""Rows of instruction data, from the lab, a set that the literature knows, a JSONL file or a Hugging Face data set."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from kdzoo.data.place import existing_file, local_folder, one_line
from kdzoo.data.sets import set_file
from kdzoo.errors import DataError, did_you_mean
from kdzoo.quiet import quiet_datasets
from kdzoo.recipe.model import ROW_SOURCES, Fields, Source

Numbers = float | tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One instruction with its response. Training reads the first reference, evaluation all of them."""

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    columns: Mapping[str, Numbers] = field(default_factory=dict)
    """What else was asked for: a number of the row, or one for each of its response's tokens."""
    ended: bool = True
    """Whether the response is whole. False: it was cut, and nobody learns to end there."""


def load_rows(source: Source, address: str, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a source with these columns of numbers, the first `source.limit` of them where it is set.

    `address` is the source's place in the recipe (`data.train`); every `DataError` begins with it.
    """
    given = [kind for kind in ROW_SOURCES if getattr(source, kind) is not None]
    if len(given) != 1:
        what = "no source of rows is given" if not given else f"'{given[0]}' and '{given[1]}' are both given"
        known = ", ".join(f"'{kind}'" for kind in ROW_SOURCES)
        raise DataError(f"{address}: {what}; give exactly one of {known}")
    if source.lab is not None:
        origin = f"lab '{source.lab}'"
        found: Iterable[Mapping[str, Any]] = _lab(source.lab, source.limit, address)
    elif source.jsonl is not None:
        path = existing_file(source.jsonl, address, DataError)
        origin, found = f"'{path}'", _jsonl(path, address)
    elif source.set is not None:
        path = set_file(source.set, f"{address}.set")
        origin, found = f"'{path}'", _jsonl(path, address)
    else:
        origin, found = f"'{source.dataset}'", _dataset(source, address)
    rows = [
        _row(content, number, source.fields, origin, address, columns)
        for number, content in enumerate(islice(found, source.limit), start=1)
    ]
    if not rows:
        raise DataError(f"{address}: {origin} contains no rows; give another source")
    return rows


def _lab(split: str, limit: int | None, address: str) -> Iterable[Mapping[str, Any]]:
    from kdzoo.data.lab import lab_rows

    try:
        return lab_rows(split, limit)
    except DataError as error:
        raise DataError(f"{address}: {error}") from error


def _jsonl(path: Path, address: str) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                content = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # both broken JSON and broken UTF-8
                raise DataError(f"{address}: '{path}' line {number} is not JSON ({error}); correct the line") from error
            if not isinstance(content, dict):
                raise DataError(f"{address}: '{path}' line {number} is not a JSON object; write one object per line")
            yield content


def _dataset(source: Source, address: str) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    assert source.dataset is not None
    folder = local_folder(source.dataset, address, DataError)
    try:
        with quiet_datasets():
            return load_dataset(str(folder or source.dataset), source.subset, split=source.split)
    except Exception as error:  # the library raises its own kinds, the hub's, pyarrow's and plain ValueError
        raise DataError(
            f"{address}: '{source.dataset}' (split '{source.split}') cannot be loaded ({one_line(error)}); "
            "check the name, 'subset', 'split' and the network"
        ) from error


def _row(
    content: Mapping[str, Any], number: int, fields: Fields, origin: str, address: str, columns: Sequence[str]
) -> Row:
    def read(field: str, advice: str) -> Any:
        if field not in content:
            has = ", ".join(f"'{name}'" for name in content) or "nothing"
            raise DataError(
                f"{address}: field '{field}' is not in {origin}{did_you_mean(field, content)}; "
                f"row {number} has {has}; {advice}"
            )
        return content[field]

    def numbers(column: str) -> Numbers:
        value = read(column, "give every row a number there, or name another column where 'token_weights' reads it")
        many = isinstance(value, list)
        for one in value if many else [value]:
            if not isinstance(one, int | float) or isinstance(one, bool) or not math.isfinite(one) or one < 0:
                raise DataError(
                    f"{address}: field '{column}' of row {number} in {origin} is {json.dumps(one)}; a weight is a "
                    "number of at least 0, or a list with one for each token of the response"
                )
        return tuple(map(float, value)) if many else float(value)

    def text(value: Any, field: str) -> str:
        if not isinstance(value, str):
            raise DataError(
                f"{address}: field '{field}' of row {number} in {origin} is {type(value).__name__}, not text; "
                "name another column or correct the row"
            )
        if not _encodes(value):
            raise DataError(
                f"{address}: field '{field}' of row {number} in {origin} contains half of a surrogate pair; "
                "correct the row or remove it"
            )
        return value

    response = read(fields.response, "name the column in 'fields.response'")
    references = response if isinstance(response, list) else [response]
    if not references:
        raise DataError(
            f"{address}: field '{fields.response}' of row {number} in {origin} is an empty list; "
            "give at least one response"
        )
    given_input = read(fields.input, "name the column in 'fields.input'") if fields.input else None
    return Row(
        id=str(content.get("id", number)),
        instruction=text(read(fields.instruction, "name the column in 'fields.instruction'"), fields.instruction),
        input="" if given_input is None else text(given_input, fields.input),
        references=tuple(text(reference, fields.response) for reference in references),
        columns={column: numbers(column) for column in columns},
    )


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
