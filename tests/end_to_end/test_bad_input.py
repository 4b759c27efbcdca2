"""What a user can get wrong ends in one line, exit code 2, and no half-made folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import TINY, Done, kdzoo, sets

BROKEN_INSIDE = '''
import kdzoo


class Broken(kdzoo.Loss):
    """Fails at its first chunk."""

    name, paper, formula = "broken", "a test", "L = 1 / 0"

    @kdzoo.visit
    def tokens(self, student):
        raise ValueError("broken inside")


@kdzoo.hookimpl
def register_plugins(register):
    register(Broken)
'''


def raising(path: Path) -> Path:
    path.write_text('raise ValueError("broken on import")\n')
    return path


def rows(path: Path, *contents: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))
    return path


def training_on(path: Path) -> list[str]:
    return ["--set", "data.train.lab=null", "--set", f"data.train.jsonl={path}"]


def weighed_by(slot: str) -> list[str]:
    return ["--set", 'token_weights={"mine": {"use": "column"}}', "--set", f"{slot}.weights=mine"]


SHORT = {"instruction": "Add one and one.", "input": "", "output": "That makes two.", "weight": [1]}
"""A row whose weights are too few."""
SILENT = {"instruction": "Add.", "input": "", "output": ""}
"""A row without a response."""

BEFORE_ANY_RANK = {
    "an unknown key": (lambda _: ["--set", "losses.dskd.wieght=1"], "losses.dskd.wieght: unknown key, did you mean"),
    "a misspelt plugin": (lambda _: ["--set", "losses.dskd.use=dsdk"], "no plugin offers 'dsdk', did you mean 'dskd'?"),
    "a key that DeepSpeed does not have": (
        lambda _: ["--set", "deepspeed.zero_optimisation.stage=3"],
        "deepspeed.zero_optimisation: is not a key of DeepSpeed's configuration, did you mean 'zero_optimization'?",
    ),
    "a plugin that cannot be imported": (
        lambda tmp: ["--plugin", str(raising(tmp / "raising.py"))],
        "raising.py': cannot be imported; ValueError: broken on import (raising.py:1)",
    ),
    "a batch that does not split": (
        lambda _: ["--ranks", "3"],
        "stages.teacher.batch: 8 sequences cannot be divided among 3",
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
    "an empty data set": (lambda tmp: training_on(rows(tmp / "rows.jsonl")), "contains no rows"),
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
        "has a prompt as long as 'data.max_length' (8 tokens); raise it, or lower 'data.max_prompt_length' (100)",
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
    "a column of weights that is not there": (
        lambda _: weighed_by("losses.dskd"),
        "data.train: field 'weight' is not in",
    ),
    "weights that are not as many as tokens": (
        lambda tmp: [*training_on(rows(tmp / "rows.jsonl", SHORT)), *weighed_by("losses.dskd")],
        "data.train: field 'weight' of row '1' has 1 numbers, and the response has",
    ),
    "weights of another stage that are not as many as tokens": (
        lambda tmp: [
            *weighed_by("stages.sft.losses.sft"),
            *("--set", f"stages.sft.data.jsonl={rows(tmp / 'rows.jsonl', SHORT)}"),
        ],
        "stages.sft.data: field 'weight' of row '1' has 1 numbers, and the response has",
    ),
    "token weights that compare predictions of two tokenizers": (
        lambda _: [*weighed_by("losses.dskd"), "--set", "token_weights.mine.use=adaptive"],
        "token_weights.mine: 'adaptive' compares both models' predictions of a token and needs one tokenizer",
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


def run(out: Path, *flags: str) -> Done:
    return kdzoo("run", str(TINY), "--out", str(out), *flags)


def the_one_line(done: Done) -> str:
    """All that a fault may write."""
    assert (done.code, done.output) == (2, ""), done.screen
    (line,) = done.screen.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("case", BEFORE_ANY_RANK)
def test_a_recipe_is_refused_before_any_rank_starts(tmp_path: Path, case: str) -> None:
    flags, line = BEFORE_ANY_RANK[case]
    assert line in the_one_line(run(tmp_path / "run", *flags(tmp_path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_THE_RANKS)
def test_one_line_says_what_to_do_before_anything_is_trained(tmp_path: Path, case: str) -> None:
    flags, line = ON_THE_RANKS[case]
    assert line in the_one_line(run(tmp_path / "run", "--ranks", "1", *flags(tmp_path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("out", ["/dev/null/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_named(out: str) -> None:
    line = the_one_line(run(Path(out), "--ranks", "1"))
    assert line.startswith(f"error: run folder '{out}': cannot be written")


@pytest.mark.slow
def test_a_fault_leaves_the_screen_of_a_process_of_its_own_to_its_line(tmp_path: Path) -> None:
    """What libraries write past Python's streams, and at exit, shows only here."""
    command = [sys.executable, "-m", "kdzoo", "run", str(TINY), "--out", str(tmp_path / "run"), "--ranks", "1"]
    done = subprocess.run([*command, *sets("losses.kd.use=forward_kl")], capture_output=True, text=True, timeout=600)
    assert "losses.kd: 'forward_kl'" in the_one_line(Done(done.returncode, done.stdout, done.stderr))


@pytest.mark.slow
def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    # Rank 0 alone looks at the folder: rank 1 must neither wait for ever nor complain of being left.
    done = run(tmp_path, "--ranks", "2")
    assert the_one_line(done) == f"error: --out: '{tmp_path}' is not empty; name a new folder, or empty this one"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert capfd.readouterr() == ("", "")  # of the ranks


@pytest.mark.sweep
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(sets("losses.kd.use=forward_kl"), id="every rank finds it"),
        pytest.param(sets("student.config=null", "student.name=/nope"), id="rank 0 finds it, while the others wait"),
    ],
)
def test_a_fault_on_two_ranks_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str]) -> None:
    the_one_line(run(tmp_path / "run", "--ranks", "2", *flags))
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_teacher_that_knows_nothing_is_refused(tmp_path: Path) -> None:
    flags = sets("stages.teacher.lr=10", "stages.teacher.clip=0", "stages.teacher.steps=10", "stages.sft=null")
    done = run(tmp_path / "run", "--ranks", "1", *flags)
    assert done.code == 2, done.screen
    error = done.screen.splitlines()[-1]
    assert error.startswith("error: stages.teacher: the teacher's cross-entropy on the training rows is ")
    assert "no better than a uniform guess" in error
    assert "Traceback" not in done.screen
    assert (tmp_path / "run" / "metrics-teacher.jsonl").is_file(), "the steps that led there are worth a look"


@pytest.mark.slow
def test_a_plugin_that_fails_inside_is_one_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN_INSIDE)
    flags = ["--plugin", str(plugin), *sets("losses.broken.use=broken", "stages.sft=null")]
    done = run(tmp_path / "run", "--ranks", "2", *flags)
    assert done.code == 1, done.screen
    assert done.screen.count("Traceback") == 1
    assert done.screen.splitlines()[-1] == "ValueError: broken inside"
    assert str(plugin) in done.screen
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_ctrl_c_stops_cleanly_and_keeps_what_was_logged(tmp_path: Path, cache: Path, ranks: str) -> None:
    out = tmp_path / "run"
    flags = ["--ranks", ranks, *sets("stages.distill.steps=4000", "stages.sft=null", "evaluation.sets=null")]
    with subprocess.Popen(
        [sys.executable, "-m", "kdzoo", "run", str(TINY), "--out", str(out), *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    assert not list(cache.rglob(".building-*"))
