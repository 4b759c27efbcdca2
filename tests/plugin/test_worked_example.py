"""The plugin in docs/plugins.md: it validates, its own test passes, and that test would find a wrong formula."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kdzoo.cli import main

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def example(tmp_path, monkeypatch) -> Path:
    """The current folder, with the example's three files beside the recipes."""
    text = (REPOSITORY / "docs" / "plugins.md").read_text()
    found = re.findall(r"^```(?:python|json)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    plugin, recipe, test = found
    (tmp_path / "jeffreys.py").write_text(plugin)
    (tmp_path / "jeffreys.json").write_text(recipe)
    (tmp_path / "test_jeffreys.py").write_text(test)
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def its_test(example, monkeypatch):
    """`its_test()`: the example's test as it is on disk now, imported afresh."""
    monkeypatch.syspath_prepend(example)
    names = ("jeffreys", "test_jeffreys")

    def its_test() -> ModuleType:
        for name in names:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("test_jeffreys")

    yield its_test
    for name in names:
        sys.modules.pop(name, None)


def test_its_recipe_is_valid(example, capsys):
    assert main(["validate", "jeffreys.json"]) == 0
    assert "losses 0.5 × cross_entropy as 'sft', 0.5 × jeffreys as 'kd'" in capsys.readouterr().out


def test_it_is_listed_with_its_parameter(example, capsys):
    assert main(["list", "--plugin", "jeffreys.py"]) == 0
    assert "temperature (number > 0, default 1.0): Divides the logits of both models." in capsys.readouterr().out


def test_a_parameter_that_it_does_not_have_is_refused(example, capsys):
    assert main(["validate", "jeffreys.json", "--set", "losses.kd.params.temprature=1"]) == 2
    assert "losses.kd.params.temprature: unknown key, did you mean 'temperature'?" in capsys.readouterr().err


def test_it_is_the_formula(its_test):
    its_test().test_it_is_the_formula_in_value_and_gradient()


def test_its_test_finds_a_wrong_formula(example, its_test):
    plugin = example / "jeffreys.py"
    plugin.write_text(plugin.read_text().replace("ops.reverse_kl", "ops.forward_kl"))
    with pytest.raises(AssertionError):
        its_test().test_it_is_the_formula_in_value_and_gradient()
