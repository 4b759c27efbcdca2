"""What a user can get wrong ends in one line, exit code 2, and no half-made folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_ranks_and_accumulation import TINY, run

from kdzoo.cli import main

BROKEN_INSIDE = '''
import kdzoo


class Broken(kdzoo.Loss):
    """Fails at its first chunk."""

    name, paper, formula = "broken", "a test", "L = 1 / 0"

    @classmethod
    def needs(cls, params, same_tokens):
        return kdzoo.Needs(visits=(kdzoo.Visit("rows", ("student",)),))

    def over_vocab(self, visit, chunk):
        raise ValueError("broken inside")


@kdzoo.hookimpl
def register_losses(register):
    register(Broken)
'''


def raising(path: Path) -> Path:
    path.write_text('raise ValueError("broken on import")\n')
    return path


def rows(path: Path, *contents: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))
    return path


def training_on(path: Path) -> list[str]:
    return ["--set", "data.train.lab=null", "--set", f"data.train.jsonl={path}"]


SILENT = {"instruction": "Add.", "input": "", "output": ""}
"""A row without a response."""

BEFORE_ANY_RANK = {
    "an unknown key": (lambda _: ["--set", "losses.dskd.wieght=1"], "losses.dskd.wieght: unknown key, did you mean"),
    "a misspelt plugin": (lambda _: ["--set", "losses.dskd.use=dsdk"], "no plugin offers 'dsdk', did you mean 'dskd'?"),
    "a key that DeepSpeed does not have": (
        lambda _: ["--set", "deepspeed.zero_optimisation.stage=3"],
        "deepspeed.zero_optimisation: is no key of DeepSpeed, did you mean 'zero_optimization'?",
    ),
    "a plugin that cannot be imported": (
        lambda tmp: ["--plugin", str(raising(tmp / "raising.py"))],
        "raising.py': cannot be imported; ValueError: broken on import (raising.py:1)",
    ),
    "a batch that does not split": (
        lambda _: ["--ranks", "3"],
        "stages.teacher.batch: 8 sequences do not split over 3",
    ),
    "far too many ranks": (
        lambda _: ["--ranks", "1000"],
        "run on 1, 2, 4 or 8 ranks, or change the batch",
    ),
}

ON_THE_RANKS = {
    "a missing model folder": (
        lambda _: ["--set", "student.config=null", "--set", "student.tokenizer=null", "--set", "student.name=/nope"],
        "student.name: '/nope': no such folder",
    ),
    "a data set without the field": (
        lambda tmp: training_on(rows(tmp / "rows.jsonl", {"instruction": "Add.", "text": "x"})),
        "data.train: field 'output' is not in",
    ),
    "an unset variable": (
        lambda _: training_on(Path("$KDZOO_NOT_SET/rows.jsonl")),
        "needs the environment variable 'KDZOO_NOT_SET'",
    ),
    "a missing file": (lambda tmp: training_on(tmp / "none.jsonl"), "data.train: "),
    "an empty data set": (lambda tmp: training_on(rows(tmp / "rows.jsonl")), "has no rows"),
    "rows without response tokens": (
        lambda tmp: training_on(rows(tmp / "rows.jsonl", SILENT)),
        "data.train: 1 row has no response token",
    ),
    "two tokenizers for a loss that needs one": (
        lambda _: ["--set", "losses.kd.use=forward_kl"],
        "losses.kd: 'forward_kl' compares two models token by token and needs one tokenizer",
    ),
    "a prompt that leaves no room for a response": (
        lambda _: ["--set", "data.max_length=8"],
        "its prompt fills 'data.max_length' 8; raise it, or lower 'data.max_prompt_length' 100",
    ),
    "an evaluation row without a response": (
        lambda tmp: [
            *("--set", "evaluation.sets.seen.lab=null", "--set"),
            f"evaluation.sets.seen.jsonl={rows(tmp / 'rows.jsonl', SILENT)}",
        ],
        "evaluation.sets.seen: 1 row has no response token",
    ),
    "missing rows of a later stage": (
        lambda tmp: ["--set", f"stages.sft.data.jsonl={tmp / 'none.jsonl'}"],
        "stages.sft.data: ",
    ),
    "a key that zero refuses": (
        lambda _: ["--set", "deepspeed.zero_optimization.stag=3"],
        "deepspeed.zero_optimization.stag: DeepSpeed refuses it",
    ),
    "answers beyond the model's positions": (
        lambda _: ["--set", "evaluation.max_new_tokens=500", "--set", "evaluation.sets.seen.limit=1"],
        "evaluation.max_new_tokens: 500 tokens after a prompt of",
    ),
    "a fusion on a block that is not there": (
        lambda _: ["--set", "fuse.experts.params.layer=7"],
        "fuse.experts.params.layer: the teacher has 2 blocks, counted from 0, not 7",
    ),
    "a stage that is missing": (
        lambda _: ["--set", "stages.projectors=null"],
        "stages.projectors: a loss needs this stage's module",
    ),
    "a data-only stage with a loss that reads a teacher": (
        lambda _: ["--set", "stages.sft.losses.sft.use=dskd"],
        "stages.sft.losses.sft: 'dskd' reads a teacher",
    ),
}


@pytest.mark.parametrize("case", BEFORE_ANY_RANK)
def test_a_recipe_is_refused_before_any_rank_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    flags, line = BEFORE_ANY_RANK[case]
    assert main(["run", str(TINY), "--out", str(tmp_path / "run"), *flags(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert line in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_THE_RANKS)
def test_one_line_says_what_to_do_before_anything_is_trained(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, case: str
) -> None:
    flags, line = ON_THE_RANKS[case]
    done = run(tmp_path / "run", tmp_path_factory.getbasetemp() / "cache", "--ranks", "1", *flags(tmp_path))
    assert done.returncode == 2, done.stderr
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert line in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("out", ["/dev/null/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, out: str) -> None:
    done = run(Path(out), tmp_path, "--ranks", "1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: run folder '{out}': cannot be written")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    # Rank 0 alone looks at the folder: rank 1 must neither wait for ever nor complain of being left.
    done = run(tmp_path, tmp_path.parent / "cache", "--ranks", "2")
    assert done.returncode == 2
    assert done.stderr == f"error: --out: '{tmp_path}' is not empty; name a new folder, or empty this one\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--set", "losses.kd.use=forward_kl"],  # every rank finds it
        ["--set", "student.config=null", "--set", "student.name=/nope"],  # rank 0 does, while the others wait
    ],
)
def test_a_fault_on_two_ranks_is_told_once(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, flags: list[str]
) -> None:
    done = run(tmp_path / "run", tmp_path_factory.getbasetemp() / "cache", "--ranks", "2", *flags)
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_teacher_that_knows_nothing_is_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    flags = [text for key in ("lr=10", "clip=0", "steps=10") for text in ("--set", f"stages.teacher.{key}")]
    cache = tmp_path_factory.getbasetemp() / "cache"
    done = run(tmp_path / "run", cache, "--ranks", "1", *flags, "--set", "stages.sft=null")
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: stages.teacher: the teacher's cross-entropy on the training rows is ")
    assert "no better than a uniform guess" in error
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "metrics-teacher.jsonl").is_file(), "the steps that led there are worth a look"


@pytest.mark.slow
def test_a_plugin_that_fails_inside_is_one_traceback(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN_INSIDE)
    flags = ["--plugin", str(plugin), "--set", "losses.broken.use=broken", "--set", "stages.sft=null"]
    done = run(tmp_path / "run", tmp_path_factory.getbasetemp() / "cache", "--ranks", "2", *flags)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1] == "ValueError: broken inside"
    assert str(plugin) in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_ctrl_c_stops_cleanly_and_keeps_what_was_logged(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ranks: str
) -> None:
    out = tmp_path / "run"
    flags = ["--ranks", ranks, "--set", "stages.distill.steps=4000", "--set", "evaluation.sets=null"]
    with subprocess.Popen(
        [sys.executable, "-m", "kdzoo", "run", str(TINY), "--out", str(out), *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"KDZOO_CACHE": str(tmp_path_factory.getbasetemp() / "cache"), "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("distill"):
                break
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()  # to its end: when no process is left that could write to it
    assert process.returncode == 130, rest
    assert [line for line in rest.split("\n") if line and not line.startswith("distill")] == ["interrupted"]
    assert (out / "metrics.jsonl").read_text().count("\n") >= 1
    assert not list((tmp_path_factory.getbasetemp() / "cache").rglob(".building-*"))
