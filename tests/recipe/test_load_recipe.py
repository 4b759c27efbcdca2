"""From files and flags to one recipe: what is merged in which order, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdzoo.errors import RecipeError
from kdzoo.recipe.load import load_recipe, read_json


def error_of(*arguments, **keywords) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(*arguments, **keywords)
    return str(error.value)


def test_a_recipe_comes_resolved_typed_and_with_who_set_what(write, valid):
    path = write("recipes/kd.json", {"$schema": "./recipe.schema.json", **valid})

    loaded = load_recipe(path)

    assert loaded.resolved == valid
    assert loaded.recipe.losses["kd"].params == {"width": 32}
    assert loaded.provenance["losses.kd.params.width"] == "recipes/kd.json"
    assert loaded.path == path
    assert loaded.plugin_files == ()


def test_files_and_flags_are_merged_in_order(write, valid):
    write("recipes/pairs/lab.json", valid | {"seed": 1, "title": "lab"})
    write("recipes/more.json", {"extends": "pairs/lab.json", "seed": 2, "description": "more"})
    path = write("recipes/kd.json", {"extends": ["more.json"], "title": "kd", "losses": {"gold": None}})
    big = write("recipes/pairs/big.json", {"student": {"config": None, "tokenizer": None, "name": "gpt2"}})

    loaded = load_recipe(path, on=[big], sets=["losses.kd.weight=0.25", "description=null", "seed=3"])

    assert loaded.resolved["student"] == {"name": "gpt2"}
    assert loaded.resolved["losses"] == {"kd": {"use": "wide", "params": {"width": 32}, "weight": 0.25}}
    assert "description" not in loaded.resolved
    assert loaded.provenance == {
        "title": "recipes/kd.json",
        "seed": "--set seed=3",
        "student.name": "recipes/pairs/big.json",
        "teacher.name": "recipes/pairs/lab.json",
        "data.train.lab": "recipes/pairs/lab.json",
        "losses.kd.use": "recipes/pairs/lab.json",
        "losses.kd.params.width": "recipes/pairs/lab.json",
        "losses.kd.weight": "--set losses.kd.weight=0.25",
        "stages.distill.steps": "recipes/pairs/lab.json",
    }


def test_a_pair_brings_what_it_extends(write, valid):
    path = write("kd.json", valid)
    write("pairs/engine.json", {"deepspeed": {"zero_optimization": {"stage": 0}}, "seed": 5})
    pair = write("pairs/big.json", {"extends": "engine.json", "seed": 6})

    loaded = load_recipe(path, on=[pair])

    assert loaded.resolved["seed"] == 6
    assert loaded.provenance["deepspeed.zero_optimization.stage"] == "pairs/engine.json"


def test_two_parents_may_share_one(write, valid):
    write("base.json", valid)
    write("a.json", {"extends": "base.json"})
    write("b.json", {"extends": "base.json"})

    assert load_recipe(write("c.json", {"extends": ["a.json", "b.json"]})).resolved == valid


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("7", 7),
        ("true", True),
        ('"7"', "7"),
        ("some text=x", "some text=x"),
        ("", ""),
        ("NaN", None),
    ],
)
def test_a_flag_is_json_or_else_text(write, valid, text, value):
    path = write("kd.json", valid)
    if value is None:
        assert error_of(path, sets=[f"title={text}"]) == (
            f"--set title={text}: 'NaN' is not a JSON number; write a finite number"
        )
    elif isinstance(value, str):
        assert load_recipe(path, sets=[f"title={text}"]).recipe.title == value
    else:
        shown = "true" if value is True else value
        assert error_of(path, sets=[f"title={text}"]) == (f"title: {shown} is not a string (set by --set title={text})")


@pytest.mark.parametrize("flag", ["seed", "=3", "a..b=3", ".a=3", "a.=3"])
def test_a_flag_that_is_no_assignment_is_refused(write, valid, flag):
    assert error_of(write("kd.json", valid), sets=[flag]) == f"--set {flag}: not a setting; write it as key.path=value"


def test_a_flag_below_an_unknown_key_is_an_unknown_key(write, valid):
    assert error_of(write("kd.json", valid), sets=["stages.distill.lrr.x=1"]) == (
        "stages.distill.lrr: unknown key, did you mean 'lr'? (set by --set stages.distill.lrr.x=1)"
    )


def test_all_faults_come_in_one_error(write, valid):
    path = write("kd.json", valid | {"sead": 1})
    assert error_of(path, sets=["seed=x"]).splitlines() == [
        "sead: unknown key, did you mean 'seed'? (set by kd.json)",
        "seed: 'x' is not an integer (set by --set seed=x)",
    ]


BROKEN = {
    '{"a": 1,\n  "b" 2}': "kd.json:2:7: not JSON (expecting ':' delimiter); correct it",
    '{"a": 1,}': "kd.json:1:9: not JSON (illegal trailing comma before end of object); correct it",
    "": "kd.json:1:1: not JSON (expecting value); correct it",
    '{"a": {"b": 1, "b": 2}}': "kd.json: key 'b' occurs twice in one object; remove one",
    '{"a": NaN}': "kd.json: 'NaN' is not a JSON number; write a finite number",
    "[1]": "kd.json: not a JSON object; a recipe starts with '{'",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_cannot_be_read_says_where(write, text):
    line = BROKEN[text]
    if "trailing comma" in line:  # named so since Python 3.13
        assert error_of(write("kd.json", text)).startswith("kd.json:1:")
    else:
        assert error_of(write("kd.json", text)) == line


def test_a_file_in_another_encoding_says_so(folder):
    Path("kd.json").write_bytes(b'{"title": "\xe9"}')
    assert error_of(Path("kd.json")) == "kd.json: not UTF-8 at byte 11; save it as UTF-8"


def test_a_folder_is_no_file(folder):
    with pytest.raises(RecipeError, match=r"^\.: cannot be read \(Is a directory\)$"):
        read_json(Path())


def test_extending_in_a_circle_names_the_circle(write):
    path = write("a.json", {"extends": "sub/b.json"})
    write("sub/b.json", {"extends": ["../c.json"]})
    write("c.json", {"extends": ["a.json"]})

    assert error_of(path) == "a.json: extends itself; a.json -> sub/b.json -> c.json -> a.json"


@pytest.mark.parametrize("extends", [1, [1], {"a": 1}, None])
def test_extends_is_a_path_or_paths(write, extends):
    assert error_of(write("a.json", {"extends": extends})) == (
        "a.json: 'extends' is neither a path nor a list of paths; give one of the two"
    )


def test_extending_nothing_names_what_is_close(write):
    write("pairs/lab_pair.json", {})
    path = write("a.json", {"extends": "pairs/lab_pear.json"})

    assert error_of(path) == (
        "a.json: extends 'pairs/lab_pear.json', which does not exist, did you mean 'pairs/lab_pair.json'?"
    )


def test_the_ending_may_be_left_out(write, valid):
    write("recipes/kd.json", valid)
    assert load_recipe(Path("recipes/kd")).path == Path("recipes/kd.json")


def test_a_misspelt_recipe_names_those_that_are_close(write, valid):
    for name in ("mine/residual.json", "mine/residual_2.json", "other.json"):
        write(name, valid)

    assert error_of(Path("mine/resdual.json")) == (
        "mine/resdual.json: no such recipe, did you mean 'mine/residual.json' or 'mine/residual_2.json'?"
    )
    assert error_of(Path("zzzzzz")) == "zzzzzz: no such recipe; 'kdzoo list --recipes' shows the names"
    assert error_of(Path("other.json"), on=[Path("othre")]) == ("othre: no such recipe, did you mean 'other.json'?")


def test_loose_plugins_are_relative_to_the_file_that_names_them(write, valid):
    write("base/mine.py", "")
    write("base/base.json", valid | {"plugins": ["mine.py"]})

    loaded = load_recipe(write("kd.json", {"extends": "base/base.json"}), loose=[Path("other.py")])

    assert loaded.plugin_files == (Path("other.py"), Path("base/mine.py"))


def test_a_loose_plugin_that_does_not_exist_says_who_named_it(write, valid):
    path = write("recipes/kd.json", valid | {"plugins": ["mine.py"]})

    assert error_of(path) == "plugins[0]: no such file 'recipes/mine.py' (set by recipes/kd.json)"


def test_plugins_of_the_wrong_type_are_a_fault_like_others(write, valid):
    assert error_of(write("kd.json", valid | {"plugins": "mine.py"})) == (
        "plugins: 'mine.py' is not a list, each string (set by kd.json)"
    )
