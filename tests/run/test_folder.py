from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from kdzoo.errors import KdzooError
from kdzoo.evaluate.scoring import Answer
from kdzoo.run.folder import RunFolder, slug


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create("a run", tmp_path / "out")


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=not_json) for line in path.read_text("utf-8").splitlines()]


def not_json(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_a_run_is_named_by_time_and_title(tmp_path):
    folder = RunFolder.create("DSKD with residual (v2)!", None, tmp_path / "runs")
    assert re.fullmatch(r"\d{8}-\d{6}-dskd-with-residual-v2", folder.path.name)
    assert list(folder.path.iterdir()) == []


def test_runs_of_one_title_and_second_do_not_share_a_folder(tmp_path):
    assert len({RunFolder.create("same", None, tmp_path).path for _ in range(5)}) == 5


@pytest.mark.parametrize(
    ("title", "name"),
    [("", "run"), ("Über", "ber"), ("日本", "run"), ("a/../b", "a-b"), ("x" * 99, "x" * 60)],
)
def test_a_title_becomes_a_file_name(title, name):
    assert slug(title) == name


def test_out_names_the_folder_new_or_empty(tmp_path):
    new = tmp_path / "a" / "b"
    assert RunFolder.create("t", new).path == new
    assert RunFolder.create("t", new).path == new


def test_an_out_folder_with_content_is_refused_and_left_alone(tmp_path):
    (tmp_path / "result").touch()
    with pytest.raises(KdzooError, match=r"^--out: '.*' is not empty; name a new folder") as fault:
        RunFolder.create("t", tmp_path)
    assert "\n" not in str(fault.value)
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("given", ["out", "root"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, given):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "run"
    out, root = (place, Path("runs")) if given == "out" else (None, place)
    with pytest.raises(KdzooError, match=r"^run folder '.*': cannot be written .*--out") as fault:
        RunFolder.create("t", out, root)
    assert "\n" not in str(fault.value)


def test_a_folder_that_takes_no_files_is_found_at_the_start(tmp_path, monkeypatch):
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(KdzooError, match=r"cannot be written \(Permission denied\)"):
        RunFolder.create("t", tmp_path / "out")


def test_the_recipe_keeps_its_order_and_its_characters(folder):
    recipe = {"title": "Größe ×", "extends": [], "losses": {"b": 1, "a": 2}}
    text = folder.write_recipe(recipe).read_text("utf-8")
    assert json.loads(text) == recipe
    assert list(json.loads(text)) == list(recipe)
    assert "Größe ×" in text
    assert text.startswith('{\n  "title"')
    assert text.endswith("}\n")


def test_every_step_is_a_line_on_disk_at_once_with_null_for_what_is_not_finite(folder):
    folder.log_step({"step": 1, "loss": 2.5}, "distill")
    path = folder.path / "metrics.jsonl"
    assert lines(path) == [{"step": 1, "loss": 2.5}]
    folder.log_step({"step": 2, "loss": math.nan, "norm": math.inf}, "distill")
    assert lines(path)[1] == {"step": 2, "loss": None, "norm": None}


def test_other_stages_have_files_of_their_own(folder):
    for stage in ("teacher", "distill", "teacher"):
        folder.log_step({"step": 1}, stage)
    names = {p.name: len(lines(p)) for p in folder.path.iterdir()}
    assert names == {"metrics-teacher.jsonl": 2, "metrics.jsonl": 1}


def test_predictions_are_one_object_per_answer(folder):
    rows = [
        Answer("r1", None, "why?", "because é", ["because", "so"], 50.0),
        Answer("r2", 20, "p", "", ["x"], math.nan),
    ]
    path = folder.write_predictions("held_out", "student", "greedy", rows)
    assert path == folder.path / "predictions" / "held_out.student.greedy.jsonl"
    assert lines(path)[0] == {
        "id": "r1",
        "seed": None,
        "prompt": "why?",
        "prediction": "because é",
        "references": ["because", "so"],
        "rouge_l": 50.0,
    }
    assert lines(path)[1]["rouge_l"] is None


def test_a_set_named_like_a_path_stays_in_the_folder(folder):
    path = folder.write_predictions("../a/b", "student", "greedy", [])
    assert path.parent == folder.predictions
    assert path.name == "%2E.%2Fa%2Fb.student.greedy.jsonl"


def test_scores_are_valid_json(folder):
    scores = {"held_out": {"student": {"rouge_l": {}, "cross_entropy": math.nan, "token_accuracy": None}}}
    text = folder.write_scores(scores).read_text()
    assert json.loads(text, parse_constant=not_json)["held_out"]["student"]["cross_entropy"] is None


def test_a_write_that_fails_later_is_one_line(folder):
    (folder.path / "scores.json").mkdir()
    with pytest.raises(KdzooError, match=r"cannot be written \(Is a directory\)"):
        folder.write_scores({})


def test_the_environment_says_what_ran_where(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kdzoo", "run", "r.json"])
    found = json.loads(folder.write_environment({"ranks": 2}).read_text())
    assert found["command"] == ["kdzoo", "run", "r.json"]
    assert found["ranks"] == 2
    assert found["device"]["type"] in ("cpu", "cuda")
    assert {"kdzoo", "torch", "transformers", "deepspeed", "datasets", "tokenizers"} <= found["packages"].keys()
    assert re.match(r"\d+\.\d+", found["packages"]["torch"])
    assert set(found["git"]) == {"working_directory", "kdzoo"}


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    done = subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_of_the_working_directory_is_kept_and_whether_files_differ(folder, tmp_path, monkeypatch):
    def seen() -> dict | None:
        return json.loads(folder.write_environment({}).read_text())["git"]["working_directory"]

    place = tmp_path / "checkout"
    place.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(place)
    assert seen() is None
    git(place, "init", "-q")
    git(place, "commit", "-q", "--allow-empty", "-m", "first")
    assert seen() == {"commit": git(place, "rev-parse", "HEAD"), "dirty": False}
    (place / "new").touch()
    assert seen() == {"commit": git(place, "rev-parse", "HEAD"), "dirty": True}


def test_installed_plugins_are_listed_by_distribution(folder, monkeypatch, tmp_path):
    site = tmp_path / "site"
    info = site / "kdzoo_mine-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kdzoo-mine\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[kdzoo]\nmine_b = b\nmine_a = a\n")
    monkeypatch.syspath_prepend(site)
    found = json.loads(folder.write_environment({}).read_text())["plugins"]
    assert found["kdzoo-mine"] == {"version": "1.2", "plugins": ["mine_a", "mine_b"]}
