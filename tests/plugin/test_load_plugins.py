"""Every way in which a plugin can be wrong is one line that names it; a right one registers by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdzoo import Aligner, Fusion, Loss
from kdzoo.errors import PluginError
from kdzoo.plugin.registry import load_plugins

FIXTURES = Path(__file__).parent / "fixtures"
HOOKS = "'register_plugins', 'step_logged'"
KINDS = "kdzoo.Loss, kdzoo.TokenWeights, kdzoo.Aligner, kdzoo.Fusion, kdzoo.ModelAdapter, kdzoo.Tracker"


def test_an_installed_plugin_registers_by_name(site):
    site.install("zoo-good", "2.1", good="good")

    registry = load_plugins()

    good = sys.modules["good"]
    assert registry.of(Loss) == {"shift": good.Shift}
    assert registry.of(Aligner) == {"by_hand": good.ByHand}
    assert registry.of(Fusion) == {"mean": good.Mean}
    assert registry.model_adapters["toy"] is registry.model_adapters["toy_moe"]
    assert isinstance(registry.model_adapters["toy"], good.Toy)
    assert str(registry.providers["loss", "shift"]) == "plugin 'good' (zoo-good 2.1)"


def test_logged_steps_reach_every_plugin_that_listens(site, tmp_path):
    site.install("zoo-good", good="good")
    site.install("zoo-other", other="other")

    registry = load_plugins()
    registry.hook.step_logged(step=3, metrics={"loss": 2.5}, stage="distill", folder=tmp_path)

    assert sys.modules["good"].LOGGED == [(3, {"loss": 2.5})]


def test_a_loose_file_registers_like_an_installed_one(site):
    path = FIXTURES / "other.py"

    registry = load_plugins([path, FIXTURES.parent / "fixtures" / ".." / "fixtures" / "other.py"])

    assert list(registry.of(Loss)) == ["other"]
    assert str(registry.providers["loss", "other"]) == f"plugin '{path}'"
    assert load_plugins([path]).of(Loss) == registry.of(Loss), "the same text is imported once"


def test_plugins_come_sorted_by_distribution_and_name(site):
    site.install("b", first="good")
    site.install("a", z_last="other")

    assert [plugin.name for plugin in load_plugins().providers.values()][:2] == ["z_last", "first"]


BROKEN = {
    "does_not_import": (
        "cannot be imported; ModuleNotFoundError: No module named 'no_such_module_anywhere' (does_not_import.py:1)"
    ),
    "not_there": "cannot be imported; ModuleNotFoundError: No module named 'not_there'",
    "raises_in_hook": "'register_plugins' failed; NameError: name 'Lots' is not defined (raises_in_hook.py:16)",
    "misspelt_hook": "'register_plugin' is no hook, did you mean 'register_plugins'?",
    "unlike_any_hook": f"'before_all' is no hook; hooks are {HOOKS}",
    "unmarked": f"implements no hook; mark one with '@kdzoo.hookimpl', of {HOOKS}",
    "unknown_argument": "hook 'register_plugins' has no argument 'config'; it has 'register'",
    "not_a_loss": f"'register_plugins' got 'Plain'; it takes subclasses of {KINDS}",
    "not_a_class": f"'register_plugins' got a 'str' object; it takes subclasses of {KINDS}",
    "no_paper": "loss class 'Unpublished' has no 'paper'; give it a line of text",
    "no_visit": "loss class 'Blind' has neither a visit nor 'finish'; mark a method with '@kdzoo.visit'",
    "no_families": "model adapter class 'Nowhere' has no 'families'; give it a tuple of strings",
    "bad_name": "loss class 'Loud' is named 'Loud Loss'; use lower-case letters, digits and '_'",
    "bad_params": "loss class 'Loose' has 'Params' that do not inherit kdzoo.Params",
    "abstract": "aligner class 'Abstract' does not implement 'align'",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_one_line_that_names_it(site, name):
    site.install("zoo-good", good="good")
    site.install("zoo-broken", "0.2", **{name: name})

    with pytest.raises(PluginError) as error:
        load_plugins()

    assert str(error.value) == f"plugin '{name}' (zoo-broken 0.2): {BROKEN[name]}"


def test_two_losses_of_one_name_are_refused(site):
    site.install("zoo-good", good="good")
    site.install("zoo-same", same_loss="same_loss")

    with pytest.raises(PluginError) as error:
        load_plugins()

    assert str(error.value) == (
        "loss 'shift': registered by plugin 'good' (zoo-good 1.0) and by plugin 'same_loss' (zoo-same 1.0); "
        "rename or remove one of them"
    )


def test_a_loss_registered_twice_is_refused(site):
    site.install("zoo-twice", twice="twice")

    with pytest.raises(PluginError) as error:
        load_plugins()

    assert str(error.value) == (
        "loss 'twice': registered twice by plugin 'twice' (zoo-twice 1.0); rename or remove one of them"
    )


def test_every_fixture_is_tested():
    tested = BROKEN.keys() - {"not_there"} | {"good", "other", "same_loss", "twice", "weights"}
    assert {file.stem for file in FIXTURES.glob("*.py")} == tested


def test_two_entry_points_of_one_name_are_refused(site):
    site.install("zoo-a", shift="good")
    site.install("zoo-b", "0.3", shift="other")

    with pytest.raises(PluginError) as error:
        load_plugins()

    assert str(error.value) == (
        "plugin 'shift': installed twice, by 'zoo-a 1.0' and by 'zoo-b 0.3'; uninstall one of them"
    )


def test_two_entry_points_of_one_module_are_refused(site):
    site.install("zoo-a", one="good", two="good")

    with pytest.raises(PluginError) as error:
        load_plugins()

    assert str(error.value) == ("plugin 'two' (zoo-a 1.0): is the same module as plugin 'one'; remove one entry point")


def test_a_loose_copy_of_an_installed_plugin_is_refused(site):
    site.install("zoo-good", good="good")

    with pytest.raises(PluginError) as error:
        load_plugins([FIXTURES / "good.py"])

    assert str(error.value) == (
        f"loss 'shift': registered by plugin 'good' (zoo-good 1.0) and by plugin '{FIXTURES / 'good.py'}'; "
        "rename or remove one of them"
    )


def test_a_loose_file_that_does_not_exist_is_named(site):
    with pytest.raises(PluginError) as error:
        load_plugins([Path("mine.py")])

    assert str(error.value) == "plugin 'mine.py': no such file; give the path of a Python file"


def test_a_loose_file_that_is_no_python_names_the_line(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("import kdzoo\n\ndef broken(:\n")

    with pytest.raises(PluginError) as error:
        load_plugins([Path("mine.py")])

    assert str(error.value) == ("plugin 'mine.py': cannot be imported; SyntaxError: invalid syntax (mine.py, line 3)")


def test_a_loose_file_of_another_kind_is_refused(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("")

    with pytest.raises(PluginError) as error:
        load_plugins([Path("mine.txt")])

    cause = "ImportError: not a Python file (its name does not end in '.py')"
    assert str(error.value) == f"plugin 'mine.txt': cannot be imported; {cause}"
