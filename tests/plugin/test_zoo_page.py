"""docs/zoo.md is what the plugins declare, and its Markdown says no more than that."""

from __future__ import annotations

import re
from pathlib import Path

from kdzoo.cli import main
from kdzoo.plugin.declarations import Declarations, Declared, declarations
from kdzoo.plugin.markdown import page

COMMITTED = Path(__file__).parents[2] / "docs" / "zoo.md"

READS = {
    "logits": ["student"],
    "student": ["hidden.last"],
    "teacher": ["hidden.last"],
    "streams": ["t2s"],
    "facts": [],
    "aligned": False,
    "vocabularies": False,
    "entries": [],
    "statistics": False,
    "artifacts": ["projectors"],
}


def declare(name: str, **changes: object) -> Declared:
    mean = {"enum": ["tokens", "batch"], "default": "tokens", "description": "Of *what*."}
    given = {
        "doc": "Moves the student.",
        "paper": "Somebody et al., A Title, with a Comma, ICML 2026, arxiv.org/abs/1234.5678",
        "formula": "|s - t|",
        "params": {"properties": {"mean": mean}},
        "needs": {"one": READS, "two": READS | {"aligned": True}},
    }
    return Declared("loss", name, "zoo", **(given | changes))  # type: ignore[arg-type]


def rendered(*losses: Declared) -> str:
    return page(Declarations({"loss": {loss.name: loss for loss in losses}}))


def test_the_committed_page_is_the_generated_one():
    """Of the plugins that are installed here."""
    assert COMMITTED.read_text(encoding="utf-8") == page(declarations()), "run: kdzoo docs --write docs/zoo.md"


def test_the_table_says_paper_tokenizers_and_reads_and_links_to_the_section():
    row = "| [`shift`](#shift) | [Somebody et al., ICML 2026](https://arxiv.org/abs/1234.5678) | one or two | "
    assert f"\n{row}logits, states, alignment, a stage |\n" in rendered(declare("shift"))
    assert "\n### `shift`\n" in rendered(declare("shift"))


def test_a_paper_without_an_address_stands_as_it_is():
    assert "| folklore; of old, as they say | one or two |" in rendered(
        declare("shift", paper="folklore; of old, as they say")
    )


def test_maps_of_entries_are_read_of_the_vocabularies():
    reads = READS | {"entries": ["nearest_in_student"]}
    shown = rendered(declare("shift", needs={"one": reads, "two": reads}))
    assert "| logits, states, vocabularies, a stage |" in shown
    assert "the map of entries `nearest_in_student`" in shown


def test_a_section_says_what_is_read_and_when():
    text = rendered(declare("shift", couples=[["mean", "batch"], ["mean", "padded"], ["swap", True]]))
    assert "- reads: both models' `hidden.last`; the student's logits\n" in text
    assert "- with two tokenizers also: the aligner's pairs or spans\n" in text
    assert "- sends states of its own through heads: `t2s`\n" in text
    assert "- needs the stage: `projectors`\n" in text
    assert '- couples the samples of a batch with: `mean` `"batch"` or `"padded"`; `swap` `true`\n' in text


def test_a_loss_of_one_tokenizer_says_so():
    assert "- tokenizers: one\n" in rendered(declare("shift", needs={"one": READS}))


def test_text_that_markdown_would_read_is_kept_as_text():
    text = rendered(declare("shift", doc="a * b < `c * d`\nand ~e~.", deviations=["`f` is *g*."]))
    assert "\na \\* b \\< `c * d` and \\~e\\~.\n" in text
    assert "\n- `f` is \\*g\\*.\n" in text
    assert "\n`|s - t|`\n" in text


def test_a_parameter_of_the_same_words_is_explained_once():
    text = rendered(declare("shift"), declare("other"))
    assert '- `mean`: `"tokens"` or `"batch"`, default `"tokens"`\\\n  Of \\*what\\*.\n' in text
    assert text.count("Of \\*what\\*.") == 1
    assert "- `mean`: as of [`shift`](#shift)\n" in text


def test_without_plugins_there_is_a_page():
    assert rendered().startswith("<!--")


def test_it_is_printed_or_written(site, tmp_path, capsys):
    site.install("zoo-good", good="good")
    assert main(["docs"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^##+ (.*)$", printed, flags=re.MULTILINE) == [
        "Losses",
        "`shift`",
        "Aligners",
        "`by_hand`",
        "Fusions",
        "`mean`",
        "Model families",
    ]
    assert main(["docs", "--write", str(tmp_path / "zoo.md")]) == 0
    assert (tmp_path / "zoo.md").read_text() == printed
    assert main(["docs", "--write", str(tmp_path / "no" / "zoo.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_deviations_are_sentences():
    sentences = [sentence for loss in declarations().of("loss").values() for sentence in loss.deviations]
    assert sentences
    assert [sentence for sentence in sentences if not re.fullmatch(r"[A-Z`].*\.", sentence)] == []


def test_a_kind_that_nothing_is_said_of_has_a_section_too():
    declared = Declared("answer_source", "by_doubt", "zoo", "Gives answers.", "", "", {})
    found = page(Declarations({"answer_source": {"by_doubt": declared}}))
    assert "## Answer source plugins" in found and "### `by_doubt`" in found
