"""docs/recipes.md names every key with its default, and the JSON in the docs is what it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from kdzoo.compare.suite import Suite
from kdzoo.plugin.declarations import declarations
from kdzoo.recipe.load import load_recipe
from kdzoo.recipe.model import Section
from kdzoo.recipe.schema import recipe_schema
from kdzoo.recipe.validate import DEEPSPEED_KEYS, OWNED_BY_THE_RECIPE

REPOSITORY = Path(__file__).parents[2]
DOC = REPOSITORY / "docs" / "recipes.md"
SUITES = REPOSITORY / "docs" / "compare.md"
TEXTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("benchmarks/*.md")])


def sections(base: type[Section] = Section) -> list[type[Section]]:
    """Every section of a recipe or a suite."""
    return [each for section in base.__subclasses__() for each in (section, *sections(section))]


def table(section: type[Section]) -> dict[str, str]:
    """Key -> default of the table after `<!-- keys: Name -->`."""
    doc = SUITES if section is Suite else DOC
    after = doc.read_text().partition(f"<!-- keys: {section.__name__} -->\n\n")[2]
    rows = [line.strip("| ").split(" | ") for line in after.partition("\n\n")[0].splitlines()[2:]]
    return {key.strip("`"): default.strip("`") for key, _, default in rows}


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_stands_in_the_table_of_its_section(section):
    assert table(section).keys() == section.model_fields.keys()


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_default_is_the_one_of_the_table(section):
    for key, said in table(section).items():
        field = section.model_fields[key]
        assert (said == "required") == field.is_required(), key
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, bool | int | float | tuple | list) or default in ({}, "") or said.startswith('"'):
            assert json.loads(said) == json.loads(json.dumps(default)), key


def test_every_first_level_key_of_deepspeed_is_allowed_or_has_its_replacement():
    text = DOC.read_text().partition("\n## DeepSpeed\n")[2].partition("\n## ")[0]
    refused, allowed = text.split("Allowed on the first level:")
    assert set(re.findall(r"`(\w+)`", allowed.partition("Any other key")[0])) == set(DEEPSPEED_KEYS)
    in_rows = [line.split("|")[1] for line in refused.splitlines() if line.startswith("| `")]
    assert {key for cell in in_rows for key in re.findall(r"`(\w+)`", cell)} == OWNED_BY_THE_RECIPE.keys()


def blocks(text: Path, language: str = "json") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text.read_text(), flags=re.MULTILINE | re.DOTALL)


def examples() -> list[object]:
    return [
        pytest.param(block, id=f"{text.stem}-{number}")
        for text in (DOC, REPOSITORY / "README.md")
        for number, block in enumerate(blocks(text), start=1)
    ]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A copy of recipes/, for examples to stand in."""
    return Path(shutil.copytree(REPOSITORY / "recipes", tmp_path / "recipes"))


def test_there_are_examples_of_both_kinds():
    whole = ["title" in json.loads(block) for block in blocks(DOC)]
    assert any(whole)
    assert not all(whole)


@pytest.mark.parametrize("block", examples())
def test_an_example_is_valid_as_its_text_says(block, recipes):
    """One with a title is a whole recipe of the folder recipes/; any other is a patch that `--on` puts on one."""
    content = json.loads(block)
    Draft202012Validator(recipe_schema(declarations())).validate(content)
    if "title" in content:
        (recipes / "example.json").write_text(block)
        load_recipe(recipes / "example.json")
    else:
        (recipes / "pairs" / "example.json").write_text(block)
        load_recipe(recipes / "dskd.json", on=[recipes / "pairs" / "example.json"])


def anchors(text: Path) -> set[str]:
    """The fragments that a heading of `text` can be linked by."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(REPOSITORY)))
def test_every_link_of_a_text_leads_somewhere(text):
    prose = re.sub(r"^```.*?^```$", "", text.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = (text.parent / path).resolve() if path else text
        assert file.exists(), target
        assert not fragment or fragment in anchors(file), target
