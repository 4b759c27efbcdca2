"""The recipes and suites that come with kdzoo, which every command finds by their names from any folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
PLACES = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
"""In an installed package, and in a checkout."""

RECIPES, SUITES = ("", "pairs", "ablations"), ("suites",)
"""The folders of the library that hold recipes, and those that hold suites. A file name stands in one of them only."""


def library() -> Path:
    """The folder of the recipes that come with kdzoo."""
    return next(place for place in PLACES if place.is_dir())


def shelf(folder: str) -> dict[str, Path]:
    """The files in one folder of the library, by their names without the ending."""
    files = sorted((library() / folder).glob("*.json"))
    return {file.stem: file for file in files if not file.name.endswith(".schema.json")}


def recipe_file(name: str, beside: Path = Path()) -> Path | None:
    """The file of a recipe: a path from the folder `beside` if it exists, else a recipe of the library.

    `pairs/lab_llama_to_llama` in the library is also found as `lab_llama_to_llama`. The ending `.json` may be left out.
    """
    return _path(name, beside) or _names(RECIPES).get(name.removesuffix(".json"))


def suite_file(name: str, beside: Path = Path()) -> Path | None:
    """The same of a suite."""
    return _path(name, beside) or _names(SUITES).get(name.removesuffix(".json"))


def close_recipes(path: Path) -> str:
    """What may be meant by a recipe that does not exist, as the end of a message."""
    return _close(path, RECIPES)


def close_suites(path: Path) -> str:
    return _close(path, SUITES)


def _path(name: str, beside: Path) -> Path | None:
    files = (Path(os.path.normpath(beside / f"{name}{ending}")) for ending in ("", ".json"))
    return next((file for file in files if file.is_file()), None)


def _names(folders: tuple[str, ...]) -> Mapping[str, Path]:
    """Every name under which a file of the library is found."""
    files = [(folder, stem, file) for folder in folders for stem, file in shelf(folder).items()]
    return {name: file for folder, stem, file in files for name in (stem, f"{folder}/{stem}" if folder else stem)}


def _close(path: Path, folders: tuple[str, ...]) -> str:
    nearby = {file.stem: str(file) for file in sorted(path.parent.glob("*.json"))}
    for known in (nearby, {stem: stem for folder in folders for stem in shelf(folder)}):
        if close := get_close_matches(path.stem, known, n=2, cutoff=0.6):
            return f", did you mean {' or '.join(repr(known[stem]) for stem in close)}?"
    return "; 'kdzoo list --recipes' shows the names"
