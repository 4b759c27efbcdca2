"""The run that many tests only read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from running import DECODINGS, TINY, Run


@pytest.fixture(scope="session")
def warm(common: Path) -> Path:
    """The cache of `first` and of what comes after it; empty before."""
    return common / "tiny-cache"


@pytest.fixture(scope="session")
def first(common: Path, warm: Path) -> Run:
    """`tiny.json`, run once for all workers as a user runs it: in a process of its own, with nothing in the cache."""
    folder, told = common / "first", common / "first.json"
    with FileLock(common / "first.lock"):
        if not told.is_file():
            command = [sys.executable, "-m", "kdzoo", "run", str(TINY), "--out", str(folder), "--ranks", "1"]
            done = subprocess.run(
                [*command, "--set", f"evaluation.decoding={DECODINGS}"],
                capture_output=True,
                text=True,
                env=os.environ | {"KDZOO_CACHE": str(warm), "OMP_NUM_THREADS": "1"},
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
            told.write_text(json.dumps([done.stdout, done.stderr]))
    return Run(folder, *json.loads(told.read_text()))


@pytest.fixture
def warm_cache(first: Run, warm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache in which `first` left teacher, student and projectors, as this test's."""
    monkeypatch.setenv("KDZOO_CACHE", str(warm))
    return warm
