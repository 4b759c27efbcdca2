"""How a golden file is replayed: which plugin computes its source function, what is fed and what is compared.

A golden file holds inputs and outputs of an authors' function (or of an independent float64 computation), and
in `meta_json` the source, the function and its configuration. Formulas are covered, not files: any
configuration of a covered function is replayed, and one that cannot be understood fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

_listed = json.loads((Path(__file__).parent / "not_covered.json").read_text())
NOT_COVERED: dict[str, str] = _listed["functions"]
"""Source function -> why no plugin computes it yet."""
NOT_COVERED_SETTINGS: dict[str, dict[str, dict[str, str]]] = _listed["settings"]
"""Covered source function -> configuration key -> value -> why no plugin has this documented setting yet."""

INDEPENDENT = "independent float64 reference"

CHUNK_BYTES = 400  # a few rows: a replay walks over several chunks


class NotUnderstood(Exception):
    """A golden file that cannot be replayed; says why."""


@dataclass(frozen=True)
class Golden:
    """One file, and which of its entries were asked for."""

    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Golden:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return cls(arrays, json.loads(str(arrays.pop("meta_json"))))

    @property
    def function(self) -> str:
        """`repository: function`: without commit, and of functions that were chained the outermost."""
        source = re.split(r"[@,]", self.meta["source"])[0].strip()
        name = re.split(r" / | \+ |[(;,]", self.meta["function"])[0].strip()
        return f"{source}: {name}"

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise NotUnderstood(f"the array '{name}' is missing")
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        return torch.as_tensor(self[name])


@dataclass(frozen=True)
class Pair:
    """Our value, and the file's, which is made of the entries `keys`."""

    keys: tuple[str, ...]
    ours: Tensor
    theirs: Tensor
    noise: float = 0.0
    """How far off the file's own number is, where its arithmetic loses more than rounding."""


def held(golden: Golden, ours: Mapping[str, Tensor]) -> Iterator[Pair]:
    """Our values under the file's keys, as far as it holds them."""
    for key, value in ours.items():
        if key in golden:
            yield Pair((key,), value, golden.tensor(key))


def configuration(golden: Golden, *, known: set[str]) -> dict[str, Any]:
    """The file's configuration, inline or under "configuration" (or "config"); a key that is not `known` fails.

    Skips a setting that is listed as not covered.
    """
    about = {"source", "file", "function", "norm", "normalisation", "note", "notes", "label_convention"}
    given = golden.meta.get("configuration", golden.meta.get("config"))
    found = dict(given) if given is not None else {k: v for k, v in golden.meta.items() if k not in about}
    for key, values in NOT_COVERED_SETTINGS.get(golden.function, {}).items():
        value = str(found.get(key))  # the list is JSON, whose keys are texts
        if value in values:
            pytest.skip(f"{golden.function}, {key} '{value}': {values[value]}")
    if unknown := sorted(found.keys() - known):
        raise NotUnderstood(f"configuration keys {unknown}: nothing here knows what they mean")
    return found
