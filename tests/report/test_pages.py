"""A report as a reader sees it: sentences, Markdown, a page, figures, the command."""

from __future__ import annotations

import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from made_up_ledger import write_ledger
from matplotlib.image import imread

from kdzoo.cli import main
from kdzoo.report.document import Paragraph
from kdzoo.report.findings import Contrast
from kdzoo.report.statistics import Difference, Interval
from kdzoo.report.wording import number, p_value, sentence, signed
from kdzoo.report.write import Places, document_of, spoken, write_report

pytestmark = pytest.mark.slow

BETTER = Contrast(
    "dskd", "sft", Difference(1.2, 3, Interval(0.9, 1.5), Interval(0.4, 2.0), p=0.002, detectable=1.1), p_holm=0.004
)


def test_a_sentence_says_what_the_numbers_say():
    assert sentence(BETTER) == "`dskd` is better than `sft` by 1.20 (interval 0.40 to 2.00, p = 0.004)."
    worse = replace(BETTER, difference=replace(BETTER.difference, estimate=-1.2, over=Interval(-2.0, -0.4)))
    assert sentence(worse) == "`dskd` is worse than `sft` by 1.20 (interval −2.00 to −0.40, p = 0.004)."


def test_a_sentence_says_no_more_than_the_numbers_say():
    assert sentence(replace(BETTER, p_holm=0.06)) == (
        "`dskd` is above `sft` by 1.20 (interval 0.40 to 2.00, p = 0.060), not certain among so many comparisons. "
        "A true difference below 1.10 would often be missed."
    )
    told = replace(BETTER, p_holm=0.4, difference=replace(BETTER.difference, over=Interval(-0.3, 2.7)))
    assert sentence(told) == (
        "`dskd` cannot be told from `sft`: +1.20 (interval −0.30 to 2.70, p = 0.400). "
        "A true difference below 1.10 would often be missed."
    )
    one = Difference(-1.2, 1, Interval(-1.5, -0.9), None, None, None)
    assert sentence(Contrast("dskd", "sft", one, None)) == (
        "`dskd`: 1.20 below `sft` (interval over prompts −1.50 to −0.90); "
        "of one trained student each, others may differ."
    )


def test_numbers_read_well():
    assert [number(-0.001), number(-1.5), signed(0.0), signed(2.0, 1)] == ["0.00", "−1.50", "0.00", "+2.0"]
    assert [p_value(0.0001), p_value(0.25), p_value(None)] == ["< 0.001", "0.250", ""]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Places:
    suite = write_ledger(tmp_path_factory.mktemp("report"))
    write_report([suite], Places.beside(suite))
    return Places.beside(suite)


def test_the_markdown_holds_every_table_and_the_figures_beside_it(report):
    text = report.markdown.read_text()
    assert text.startswith("<!-- kdzoo report two.json -->\n\n# Two methods\n")
    assert "- `residual` is better than `sft` by 5.00 (interval 5.00 to 5.00, p < 0.001).\n" in text
    assert "\n| `residual` | 3 | 28.20 ± 0.10 | 28.20 ± 0.10 | 20.01 |\n" in text
    assert "\n| teacher |  | 40.00 | 40.00 |  |\n" in text
    assert "Left out: `abkd`; each needs one tokenizer." in text
    assert "ICLR 2026" in text
    figures = re.findall(r"\]\((.*?)\)", text)
    assert len(figures) == 4
    for figure in figures:
        assert imread(report.markdown.parent / figure).shape[1] == pytest.approx(883, abs=2)


def test_the_tables_are_tables(report):
    for block in report.markdown.read_text().split("\n\n"):
        lines = block.strip().splitlines()
        if lines and lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1, block


def test_the_page_needs_nothing_else(report):
    page = report.html.read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "<code>residual</code> is better than <code>sft</code> by 5.00" in page


def test_what_a_ledger_says_cannot_become_part_of_the_page(tmp_path):
    suite = write_ledger(tmp_path)
    suite.write_text(suite.read_text().replace("Made up.", "<script>alert(1)</script>"))
    write_report([suite], Places.beside(suite))
    assert "<script>" not in Places.beside(suite).html.read_text()


def test_the_same_ledger_gives_the_same_report(tmp_path, report):
    again = Places.beside(write_ledger(tmp_path))
    write_report([tmp_path / "two.json"], again)
    assert again.markdown.read_text() == report.markdown.read_text()
    assert again.html.read_text() == report.html.read_text()


def test_one_training_seed_is_marked_as_such(tmp_path):
    suite = write_ledger(tmp_path, seeds=(1,))
    write_report([suite], Places.beside(suite))
    text = Places.beside(suite).markdown.read_text()
    assert "One training seed: nothing here says what another one would have given." in text
    assert "of one trained student each, others may differ." in text
    assert "±" not in text.split("## A to B")[1].split("“decoding ±”")[0].replace("decoding ±", "")


def test_a_pair_that_has_not_begun_is_told(tmp_path):
    suite = write_ledger(tmp_path)
    suite.write_text(suite.read_text().replace('"pairs": {', '"pairs": {"later": "C to D",'))
    assert Paragraph("Not run yet: C to D.") in document_of([suite]).blocks


def test_several_suites_make_one_page(tmp_path):
    suite = write_ledger(tmp_path)
    (tmp_path / "again.json").write_text(suite.read_text().replace("Two methods", "Once more"))
    document = document_of([suite, tmp_path / "again.json"], "Both")
    headings = [block.text for block in document.blocks if block.kind == "heading" and block.level == 2]
    assert (document.title, headings) == ("Both", ["Two methods", "Once more"])
    names = [block.name for block in document.blocks if block.kind == "figure"]
    assert len(names) == len(set(names)) == 8


def test_a_terminal_gets_the_sentences_under_their_headings(tmp_path):
    lines = spoken(document_of([write_ledger(tmp_path)])).splitlines()
    assert lines[:3] == [
        "A to B, two tokenizers",
        "Rouge-L, greedy",
        "  residual is better than sft by 5.00 (interval 5.00 to 5.00, p < 0.001).",
    ]


def test_the_command_writes_where_it_is_told_and_says_so(tmp_path, capsys):
    suite = write_ledger(tmp_path)
    places = [tmp_path / "out" / name for name in ("page.md", "page.html", "pictures")]
    options = [str(part) for pair in zip(("--markdown", "--html", "--figures"), places, strict=True) for part in pair]
    assert main(["report", str(suite), *options, "--title", "Mine"]) == 0
    assert f"report: {places[1]}, {places[0]}, {places[2]}/" in capsys.readouterr().out
    assert "# Mine\n" in places[0].read_text()
    assert "](pictures/" in places[0].read_text()


def test_a_file_that_is_no_ledger_gets_one_line(tmp_path, capsys):
    (tmp_path / "no.json").write_text("{}")
    assert main(["report", str(tmp_path / "no.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["report", str(tmp_path / "absent.json")]) == 2
    assert "absent.json: no such file; give" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_gets_one_line(tmp_path, capsys):
    suite = write_ledger(tmp_path)
    (tmp_path / "file").touch()
    assert main(["report", str(suite), "--html", str(tmp_path / "file" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_at_phone_and_desk_width(report, width, scheme, tmp_path):
    """Nothing is wider than the screen but tables in boxes that scroll; every picture is there and fits; it is dark
    where the reader wants it dark; nothing is said in the console."""
    browser_type = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with browser_type.sync_playwright() as playwright:
        browser = launched(playwright)
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(report.html.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        images = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().right])")
        assert len(images) == 4
        assert all(natural > 0 and right <= width for natural, right in images)
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
            ".map(c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
        )
        assert ink > paper + 400 if scheme == "dark" else paper > ink + 400
        for table in page.locator(".scroll").all():
            box = table.bounding_box()
            assert box is not None and box["x"] + box["width"] <= width
        shot = imread(BytesIO(page.screenshot()))
        assert shot.shape[1] == width
        assert shot.std() > 0.05  # not a blank page
        assert said == []
        browser.close()


def launched(playwright):
    """Playwright's own Chromium, or the system's; without either the test is skipped."""
    system = next((p for p in map(Path, ("/usr/bin/chromium", "/usr/bin/google-chrome")) if p.is_file()), None)
    own = Path(playwright.chromium.executable_path)
    if system is None and not own.is_file():
        pytest.skip("no Chromium is installed")
    return playwright.chromium.launch(executable_path=None if own.is_file() else system, args=["--no-sandbox"])
