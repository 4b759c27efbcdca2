"""The schema for files takes what is valid as a patch; the committed one is the generated one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from kdzoo.plugin.declarations import Declarations, declarations
from kdzoo.recipe.load import load_recipe
from kdzoo.recipe.model import Recipe
from kdzoo.recipe.schema import recipe_schema

RECIPES = Path(__file__).parents[2] / "recipes"
COMMITTED = RECIPES / "recipe.schema.json"
FOLDERS = (RECIPES, RECIPES / "pairs", RECIPES / "ablations")
FILES = sorted({file for folder in FOLDERS for file in folder.glob("*.json")} - {COMMITTED})
WHOLE = [file for file in FILES if file.parent == RECIPES and file.name != "base.json"]


@pytest.fixture
def accepts(declared):
    validator = Draft202012Validator(recipe_schema(declared))
    return validator.is_valid


@pytest.mark.parametrize("whole", [False, True])
def test_it_is_a_draft_2020_12_schema(declared, whole):
    Draft202012Validator.check_schema(recipe_schema(declared, whole))


def test_without_plugins_it_is_one_too():
    Draft202012Validator.check_schema(recipe_schema(Declarations({})))


def test_a_file_may_be_any_part_of_a_recipe(accepts, valid):
    assert accepts(valid)
    assert accepts({})
    assert accepts({"$schema": "./recipe.schema.json", "extends": ["a.json"], "seed": 1})
    assert accepts({"extends": "a.json"})
    assert not accepts({"extends": 1})


def test_null_deletes_any_key(accepts):
    assert accepts(
        {
            "title": None,
            "student": {"config": None},
            "losses": {"kd": None, "gold": {"use": "gold", "params": None}},
            "stages": {"distill": {"data": {"lab": None}, "betas": None}},
            "align": None,
        }
    )


def test_a_file_with_a_wrong_key_or_value_is_refused(accepts):
    assert not accepts({"sead": 1})
    assert not accepts({"losses": {"kd": {"use": "wide", "params": {"widht": 1}}}})
    assert not accepts({"losses": {"kd": {"use": "wied"}}})
    assert not accepts({"fuse": {"experts": {"use": "wide"}}})


def test_parameters_without_their_plugin_wait_for_it(accepts):
    assert accepts({"losses": {"kd": {"params": {"anything": 1}}}})


def test_keys_carry_their_documentation(declared):
    schema = recipe_schema(declared)
    assert schema["$defs"]["loss.wide"]["properties"]["width"]["description"] == "Of the low space."
    for name in ("LossSlot", "Stage", "ModelSource"):
        assert schema["$defs"][name]["description"]


def test_every_key_of_the_model_stands_in_it(declared):
    assert recipe_schema(declared, whole=True)["properties"].keys() == Recipe.model_fields.keys()


def test_the_valid_recipe_is_typed(valid):
    recipe = Recipe.model_validate(valid)
    assert recipe.losses["kd"].weight == 1.0
    assert recipe.align.use == "by_bytes"


def test_the_committed_schema_is_the_generated_one():
    """Of the plugins that are installed here."""
    assert json.loads(COMMITTED.read_text(encoding="utf-8")) == recipe_schema(declarations()), (
        "run: kdzoo schema --write recipes/recipe.schema.json"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_fits_the_committed_schema(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    Draft202012Validator(json.loads(COMMITTED.read_text(encoding="utf-8"))).validate(content)
    assert (file.parent / content["$schema"]).resolve() == COMMITTED


@pytest.mark.parametrize("file", WHOLE, ids=lambda file: file.stem)
def test_every_recipe_is_valid(file):
    assert load_recipe(file).recipe.title
