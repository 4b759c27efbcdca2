"""What plugins declare is known without importing them, as long as their code is the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdzoo.cache import cache_dir
from kdzoo.errors import PluginError
from kdzoo.plugin.declarations import declarations

FIXTURES = Path(__file__).parent / "fixtures"


def forget(*modules: str) -> None:
    """As in a new process."""
    for module in modules:
        sys.modules.pop(module, None)


def test_a_loss_declares_its_texts_and_parameters(site):
    site.install("zoo-good", good="good")

    shift = declarations().of("loss")["shift"]

    assert (shift.kind, shift.name, shift.plugin) == ("loss", "shift", "good")
    assert shift.doc == "Moves the student\na little.\n\nWith a second paragraph."
    assert (shift.paper, shift.formula) == ("A paper, 2026", "s + t")
    assert shift.params["properties"]["width"] == {
        "default": 64,
        "description": "Of the projection.",
        "minimum": 1,
        "type": "integer",
    }
    assert shift.params["properties"]["schedule"]["$ref"] == "#/$defs/loss.shift.Schedule"
    assert shift.params["$defs"].keys() == {"loss.shift.Schedule"}
    assert shift.params["additionalProperties"] is False


READER = """
from typing import ClassVar, Literal

import kdzoo


class Reader(kdzoo.Loss):
    name, paper, formula = "reader", "A paper", "r"
    deviations: ClassVar = DEVIATIONS

    class Params(kdzoo.Params):
        mean: Literal["tokens", "batch"] = "tokens"
        width: Literal["whole"] | int = 1
        whole: bool = False

    @classmethod
    def needs(cls, params, same_tokens):
        NEEDS
        return kdzoo.Needs(
            teacher=frozenset({"hidden.last", "embed.input"}),
            facts=frozenset({"teacher.top1"}),
            tokenizers="same" if params.whole else "any",
            aligned=not same_tokens,
            batch_coupled=params.mean == "batch" or (params.width == "whole" and not same_tokens),
        )

    @kdzoo.visit
    def tokens(self, student, own):
        return kdzoo.Terms()

    @kdzoo.visit(when=lambda params: params.whole)
    def unseen(self, other):
        return kdzoo.Terms()


@kdzoo.hookimpl
def register_plugins(register):
    register(Reader)
"""


def write_reader(folder: Path, deviations: str = '("`f` differs.",)', needs: str = "") -> Path:
    (folder / "reader.py").write_text(READER.replace("DEVIATIONS", deviations).replace("NEEDS", needs))
    return folder / "reader.py"


def test_a_loss_declares_what_it_reads_and_where_it_differs(site, tmp_path):
    file = write_reader(tmp_path)

    reader = declarations([file]).of("loss")["reader"]

    assert reader.deviations == ["`f` differs."]
    assert reader.needs["one"] == {
        "logits": ["student"],
        "student": [],
        "teacher": ["embed.input", "hidden.last"],
        "streams": ["own"],
        "facts": ["teacher.top1"],
        "aligned": False,
        "vocabularies": False,
        "entries": [],
        "statistics": False,
        "artifacts": [],
    }
    assert reader.needs["two"] == reader.needs["one"] | {"aligned": True}
    assert reader.couples == [["mean", "batch"], ["width", "whole"]]
    assert declarations([file]).of("loss")["reader"] == reader, "from the cache"


def test_a_loss_of_one_tokenizer_declares_no_needs_for_two(site, tmp_path):
    file = write_reader(tmp_path, needs="params = params.model_copy(update={'whole': True})")
    assert declarations([file]).of("loss")["reader"].needs.keys() == {"one"}


def test_what_a_loss_needs_is_unknown_where_a_parameter_has_no_default(site, tmp_path):
    file = write_reader(tmp_path)
    file.write_text(file.read_text().replace("whole: bool = False", "whole: bool"))
    assert declarations([file]).of("loss")["reader"].needs == {}


def test_needs_that_fail_are_an_error_of_one_line(site, tmp_path):
    file = write_reader(tmp_path, needs="params.wide")
    with pytest.raises(
        PluginError, match=r"'needs' of the loss 'reader' failed; AttributeError: .* \(reader.py:\d+\)$"
    ):
        declarations([file])


@pytest.mark.parametrize("deviations", ['"a sentence"', '("",)', "[1]"])
def test_deviations_are_a_tuple_of_sentences(site, tmp_path, deviations):
    with pytest.raises(PluginError, match="'deviations' that are no sentences; give it a tuple of strings"):
        declarations([write_reader(tmp_path, deviations)])


def test_the_other_kinds_are_declared(site):
    site.install("zoo-good", good="good")

    declared = declarations()

    assert declared.of("aligner")["by_hand"].doc == "Pairs nothing."
    assert declared.of("fusion")["mean"].params["required"] == ["layer"]
    assert declared.of("model_adapter").keys() == {"toy", "toy_moe"}
    assert declared.of("model_adapter")["toy"].params["properties"] == {}


def test_the_second_time_nothing_is_imported(site):
    site.install("zoo-good", good="good")
    first = declarations([FIXTURES / "other.py"])
    forget("good", *[name for name in sys.modules if name.startswith("kdzoo_loose_other")])

    assert declarations([FIXTURES / "other.py"]) == first
    assert "good" not in sys.modules
    assert not any(name.startswith("kdzoo_loose_other") for name in sys.modules)


def test_only_a_changed_plugin_is_imported(site):
    site.install("zoo-good", good="good")
    site.install("zoo-other", other="other")
    declarations()
    forget("good", "other")
    code = (site.folder / "other.py").read_text()
    (site.folder / "other.py").write_text(code.replace("s - t", "2 (s - t)"))

    assert declarations().of("loss")["other"].formula == "2 (s - t)"
    assert "good" not in sys.modules
    assert len(list((cache_dir() / "declarations").iterdir())) == 2, "overwritten, not piled up"


def test_a_new_version_of_the_distribution_is_imported(site):
    site.install("zoo-good", good="good")
    declarations()
    forget("good")
    (site.folder / "zoo_good-1.0.dist-info").rename(site.folder / "zoo_good-1.1.dist-info")
    metadata = site.folder / "zoo_good-1.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))

    declarations()

    assert "good" in sys.modules


def test_a_plugin_in_a_package_follows_the_whole_package(site):
    package = site.folder / "bundle"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the package is imported only with its plugin')")
    (package / "plugin.py").write_text((FIXTURES / "other.py").read_text())
    site.install("zoo-bundle", bundle="bundle.plugin")
    with pytest.raises(PluginError, match="only with its plugin"):
        declarations()
    (package / "__init__.py").write_text("")
    declarations()
    forget("bundle", "bundle.plugin")

    declarations()
    assert "bundle" not in sys.modules
    (package / "__init__.py").write_text("# changed")
    declarations()
    assert "bundle" in sys.modules


@pytest.mark.parametrize("content", ["", "[]", '{"fingerprint": 1}', "{"])
def test_a_damaged_cache_is_made_anew(site, content):
    site.install("zoo-good", good="good")
    first = declarations()
    for file in (cache_dir() / "declarations").iterdir():
        file.write_text(content)

    assert declarations() == first


def test_a_cache_that_cannot_be_written_is_no_fault(site, tmp_path, monkeypatch):
    site.install("zoo-good", good="good")
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "a_file"))

    assert declarations().of("loss").keys() == {"shift"}


def test_cached_plugins_that_clash_are_refused(site):
    site.install("zoo-good", good="good")
    declarations()
    site.install("zoo-twin", same_loss="same_loss")

    for _ in range(2):
        with pytest.raises(PluginError, match=r"^loss 'shift': registered by plugin 'good'"):
            declarations()


def test_a_broken_plugin_is_an_error_each_time(site):
    site.install("zoo-broken", misspelt_hook="misspelt_hook")

    for _ in range(2):
        with pytest.raises(PluginError, match="'register_plugin' is no hook, did you mean"):
            declarations()
