"""A recipe from its files and flags: read, merged, validated with what the plugins declare, typed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kdzoo.errors import RecipeError
from kdzoo.plugin.declarations import declarations
from kdzoo.recipe.library import close_recipes, recipe_file
from kdzoo.recipe.merge import Layer, Merged, in_text, leaves, merge
from kdzoo.recipe.model import Recipe
from kdzoo.recipe.schema import Schema, recipe_schema
from kdzoo.recipe.validate import fault, faults


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe."""

    recipe: Recipe
    resolved: dict[str, Any]
    """All files and flags merged, as plain JSON, without defaults."""
    provenance: dict[str, str]
    """Which file or flag set each leaf, by address (`losses.kd.weight`)."""
    path: Path
    plugin_files: tuple[Path, ...]
    """Loose plugins: those given and those that the recipe names."""


def load_recipe(
    path: Path,
    on: Sequence[Path] = (),
    sets: Sequence[str] = (),
    loose: Sequence[Path] = (),
    over: Sequence[Layer] = (),
    schema_of: Callable[[tuple[Path, ...]], Schema] | None = None,
) -> LoadedRecipe:
    """The recipe at `path`, or of that name, with the recipes `on`, the patches `over` and then the `key.path=value` of
    `sets` merged over it. Whoever loads many brings a `whole_schema` that remembers as `schema_of`.

    Raises `RecipeError` with one line per fault; `PluginError` where a plugin cannot be loaded.
    """
    path = existing_recipe(path)
    layers = [*_layers(path)]
    for pair in on:
        layers += _layers(existing_recipe(pair))
    layers += over
    layers += [flag(text) for text in sets]
    merged = merge(layers)
    plugin_files = (*loose, *_recipe_plugins(merged))
    schema = (schema_of or whole_schema)(plugin_files)
    if lines := faults(merged, schema):
        raise RecipeError("\n".join(lines))
    return LoadedRecipe(
        recipe=Recipe.model_validate(merged.document),
        resolved=merged.document,
        provenance={in_text(at): merged.origins[at].label for at, _ in leaves(merged.document)},
        path=path,
        plugin_files=plugin_files,
    )


def whole_schema(plugin_files: tuple[Path, ...]) -> Schema:
    """What a merged recipe has to be, with these loose plugins."""
    return recipe_schema(declarations(plugin_files), whole=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. A key that stands twice is an error, as are NaN and Infinity."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        content = _parse(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg.lower()}); correct it") from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: not a JSON object; a recipe starts with '{{'")
    return content


def _layers(path: Path, below: tuple[Path, ...] = ()) -> Iterator[Layer]:
    """The recipes that a file extends, in order, and then the file. `below`: the files that led here."""
    if path.resolve() in [file.resolve() for file in below]:
        raise RecipeError(f"{path}: extends itself; {' -> '.join(map(str, [*below, path]))}")
    patch = read_json(path)
    patch.pop("$schema", None)
    extends = patch.pop("extends", [])
    extends = [extends] if isinstance(extends, str) else extends
    if not (isinstance(extends, list) and all(isinstance(parent, str) for parent in extends)):
        raise RecipeError(f"{path}: 'extends' is neither a path nor a list of paths; give one of the two")
    for parent in extends:
        file = recipe_file(parent, path.parent)
        if file is None:
            close = close_recipes(Path(os.path.normpath(path.parent / parent)))
            raise RecipeError(f"{path}: extends '{parent}', which does not exist{close}")
        yield from _layers(file, (*below, path))
    yield Layer(str(path), path.parent, patch)


def flag(text: str) -> Layer:
    """`losses.kd.weight=0.5` as a patch. What is not JSON is a string."""
    address, equals, value = text.partition("=")
    keys = address.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {text}: not a setting; write it as key.path=value")
    try:
        patch = _parse(value)
    except json.JSONDecodeError:
        patch = value
    except ValueError as error:
        raise RecipeError(f"--set {text}: {error}") from error
    for key in reversed(keys):
        patch = {key: patch}
    return Layer(f"--set {text}", Path(), patch)


def _recipe_plugins(merged: Merged) -> list[Path]:
    """The loose plugins that a recipe names, relative to the file that names them."""
    named = merged.document.get("plugins", [])
    if not isinstance(named, list):  # the schema says so
        return []
    origin = merged.origins.get(("plugins",))
    folder = origin.folder if origin else Path()
    files = {place: Path(os.path.normpath(folder / name)) for place, name in enumerate(named) if isinstance(name, str)}
    if lines := [
        fault(merged, ("plugins", place), f"no such file '{file}'")
        for place, file in files.items()
        if not file.is_file()
    ]:
        raise RecipeError("\n".join(lines))
    return list(files.values())


def existing_recipe(path: Path) -> Path:
    """The file of a recipe that a user named. Raises RecipeError."""
    file = recipe_file(str(path))
    if file is None:
        raise RecipeError(f"{path}: no such recipe{close_recipes(path)}")
    return file


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_constant)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{twice}' occurs twice in one object; remove one")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"'{name}' is not a JSON number; write a finite number")
