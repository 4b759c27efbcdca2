"""A suite is read, merged and refused where its students could not be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from kdzoo.compare.suite import Suite, load_suite, suite_schema
from kdzoo.errors import RecipeError

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "recipes" / "suites"
SCHEMA = FOLDER / "suite.schema.json"
SUITES = sorted(set(FOLDER.glob("*.json")) - {SCHEMA})

PLUGIN = """
import kdzoo


@kdzoo.hookimpl
def register_plugins(register):
    pass
"""


def change(path: Path, **keys) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return path


def test_cells_are_recipes_times_seeds_the_baseline_first(suite):
    cells = load_suite(suite).cells
    assert [(cell.pair, cell.name) for cell in cells] == [("tiny", n) for n in ("sft-1", "kl-1", "sft-2", "kl-2")]
    assert [cell.loaded.recipe.seed for cell in cells] == [1, 1, 2, 2]
    assert [cell.loaded.recipe.student.seed for cell in cells] == [1, 1, 2, 2]
    assert len({cell.key for cell in cells}) == 4


def test_the_patch_and_flags_go_over_every_recipe(suite):
    change(suite, patch={"stages": {"distill": {"lr": 1e-2}}})
    found = load_suite(suite, sets=["stages.distill.batch=4"], seeds=[7])
    assert {
        (c.seed, c.loaded.recipe.stages["distill"].lr, c.loaded.recipe.stages["distill"].batch) for c in found.cells
    } == {(7, 1e-2, 4)}
    assert found.suite.seeds == [7]


def test_another_pair_takes_the_place_of_the_suites(suite, write):
    other = write("pairs/other.json", {"pair": "other", "data": {"train": {"limit": 10}}})
    assert load_suite(suite, on=[other]).pairs == ("other",)


def test_titles_and_trackers_make_no_other_cell(suite, write):
    before = [cell.key for cell in load_suite(suite).cells]
    sft = json.loads(Path("sft.json").read_text())
    write("sft.json", {**sft, "title": "x", "description": "y"})
    assert [cell.key for cell in load_suite(suite).cells] == before
    write("sft.json", {**sft, "precision": "bf16"})
    assert not set(before) & {cell.key for cell in load_suite(suite).cells}


def test_what_a_loose_plugin_says_makes_another_cell(suite, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    one = load_suite(suite, loose=[plugin]).cells[0].key
    plugin.write_text(PLUGIN + "# changed\n")
    assert load_suite(suite, loose=[plugin]).cells[0].key != one


@pytest.mark.parametrize(
    ("patch", "address"),
    [
        ({"data": {"train": {"limit": 10}}}, "data"),
        ({"stages": {"distill": {"steps": 80}}}, "stages.distill.steps"),
        ({"stages": {"distill": {"batch": 8}}}, "stages.distill.batch"),
        ({"student": {"config": {"n_layer": 1}}}, "student"),
        ({"evaluation": {"max_new_tokens": 4}}, "evaluation"),
    ],
)
def test_students_of_another_budget_are_not_compared(suite, write, patch, address):
    write("kl.json", {"extends": "sft.json", "title": "KL", **patch})
    with pytest.raises(RecipeError, match=f"^kl.json on 'tiny': {address}: differs from that of 'sft'; .* 'patch'$"):
        load_suite(suite)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"seed": [1]}, "seed: unknown key, did you mean 'seeds'?"),
        ({"seeds": []}, "seeds: list should have at least 1 item"),
        ({"seeds": "1"}, "seeds: input should be a valid list"),
        ({"against": {"kll": "sft"}}, "against: 'kll' is not one of the suite's recipes, did you mean 'kl'?"),
        ({"recipes": ["../kl.json", "../pairs/kl.json"]}, "have the same name; rename one"),
        ({"recipes": ["../kll.json"]}, "kll.json: no such recipe, did you mean 'kl.json'"),
        ({"patch": {"precison": "fp32"}}, r"precison: unknown key.*\(set by suites/two.json, patch\)"),
    ],
)
def test_a_fault_is_a_line(suite, keys, told):
    with pytest.raises(RecipeError, match=told.replace("?", r"\?")):
        load_suite(change(suite, **keys))


def test_two_names_for_one_run_are_refused(suite, write):
    """As when a pair sets the key that an ablation is about: its table would show a difference of nothing."""
    write("again.json", {"extends": "kl.json", "title": "Another title"})
    with pytest.raises(
        RecipeError, match=r"^again\.json on 'tiny': is the same run as 'kl'; the pair, the suite's 'patch' or"
    ):
        load_suite(change(suite, recipes=["../kl.json", "../again.json"]))


@pytest.mark.slow
@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_committed_suites_are_valid(path):
    assert load_suite(path).cells
    Draft202012Validator(suite_schema()).validate(json.loads(path.read_text()))


def test_the_committed_schema_is_the_generated_one():
    assert json.loads(SCHEMA.read_text()) == suite_schema()


def test_every_key_is_documented_in_the_schema_or_says_itself():
    undocumented = {name for name, key in suite_schema()["properties"].items() if "description" not in key}
    assert undocumented == {"$schema", "title", "description"}
    assert undocumented - {"$schema"} < Suite.model_fields.keys()
