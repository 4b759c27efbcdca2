"""Every number of `results/` is what its stored predictions say: nothing on a page was typed by hand."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kdzoo.cache import content_key
from kdzoo.compare.ledger import Cell, Model, read_ledger
from kdzoo.compare.suite import ABOUT
from kdzoo.data.rows import Row, load_rows
from kdzoo.errors import DataError
from kdzoo.evaluate.rouge import rouge_l
from kdzoo.recipe.model import Source
from kdzoo.report.pages import markdown
from kdzoo.report.write import document_of
from kdzoo.run.inputs import rows_fingerprint

RESULTS = Path(__file__).parents[2] / "results"
MADE_FROM = re.compile(r"^<!-- kdzoo report (.*) -->$", re.MULTILINE)
PAGES = {page: MADE_FROM.search(page.read_text(encoding="utf-8")) for page in sorted(RESULTS.glob("*.md"))}
REPORTS = [page for page, made_from in PAGES.items() if made_from]
SUITES = sorted({RESULTS / name for made_from in PAGES.values() if made_from for name in made_from[1].split()})
PAIRS = {pair: suite for suite in SUITES for pair in read_ledger(suite).pairs}
"""Pair -> a suite that has it."""
NUMBER = re.compile(r"\d+\.\d+")


@pytest.fixture(autouse=True)
def real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of real rows beside the checkout, where $KDZOO_DATA names no other."""
    shared = Path(os.environ.get("KDZOO_SHARED") or RESULTS.parents[1] / "shared") / "data"
    if "KDZOO_DATA" not in os.environ and shared.is_dir():
        monkeypatch.setenv("KDZOO_DATA", str(shared))


@pytest.mark.slow
@pytest.mark.parametrize("page", REPORTS, ids=lambda page: page.name)
def test_a_page_is_what_its_ledger_gives(page):
    """To mend it: `kdzoo report` with the files of its first line, `--title` and `--markdown`."""
    text = page.read_text(encoding="utf-8")
    made_from = PAGES[page]
    title = re.search(r"^# (.*)$", text, re.MULTILINE)
    assert made_from and title
    assert markdown(document_of([RESULTS / name for name in made_from[1].split()], title[1]), "figures") == text


def test_the_figures_of_a_page_are_there():
    for page in REPORTS:
        for figure in re.findall(r"\]\((.*?\.png)\)", page.read_text(encoding="utf-8")):
            assert (RESULTS / figure).is_file()


def test_a_number_that_is_discussed_stands_on_a_page():
    """What the reading of the results quotes is quoted, not remembered."""
    known = {n for page in REPORTS for n in NUMBER.findall(page.read_text(encoding="utf-8"))}
    told = set(NUMBER.findall((RESULTS / "README.md").read_text(encoding="utf-8")))
    assert told
    assert told <= known


def cells() -> Iterator[Cell]:
    seen: set[tuple[str, str, int]] = set()
    for suite in SUITES:
        for pair in read_ledger(suite).pairs.values():
            for by_seed in pair.cells.values():
                for cell in by_seed.values():
                    if (cell.pair, cell.recipe, cell.seed) not in seen:
                        seen.add((cell.pair, cell.recipe, cell.seed))
                        yield cell


def test_a_student_is_kept_with_the_recipe_that_it_is_known_by():
    for cell in cells():
        content = {name: value for name, value in cell.resolved.items() if name not in ABOUT}
        assert content_key({**content, "plugins": []}) == cell.key, f"{cell.pair}/{cell.recipe}-{cell.seed}"
        assert len(cell.environment["commit"]["commit"]) == 40
        assert not cell.environment["commit"]["dirty"]


@cache
def rows_of(source: str, address: str) -> list[Row]:
    return load_rows(Source.model_validate_json(source), address)


def scored_again(cell: Cell, model: Model, start: int = 0, step: int = 1) -> Iterator[tuple[list[float], list[float]]]:
    """Stored and recomputed Rouge-L of the answers `start::step`. The rows are those whose hash is in the ledger."""
    for name, by_decoding in model.answers.items():
        source = Source.model_validate(cell.resolved["evaluation"]["sets"][name])
        try:
            rows = rows_of(source.model_dump_json(), name)
        except DataError as error:
            assert source.lab is None
            pytest.skip(f"no references: {error}")
        assert rows_fingerprint(rows) == cell.environment["data"][f"evaluation.sets.{name}"]
        for answers in by_decoding.values():
            for one in answers:
                assert len(one.rouge_l) == len(one.texts) == len(rows)
                references = [row.references for row in rows[start::step]]
                yield one.rouge_l[start::step], rouge_l(one.texts[start::step], references)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_scores_of_a_student_and_of_the_reference_models_come_from_the_answers(pair):
    found = read_ledger(PAIRS[pair]).pairs[pair]
    first = next(iter(next(iter(found.cells.values())).values()))
    for model in (first.student, *found.reference_models.values()):
        for stored, again in scored_again(first, model):
            assert stored == pytest.approx(again, abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.sweep)], ids=["one in eight", "every one"])
def test_scores_of_every_student_come_from_the_answers(pair, step):
    """Of each student other answers than of the one before, so that all prompts are tried."""
    students = [cell for cell in cells() if cell.pair == pair]
    step = min(step, len(students))
    for number, cell in enumerate(students):
        for stored, again in scored_again(cell, cell.student, number % step, step):
            assert stored == pytest.approx(again, abs=5e-5), f"{cell.recipe}-{cell.seed}"
