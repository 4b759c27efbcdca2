"""What plugins declare, without importing them: known from the cache as long as their code is the same.

A file in `cache_dir()/"declarations"` holds what one plugin declared, beside a hash of what it follows from.
Only a plugin without a valid one is imported, and torch with it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdzoo.cache import cache_dir, content_key
from kdzoo.plugin.discovery import Kind, PluginSource, find_plugins, refuse_clashes


@dataclass(frozen=True)
class Declared:
    """One loss, aligner or fusion, or one model family of an anatomy."""

    kind: Kind
    name: str
    plugin: str
    doc: str
    paper: str
    formula: str
    params: dict[str, Any]
    """The JSON Schema of its parameters; names in its `$defs` start with `<kind>.<name>.`."""


@dataclass(frozen=True)
class Declarations:
    """What all plugins declare, by name; anatomies by `model_type`."""

    losses: dict[str, Declared]
    aligners: dict[str, Declared]
    fusions: dict[str, Declared]
    anatomies: dict[str, Declared]


def declarations(loose: Sequence[Path] = ()) -> Declarations:
    """Of every installed plugin and every loose file. Raises `PluginError` as loading them does."""
    plugins = find_plugins(loose)
    declared = {plugin: _cached(plugin) for plugin in plugins}
    fresh = [plugin for plugin in plugins if declared[plugin] is None]
    for plugin, entries in zip(fresh, _imported(fresh), strict=True):
        declared[plugin] = entries
        _store(plugin, entries)
    everything = [(entry, plugin) for plugin in plugins for entry in declared[plugin] or []]
    refuse_clashes((entry.kind, entry.name, plugin) for entry, plugin in everything)

    def of(kind: Kind) -> dict[str, Declared]:
        return {entry.name: entry for entry, _ in everything if entry.kind == kind}

    return Declarations(of("loss"), of("aligner"), of("fusion"), of("anatomy"))


def _imported(plugins: Sequence[PluginSource]) -> list[list[Declared]]:
    """What these plugins declare, by importing them."""
    if not plugins:
        return []
    from kdzoo.plugin.registry import collect

    _, registered = collect(plugins)
    return [[_declare(*entry[:3], plugin) for entry in registered if entry.plugin == plugin] for plugin in plugins]


def _declare(kind: Kind, name: str, thing: Any, plugin: PluginSource) -> Declared:
    from inspect import cleandoc

    from kdzoo.plugin.json_schema import json_schema

    return Declared(
        kind,
        name,
        plugin.name,
        doc=cleandoc(thing.__doc__ or ""),
        paper=thing.paper if kind == "loss" else "",
        formula=thing.formula if kind == "loss" else "",
        params={} if kind == "anatomy" else json_schema(thing.Params, f"{kind}.{name}."),
    )


def _fingerprint(plugin: PluginSource) -> str:
    """A hash of all that the declarations follow from: the plugin's code, this room's code, and pydantic.

    Contents, not times: reading a few small files costs less than the doubt about a clock.
    """
    ours = sorted(Path(__file__).parent.glob("*.py"))
    digests = [sha256(file.read_bytes()).hexdigest() for file in [*plugin.code(), *ours]]
    return content_key([plugin.name, plugin.distribution, digests, version("pydantic")])


def _cache_file(plugin: PluginSource) -> Path:
    """One per place on disk, overwritten when the code changes: an author's edits do not pile up."""
    return cache_dir() / "declarations" / f"{content_key([plugin.name, str(plugin.file)])}.json"


def _cached(plugin: PluginSource) -> list[Declared] | None:
    if plugin.file is None:  # its import fails and says why
        return None
    try:
        stored = json.loads(_cache_file(plugin).read_text(encoding="utf-8"))
        if stored["fingerprint"] == _fingerprint(plugin):
            return [Declared(**entry) for entry in stored["declared"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or one that another version or a full disk left behind
    return None


def _store(plugin: PluginSource, entries: Sequence[Declared]) -> None:
    """Written whole or not at all; a cache that cannot be written is no fault, only slower."""
    content = {"fingerprint": _fingerprint(plugin), "declared": [asdict(entry) for entry in entries]}
    target = _cache_file(plugin)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as part:
            json.dump(content, part, ensure_ascii=False)
        Path(part.name).replace(target)
    except OSError:
        pass
