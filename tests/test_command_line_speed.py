"""What can be refused without torch is refused before it is imported: a wrong name costs a second, not seven."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdzoo.plugin.declarations import declarations

pytestmark = pytest.mark.slow

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "peft", "scipy", "statsmodels", "matplotlib")

RUN = f"""
import sys
from kdzoo.cli import main
code = main(sys.argv[1:])
print(*[module for module in {HEAVY} if module in sys.modules])
sys.exit(code)
"""

REFUSALS = {
    "run nosuch.json": "nosuch.json: no such recipe",
    "run sft --on nosuch": "nosuch: no such recipe",
    "run sft --set nosuch": "--set nosuch: not a setting; write it as key.path=value",
    "run sft --plugin nosuch.py": "plugin 'nosuch.py': no such file",
    "validate nosuch": "nosuch: no such recipe",
    "show nosuch": "nosuch: no such recipe",
    "eval nosuch": "--on: name the sets",
    "eval ./nosuch/student --on dolly": "MODEL_OR_RUN: 'nosuch/student': no such folder",
    "eval /nosuch/model --on seen": "MODEL_OR_RUN: '/nosuch/model': no such folder",
    "eval . --on nosuch": "--on: 'nosuch' is no set",
    "eval . --on nosuch.jsonl": "--on nosuch.jsonl: 'nosuch.jsonl': no such file",
    "eval . --on seen --decoding nosuch": "--decoding: 'nosuch' is none of",
    "eval unfinished": "unfinished: the run has left no student",
    "compare nosuch.json": "nosuch.json: no such suite",
    "compare lab --on nosuch": "nosuch: no such recipe",
    "report nosuch.json": "nosuch.json: no such file",
    "check nosuch": "nosuch: no such loss",
    "check nosuch.py": "nosuch.py: no such file",
    "list --plugin nosuch.py": "plugin 'nosuch.py': no such file",
}


@pytest.fixture(scope="module", autouse=True)
def known_plugins() -> None:
    """What plugins declare is in the cache, as after the first command that anybody runs."""
    declarations()


@pytest.mark.parametrize("command", REFUSALS)
def test_a_refusal_imports_nothing_heavy(command: str, tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    recipe = {
        "title": "A run",
        "student": {"name": "a"},
        "teacher": {"name": "b"},
        "data": {"train": {"lab": "train"}},
        "losses": {"sft": {"use": "cross_entropy"}},
        "stages": {"distill": {"steps": 1}},
    }
    (tmp_path / "unfinished" / "recipe.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "\n"), done.stderr
    assert done.stderr.startswith(f"error: {REFUSALS[command]}")
    assert done.stderr.count("\n") == 1


def test_a_name_that_the_hub_does_not_know_imports_nothing_heavy(tmp_path: Path) -> None:
    offline = "import huggingface_hub; huggingface_hub.snapshot_download = None\n"
    done = subprocess.run(
        [sys.executable, "-c", offline + RUN, "eval", "nosuch", "--on", "seen"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "\n")
    assert done.stderr.startswith(
        "error: MODEL_OR_RUN: 'nosuch' is not a local folder and cannot be fetched from the hub"
    )
