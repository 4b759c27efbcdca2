"""A comparison with real runs: interrupted, continued, with a cell that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdzoo.cli import main
from kdzoo.compare.ledger import read_ledger

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[1] / "end_to_end" / "tiny.json"

BREAKS = '''
import kdzoo


class Breaks(kdzoo.Loss):
    """Refuses to be made."""

    name, paper, formula = "breaks", "a test", "L = 0"

    @kdzoo.visit
    def tokens(self, student):
        return kdzoo.Terms()

    def build(self, student, teacher, artifacts):
        raise ValueError("on purpose")


@kdzoo.hookimpl
def register_plugins(register):
    register(Breaks)
'''


@pytest.fixture
def suite(tmp_path) -> Path:
    base = {"extends": str(TINY), "stages": {"sft": None}}
    recipes = {
        "alone": {"losses": {"dskd": None, "residual": None}, "title": "The data alone"},
        "dskd": {"losses": {"residual": None}},
        "broken": {"losses": {"dskd": None, "residual": {"use": "breaks", "params": None, "fuse": None}}},
    }
    for name, patch in recipes.items():
        content = {**base, **patch, "plugins": ["breaks.py"]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "breaks.py").write_text(BREAKS)
    (tmp_path / "pair.json").write_text(json.dumps({"seed": 0}))
    content = {
        "title": "Tiny",
        "pairs": ["pair.json"],
        "baseline": "alone.json",
        "recipes": ["broken.json", "dskd.json"],
        "seeds": [1],
        "patch": {"stages": {"teacher": {"seed": 0}}},
    }
    path = tmp_path / "tiny_suite.json"
    path.write_text(json.dumps(content))
    return path


def start(suite: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kdzoo", "compare", str(suite), "--ranks", "1"],
        cwd=suite.parent,
        env={**os.environ, "KDZOO_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_suite_is_interrupted_and_goes_on_to_its_report(suite, cache, monkeypatch, capsys):
    out = suite.parent / "runs" / "compare"
    first = start(suite, cache)
    assert first.stderr is not None
    told = ""
    for line in first.stderr:
        told += line
        if "broken-1  failed" in line:  # the next one starts
            break
    first.send_signal(signal.SIGTERM)  # of a scheduler; ctrl-C is the same
    told += first.communicate(timeout=300)[1]
    assert first.returncode == 130
    assert "Traceback" not in told
    assert "1 of 3 cells done, 1 failed" in told and "run the same command again to continue" in told
    assert not list(out.rglob("*.part"))
    assert list(read_ledger(out / "tiny_suite.json").pairs["pair"].cells) == ["alone"]
    assert "Not run yet: `broken` seed 1; `dskd` seed 1." in (out / "tiny_suite.md").read_text()

    monkeypatch.chdir(suite.parent)
    code = main(["compare", str(suite), "--ranks", "1"])
    spoken, told = capsys.readouterr()
    assert code == 1, told  # the broken one again
    assert told.splitlines()[0] == "1 of 3 cells done"
    assert "failed: pair broken-1: ValueError: on purpose" in told
    found = read_ledger(out / "tiny_suite.json").pairs["pair"]
    assert list(found.cells) == ["alone", "dskd"]
    assert found.cells["dskd"][1].environment["ranks"] == 1
    assert "teacher" in found.reference_models
    assert "dskd: " in spoken and f"report: {Path('runs/compare/tiny_suite.html')}" in spoken
    assert (out / "tiny_suite.html").is_file() and list((out / "figures").glob("*.png"))
