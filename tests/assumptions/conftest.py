"""These tests stand first in the alphabet, and so run first: a new release of a library fails here, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import pytest

Changed = Callable[[str], str]


@pytest.fixture
def changed(request: pytest.FixtureRequest) -> Changed:
    """Of a name: the sentence that says what has changed in which release."""
    module = request.module.PRIVATE

    def text(name: str) -> str:
        library = module.__name__.rpartition(".")[2].removesuffix("_private")
        return (
            f"{library} {version(library)} has changed {name}, which {module.__name__} uses "
            f"(checked with {library} {module.CHECKED})"
        )

    return text
