"""Plugins that are declared, and a recipe that is valid with them. Nothing is imported or installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from kdzoo.plugin.declarations import Declarations, Declared
from kdzoo.plugin.json_schema import json_schema


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Floor(Strict):
    at: float = Field(default=0.5, ge=0, le=1)


class WideParams(Strict):
    width: int = Field(default=64, ge=1)
    """Of the low space."""
    floor: Floor = Floor()
    beta: float | str = "sequence"


class NeedyParams(Strict):
    site: str


def declare(kind: str, name: str, params: type[BaseModel] = Strict) -> Declared:
    return Declared(kind, name, "zoo", f"The {name}.", "", "", json_schema(params, f"{kind}.{name}."))


@pytest.fixture
def declared() -> Declarations:
    return Declarations(
        {
            "loss": {
                "gold": declare("loss", "gold"),
                "wide": declare("loss", "wide", WideParams),
                "needy": declare("loss", "needy", NeedyParams),
            },
            "token_weights": {"hard": declare("token_weights", "hard", WideParams)},
            "aligner": {"by_bytes": declare("aligner", "by_bytes")},
            "fusion": {"mean": declare("fusion", "mean", NeedyParams)},
            "tracker": {"curves": declare("tracker", "curves")},
        }
    )


@pytest.fixture
def valid() -> dict[str, Any]:
    return {
        "title": "A title",
        "student": {"config": {"model_type": "gpt2"}, "tokenizer": "lab:bytes"},
        "teacher": {"name": "somewhere"},
        "data": {"train": {"lab": "train"}},
        "losses": {
            "gold": {"use": "gold", "weight": 0.5},
            "kd": {"use": "wide", "params": {"width": 32}},
        },
        "stages": {"distill": {"steps": 10}},
    }


@pytest.fixture
def folder(tmp_path, monkeypatch, declared) -> Path:
    """The current folder, empty, with the declared plugins as the installed ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdzoo.recipe.load.declarations", lambda loose: declared)
    return tmp_path


@pytest.fixture
def write(folder):
    """`write("pairs/a.json", {...})`: a recipe file in the current folder."""

    def write(path: str, content: Any) -> Path:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return file

    return write
