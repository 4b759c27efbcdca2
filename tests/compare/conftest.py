"""A suite of two recipes and two seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RECIPE: dict[str, Any] = {
    "title": "The data alone",
    "pair": "A to B",
    "student": {"config": {"model_type": "gpt2"}, "tokenizer": "lab:bytes"},
    "teacher": {"config": {"model_type": "gpt2"}, "tokenizer": "lab:bytes"},
    "data": {"train": {"lab": "train", "limit": 20}},
    "losses": {"sft": {"use": "cross_entropy"}},
    "stages": {"distill": {"steps": 40}},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write("suites/s.json", {...})`: a file under the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: Any) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def suite(write) -> Path:
    write("pairs/tiny.json", {"pair": "tiny"})
    write("sft.json", RECIPE)
    write("kl.json", {"extends": "sft.json", "title": "KL", "losses": {"kl": {"use": "forward_kl"}}})
    return write(
        "suites/two.json",
        {
            "title": "Two methods",
            "pairs": ["../pairs/tiny.json"],
            "baseline": "../sft.json",
            "recipes": ["../kl.json"],
            "seeds": [1, 2],
        },
    )
