"""docs/plugins.md shows every method that a plugin author may write, with the signature that the code has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from kdzoo.api.plugin import Plugin
from kdzoo.plugin.kinds import KINDS
from kdzoo.testing.promises import CHECKS, CHECKS_OF_WEIGHTS, RANKS

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
FOR_THE_CORE = {"names", "declared_fault", "visit_methods", "visits", "reads_statistics"}


def methods(kind: type[Plugin]) -> list[str]:
    """What the class itself defines for its subclasses to write."""
    return [
        name
        for name, value in vars(kind).items()
        if inspect.isfunction(getattr(kind, name)) or isinstance(value, classmethod)
        if not name.startswith("_") and name not in FOR_THE_CORE
    ]


def shown(kind: type[Plugin], name: str) -> str:
    signature = inspect.signature(getattr(kind, name))
    plain = signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "self"])
    return f"{name}{plain}".replace("'", "")


CASES = [(kind, name) for kind in KINDS.values() for name in methods(kind)]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind.__name__}.{name}" for kind, name in CASES])
def test_the_page_shows_the_signature(kind, name):
    assert shown(kind, name) in PAGE


def test_the_page_shows_no_signature_that_is_not_there():
    listed = re.findall(r"^(\w+\(.*\) -> .*)$", PAGE, flags=re.MULTILINE)
    assert set(listed) <= {shown(kind, name) for kind, name in CASES}


@pytest.mark.parametrize(
    ("head", "checks"),
    [("| check | what it wants |", CHECKS), ("| check | what it wants of token weights |", CHECKS_OF_WEIGHTS)],
    ids=["losses", "token weights"],
)
def test_the_page_lists_every_check(head, checks):
    names = [check.name for check in checks] + [RANKS[0]]
    table = PAGE[PAGE.index(head) :]
    assert re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], flags=re.MULTILINE) == names
