"""The recipes that come with kdzoo are found by their names, from any folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdzoo.compare.suite import load_suite
from kdzoo.errors import RecipeError
from kdzoo.recipe.library import RECIPES, SUITES, library, recipe_file, shelf, suite_file
from kdzoo.recipe.load import existing_recipe, load_recipe

PAIR = library() / "pairs" / "lab_llama_to_llama.json"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, **content: object) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def test_a_recipe_is_found_with_or_without_its_folder_and_its_ending() -> None:
    assert existing_recipe(Path("dskd")) == existing_recipe(Path("dskd.json")) == library() / "dskd.json"
    assert existing_recipe(Path("lab_llama_to_llama")) == existing_recipe(Path("pairs/lab_llama_to_llama")) == PAIR
    assert existing_recipe(Path("no_mask")) == library() / "ablations" / "no_mask.json"


def test_a_recipe_and_a_suite_may_have_one_name() -> None:
    assert suite_file("lab") == suite_file("suites/lab.json") == library() / "suites" / "lab.json"
    assert recipe_file("lab") == library() / "pairs" / "lab.json"


def test_no_two_methods_have_one_title() -> None:
    titles = [json.loads(file.read_text()).get("title") for file in library().glob("*.json")]
    assert [title for title in titles if title and titles.count(title) > 1] == []


@pytest.mark.parametrize("name", ["../dskd", "/dskd", "./pairs/../dskd", "suites/lab", "recipe.schema", ".", ""])
def test_a_path_that_does_not_exist_is_no_name(name: str) -> None:
    assert recipe_file(name) is None


def test_a_file_that_exists_wins_over_a_name() -> None:
    Path("dskd").mkdir()
    assert existing_recipe(Path("dskd")) == library() / "dskd.json"
    write("dskd.json")
    assert existing_recipe(Path("dskd")) == Path("dskd.json")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dskd_plus_residul", "dskd_plus_residul: no such recipe, did you mean 'dskd_plus_residual' or "),
        ("pairs/lab_lama_to_llama", "pairs/lab_lama_to_llama: no such recipe, did you mean 'lab_llama_to_llama' or "),
        ("zzz", "zzz: no such recipe; 'kdzoo list --recipes' shows the names"),
    ],
)
def test_a_name_that_is_not_there_is_one_line(name: str, told: str) -> None:
    with pytest.raises(RecipeError) as error:
        existing_recipe(Path(name))
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


def test_a_users_recipe_extends_recipes_of_the_library_and_its_neighbours() -> None:
    write("mine/more.json", description="mine")
    path = write("mine/kd.json", extends=["dskd", "pairs/lab_llama_to_llama", "more"], title="Mine")

    loaded = load_recipe(path, on=[Path("lab_mixtral_to_llama")])

    assert (loaded.recipe.title, loaded.recipe.description) == ("Mine", "mine")
    assert loaded.provenance["losses.dskd.use"] == str(library() / "dskd.json")
    assert loaded.provenance["pair"] == str(PAIR.with_name("lab_mixtral_to_llama.json"))


def test_a_users_suite_names_recipes_of_the_library_and_its_neighbours() -> None:
    write("mine/kl.json", extends="forward_kl", title="Mine", losses={"kd": {"weight": 0.25}})
    suite = write(
        "mine/suite.json",
        title="Two",
        pairs=["lab_llama_to_llama"],
        baseline="sft",
        recipes=["forward_kl", "kl"],
        seeds=[1],
    )
    loaded = load_suite(suite)
    assert (loaded.pairs, loaded.recipes) == (("lab_llama_to_llama",), ("sft", "forward_kl", "kl"))
    assert load_suite(suite, on=[Path("lab_llama_to_llama")]).pairs == loaded.pairs
    with pytest.raises(RecipeError, match=r"^lob: no such suite, did you mean 'lab'\?$"):
        load_suite(Path("lob"))


def test_a_file_name_stands_once_in_the_folders_that_are_searched() -> None:
    for folders in (RECIPES, SUITES):
        stems = [stem for folder in folders for stem in shelf(folder)]
        assert len(stems) == len(set(stems))
    files = {file for folder in (*RECIPES, *SUITES) for file in shelf(folder).values()}
    assert files == {file for file in library().rglob("*.json") if not file.name.endswith(".schema.json")}
