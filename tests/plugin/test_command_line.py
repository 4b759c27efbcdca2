"""The commands, their exit codes, and what they do not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from kdzoo.cli import main
from kdzoo.errors import KdzooError

RECIPE = {
    "title": "A title",
    "student": {"config": {"model_type": "toy"}},
    "teacher": {"name": "somewhere"},
    "data": {"train": {"lab": "train"}},
    "align": {"use": "by_hand"},
    "losses": {
        "kd": {"use": "shift", "weight": {"start": 0, "end": 1, "steps": 5}},
        "shift": {"use": "shift", "weight": 0.5, "params": {"width": 32}},
    },
    "stages": {
        "distill": {"epochs": 1},
        "teacher": {"steps": 10, "losses": {"x": {"use": "shift"}}},
        "projectors": {"steps": 1, "use": "shift"},
    },
}


@pytest.fixture
def recipe(site, tmp_path, monkeypatch):
    """A recipe in the current folder for the installed plugin."""
    site.install("zoo-good", good="good")
    monkeypatch.chdir(tmp_path)
    Path("kd.json").write_text(json.dumps(RECIPE))
    return "kd.json"


@pytest.fixture
def launched(monkeypatch):
    """What `run` hands on; the room that trains is not imported."""
    calls = []
    module = types.ModuleType("kdzoo.run")
    module.launch_run = lambda **arguments: calls.append(arguments) or 7
    monkeypatch.setitem(sys.modules, "kdzoo.run", module)
    return calls, module


def test_validate_says_in_one_line_what_would_happen(recipe, capsys):
    assert main(["validate", recipe]) == 0
    assert capsys.readouterr().out == (
        "kd.json: 'A title': a new toy learns from 'somewhere'; losses 0 to 1 × shift as 'kd', 0.5 × shift; "
        "stages teacher (10 steps), projectors (1 step), distill (1 epoch); fp32\n"
    )


def test_validate_says_how_losses_are_weighed_and_balanced(recipe, capsys, site):
    site.install("zoo-weights", weights="weights")
    weighed = ["--set", "losses.shift.weights=even", "--set", "token_weights.even.use=even"]
    assert main(["validate", recipe, *weighed, "--set", "stages.distill.balance=pcgrad"]) == 0
    said = capsys.readouterr().out
    assert "0.5 × shift weighed by 'even';" in said
    assert "distill (1 epoch, balanced by 'pcgrad');" in said


def test_faults_are_lines_without_a_traceback(recipe, capsys):
    assert main(["validate", recipe, "--set", "seed=x", "--set", "sead=1"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        "error: sead: unknown key, did you mean 'seed'? (set by --set sead=1)\n"
        "error: seed: 'x' is not an integer (set by --set seed=x)\n"
    )


def test_show_prints_what_was_merged(recipe, capsys):
    assert main(["show", recipe, "--set", "losses.kd=null"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == RECIPE | {"losses": {"shift": RECIPE["losses"]["shift"]}}


def test_show_origin_prints_who_set_each_leaf(recipe, capsys):
    Path("pair.json").write_text('{"seed": 3}')
    assert main(["show", recipe, "--on", "pair.json", "--set", "losses.kd.weight=0.25", "--origin"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'title = "A title"  (kd.json)' in lines
    assert "seed = 3  (pair.json)" in lines
    assert "losses.kd.weight = 0.25  (--set losses.kd.weight=0.25)" in lines
    assert len(lines) == len(set(lines)) == 16


def test_list_prints_plain_lines_where_nobody_looks(recipe, capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out == (
        "losses:\n"
        "  shift  [good]  Moves the student a little.\n"
        "      s + t\n"
        "      A paper, 2026\n"
        "      width (integer ≥ 1, default 64): Of the projection.\n"
        '      schedule (object, default {"start": 1.0})\n'
        "aligners:\n"
        "  by_hand  [good]  Pairs nothing.\n"
        "fusions:\n"
        "  mean  [good]  The mean of all experts.\n"
        "      layer (integer)\n"
        "      into ('block' or 'alone', default 'block'): \"block\": the fused output takes the place of the experts' "
        'output: a shared expert and the residual stream are added, the final norm follows. "alone": the fused '
        "output itself is the state.\n"
        "      judge ('model' or 'fused', default 'model'): Whose prediction the teacher's is, for the losses that "
        "read the fused state.\n"
        "model adapters:\n"
        "  toy  [good]  Two families.\n"
        "  toy_moe  [good]  Two families.\n"
    )


def test_list_prints_a_table_on_a_terminal(recipe, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out
    assert "width (integer ≥ 1, default 64)" in lines
    assert "┏━" in lines


def test_list_prints_json_for_programs(recipe, capsys):
    assert main(["list", "--json"]) == 0
    declared = json.loads(capsys.readouterr().out)
    assert declared["loss"]["shift"]["formula"] == "s + t"
    assert declared.keys() == {"loss", "aligner", "fusion", "model_adapter"}


def test_a_loose_plugin_is_listed_and_used(recipe, capsys):
    loose = str(Path(__file__).parent / "fixtures" / "other.py")
    assert main(["list", "--plugin", loose]) == 0
    assert f"  other  [{loose}]  \n" in capsys.readouterr().out
    assert main(["validate", recipe, "--plugin", loose, "--set", "losses.kd.use=other"]) == 0


def test_a_broken_plugin_stops_every_command_that_needs_plugins(recipe, capsys):
    loose = str(Path(__file__).parent / "fixtures" / "misspelt_hook.py")
    line = f"error: plugin '{loose}': 'register_plugin' is no hook, did you mean 'register_plugins'?\n"
    for command in (["list"], ["schema"], ["validate", recipe], ["show", recipe]):
        assert main([*command, "--plugin", loose]) == 2
        assert capsys.readouterr().err == line


def test_schema_is_printed_or_written(recipe, capsys):
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert main(["schema", "--write", "schema.json"]) == 0
    assert Path("schema.json").read_text() == printed
    assert main(["schema", "--write", "no/folder.json"]) == 2
    assert capsys.readouterr().err == "error: no/folder.json: cannot be written (No such file or directory)\n"


def test_run_hands_everything_on(launched):
    calls, _ = launched
    merged = ["--on", "p.json", "--on", "q.json", "--set", "a=1", "--plugin", "m.py"]
    code = main(["run", "r.json", *merged, "--ranks", "2", "--out", "runs/x"])
    assert code == 7
    assert calls == [
        {
            "recipe_path": Path("r.json"),
            "on": (Path("p.json"), Path("q.json")),
            "sets": ("a=1",),
            "plugins": (Path("m.py"),),
            "ranks": 2,
            "out": Path("runs/x"),
        }
    ]


def test_an_interruption_is_a_word_and_130(launched, capsys):
    _, module = launched

    def interrupted(**arguments):
        raise KeyboardInterrupt

    module.launch_run = interrupted
    assert main(["run", "r.json"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_several_faults_are_several_lines(launched, capsys):
    _, module = launched

    def faulty(**arguments):
        raise KdzooError("a: b\nc: d")

    module.launch_run = faulty
    assert main(["run", "r.json"]) == 2
    assert capsys.readouterr().err == "error: a: b\nerror: c: d\n"


@pytest.mark.parametrize("arguments", [["run"], ["runn"], ["run", "r.json", "--ranks", "0"], ["list", "--no"]])
def test_wrong_usage_is_2(arguments, capsys):
    assert main(arguments) == 2
    assert "Usage: kdzoo" in capsys.readouterr().err


def test_help_and_version_are_0(capsys):
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("kdzoo, version ")


def python(code: str, *arguments: str, **streams) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], text=True, check=False, **streams)


# These run with the plugins that are really installed, and a cache of their own.
RUN = """
import sys
from kdzoo.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "deepspeed", "rich", "jsonschema", "pydantic", "pluggy"}
print(*sorted(heavy & sys.modules.keys()), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache that knows all installed plugins, and a fixture's."""
    environment = os.environ | {"KDZOO_CACHE": str(tmp_path_factory.mktemp("cache"))}
    loose = str(Path(__file__).parent / "fixtures" / "good.py")
    first = python(RUN, "list", "--plugin", loose, capture_output=True, env=environment)
    assert (first.returncode, "torch" in first.stderr.split()) == (0, True), first.stderr
    return environment, ["--plugin", loose]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "imported"),
    [
        (["list"], ""),
        (["list", "--json"], ""),
        (["schema"], "pydantic"),
        (["validate", "kd.json"], "jsonschema pydantic"),
        (["show", "kd.json"], "jsonschema pydantic"),
    ],
)
def test_with_a_warm_cache_nothing_heavy_is_imported(warm, tmp_path, command, imported):
    environment, plugin = warm
    (tmp_path / "kd.json").write_text(json.dumps(RECIPE))
    done = python(RUN, *command, *plugin, capture_output=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (0, imported)


def test_help_imports_nothing_of_all_this():
    done = python(RUN, "--help", capture_output=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_a_reader_that_goes_away_is_no_traceback(warm):
    environment, plugin = warm
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from kdzoo.cli import main; sys.exit(main(sys.argv[1:]))"
    with os.fdopen(write, "w") as gone:
        done = python(code, "list", *plugin, stdout=gone, stderr=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stderr) == (1, "")
