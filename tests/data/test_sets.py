"""Sets have names: from the folder of data where they are there, else from the hub."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from kdzoo.data.rows import load_rows
from kdzoo.data.sets import SETS, set_file
from kdzoo.errors import DataError, RecipeError
from kdzoo.recipe.load import load_recipe
from kdzoo.recipe.model import Source

ROW = {"instruction": "Say it.", "input": "", "output": ["It.", "That."]}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the hub is asked for; every file there has one row."""
    asked = []

    def fetch(repository: str, file: str, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        (tmp_path / "hub.jsonl").write_text(json.dumps(ROW))
        return str(tmp_path / "hub.jsonl")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.delenv("KDZOO_DATA", raising=False)
    return asked


def test_a_file_of_ones_own_goes_before_the_hub(hub, monkeypatch, tmp_path):
    own = tmp_path / "sni" / "test.jsonl"
    own.parent.mkdir()
    own.write_text(json.dumps(ROW))
    monkeypatch.setenv("KDZOO_DATA", str(tmp_path))
    assert set_file("sni", "there") == own
    assert load_rows(Source(set="sni"), "there")[0].references == ("It.", "That.")
    assert hub == []


def test_a_set_comes_from_the_hub_under_the_authors_name(hub):
    assert load_rows(Source(set="dolly"), "there")[0].instruction == "Say it."
    assert load_rows(Source(set="unni"), "there")
    assert hub == [("MiniLLM/dolly", "valid.jsonl", "dataset"), ("MiniLLM/uinst", "11_/valid.jsonl", "dataset")]


def test_without_the_file_and_the_hub_one_line_says_where_it_belongs(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setenv("KDZOO_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"^there: '.*/vicuna/test\.jsonl' does not exist, and 'MiniLLM/Vicuna' cannot"):
        set_file("vicuna", "there")
    with pytest.raises(DataError, match=r"'unni_short' is not on the hub; save it as \$KDZOO_DATA/unni_short/test"):
        set_file("unni_short", "there")


def test_a_wrong_name_is_told_with_the_right_ones():
    with pytest.raises(
        DataError, match=r"^there\.set: unknown evaluation set 'doly', did you mean 'dolly'\?; known are dolly, "
    ):
        load_rows(Source(set="doly"), "there")


@pytest.mark.parametrize("name", SETS)
def test_real_rows_load_by_name(shared, monkeypatch, name):
    monkeypatch.setenv("KDZOO_DATA", str(shared / "data"))
    if not Path(shared, "data", SETS[name].file).is_file():
        pytest.skip(f"'{name}' is not among the real data")
    rows = load_rows(Source(set=name), "there")
    assert len(rows) >= 80
    assert all(row.references for row in rows)


def test_a_recipe_names_a_set_where_it_names_rows(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "sft.json"
    sets = ['evaluation.sets={"vicuna": {"set": "vicuna"}}', 'data.held_out={"set": "dolly", "lab": null}']
    loaded = load_recipe(recipe, sets=sets).recipe
    assert loaded.evaluation.sets["vicuna"] == Source(set="vicuna")
    assert loaded.data.held_out == Source(set="dolly")
    with pytest.raises(RecipeError, match=r"'lab' .* and 'set' .* exclude each other"):
        load_recipe(recipe, sets=['data.train.set="dolly"'])
