"""Errors that the user can fix, each one line: `address: what is wrong; what to do (who set it)`.

An assertion, by contrast, means that kdzoo itself made the mistake.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class KdzooError(Exception):
    """Something the user can fix. Printed as one line, without a traceback; the exit code is 2."""


class RecipeError(KdzooError):
    """A recipe that cannot be read, merged or validated. Its text may hold one line per fault."""


class PluginError(KdzooError):
    """A plugin that cannot be loaded or clashes with another; names the plugin and the cause."""


class DataError(KdzooError):
    """Rows that cannot be read or used."""


class ModelError(KdzooError):
    """A model or tokenizer that cannot be found, built or loaded."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the closest known word, or the empty string where none is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""
