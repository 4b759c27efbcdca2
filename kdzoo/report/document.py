"""What a report is made of, whatever it is printed on. Text in `backticks` is a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Heading:
    level: int
    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Paragraph:
    text: str
    kind: str = "paragraph"


@dataclass(frozen=True)
class Bullets:
    items: list[str]
    kind: str = "bullets"


@dataclass(frozen=True)
class Table:
    """The first column names the row; the others are numbers."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    name: str
    """The file's, without its ending."""
    caption: str
    draw: Callable[[], bytes]
    """Makes the PNG: a page of Markdown alone needs no pictures."""
    width: int
    """In pixels of the page."""
    kind: str = "figure"


Block = Heading | Paragraph | Bullets | Table | Figure


@dataclass(frozen=True)
class Document:
    title: str
    made_from: list[str]
    """The suites' files of the ledger."""
    blocks: list[Block]
