"""A document as Markdown with figures beside it, and as one HTML file that needs nothing else."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from kdzoo.errors import KdzooError
from kdzoo.report.document import Document, Figure

NAME = re.compile("`([^`]*)`")


def markdown(document: Document, figures: str) -> str:
    """`figures` is the folder of the figures, as seen from the page."""
    return _environment(html=False).get_template("report.md.j2").render(document=document, figures=figures)


def html(document: Document, pictures: Mapping[str, bytes]) -> str:
    """`pictures` are the figures by name, as PNG."""
    return _environment(html=True).get_template("report.html.j2").render(document=document, pictures=pictures)


def write(document: Document, markdown_file: Path, html_file: Path, figures: Path) -> None:
    """Raises KdzooError where a file cannot be written."""
    pictures = {block.name: block.draw() for block in document.blocks if isinstance(block, Figure)}
    try:
        figures.mkdir(parents=True, exist_ok=True)
        for name, png in pictures.items():
            (figures / f"{name}.png").write_bytes(png)
        for file, text in (
            (markdown_file, markdown(document, _seen_from(markdown_file.parent, figures))),
            (html_file, html(document, pictures)),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise KdzooError(f"{error.filename}: cannot be written ({error.strerror}); name another file") from error


def _seen_from(folder: Path, target: Path) -> str:
    return Path(os.path.relpath(target, folder)).as_posix()


def _environment(html: bool) -> Environment:
    environment = Environment(loader=PackageLoader("kdzoo.report"), autoescape=html, keep_trailing_newline=False)
    environment.filters["rich"] = _rich
    environment.filters["plain"] = lambda text: text.replace("`", "")
    environment.filters["base64"] = lambda content: b64encode(content).decode()
    return environment


def _rich(text: str) -> Markup:
    """Names in backticks become code."""
    return Markup(NAME.sub(r"<code>\1</code>", str(escape(text))))
