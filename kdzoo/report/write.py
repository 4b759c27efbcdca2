"""From the files of a ledger to the pages of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdzoo.compare.ledger import read_ledger
from kdzoo.report.document import Bullets, Document, Heading
from kdzoo.report.published import read_published


@dataclass(frozen=True)
class Places:
    """Where a report goes."""

    markdown: Path
    html: Path
    figures: Path

    @classmethod
    def beside(cls, suite: Path) -> Places:
        """The ledger's file of a suite: the pages have its name."""
        return cls(suite.with_suffix(".md"), suite.with_suffix(".html"), suite.parent / "figures")


def document_of(suites: Sequence[Path], title: str | None = None) -> Document:
    """The report of one or more suites of ledgers, in their order. Always the same for the same ledger."""
    ledgers = [read_ledger(suite) for suite in suites]
    # A ledger that is not there is refused before these, which import SciPy and Matplotlib.
    from kdzoo.report.compose import compose
    from kdzoo.report.findings import find

    published = read_published()
    findings = [find(ledger, published) for ledger in ledgers]
    return compose(title or findings[0].suite.title, [suite.name for suite in suites], findings, published)


def write_report(suites: Sequence[Path], places: Places, title: str | None = None) -> Document:
    document = document_of(suites, title)
    from kdzoo.report import pages

    pages.write(document, places.markdown, places.html, places.figures)
    return document


def spoken(document: Document) -> str:
    """The sentences under their headings, for a terminal."""
    lines: list[str] = []
    above: list[Heading] = []
    for block in document.blocks:
        if isinstance(block, Heading):
            above = [*(heading for heading in above if heading.level < block.level), block]
        elif isinstance(block, Bullets):
            lines += ["", *(_plain(heading.text) for heading in above), *(f"  {_plain(item)}" for item in block.items)]
            above = []
    return "\n".join(lines[1:])


def _plain(text: str) -> str:
    return text.replace("`", "")
