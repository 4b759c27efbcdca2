"""What plugins declare, without importing them: known from the cache as long as their code is the same.

A file in `cache_dir()/"declarations"` holds what one plugin declared, beside a hash of what it follows from.
Only a plugin without a valid one is imported, and torch with it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdzoo.cache import cache_dir, content_key
from kdzoo.errors import PluginError
from kdzoo.plugin.discovery import PluginSource, find_plugins, refuse_clashes

if TYPE_CHECKING:
    from kdzoo.api.loss import Loss
    from kdzoo.api.plugin import Params, Plugin


@dataclass(frozen=True)
class Declared:
    """One plugin: a loss, an aligner, ..., or one model family of a model adapter."""

    kind: str
    name: str
    plugin: str
    doc: str
    paper: str
    formula: str
    params: dict[str, Any]
    """The JSON Schema of its parameters; names in its `$defs` start with `<kind>.<name>.`."""
    deviations: list[str] = field(default_factory=list)
    """Of a loss: where it differs from its authors' code."""
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of a loss whose parameters all have defaults, what it reads with these: with "one" tokenizer and with "two",
    where it takes two."""
    couples: list[list[Any]] = field(default_factory=list)
    """Of a loss: parameters [name, value] that alone let a sample's loss depend on its neighbours."""


@dataclass(frozen=True)
class Declarations:
    """What all plugins declare."""

    by_kind: dict[str, dict[str, Declared]]
    """Kind -> name -> what it declares; model adapters by `model_type`. Kinds in the order of `kinds.KINDS`."""

    def of(self, kind: str) -> dict[str, Declared]:
        """Those of a kind, by name."""
        return self.by_kind.get(kind, {})


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
    by_kind: dict[str, dict[str, Declared]] = {}
    for entry, _ in everything:
        by_kind.setdefault(entry.kind, {})[entry.name] = entry
    return Declarations(by_kind)


def _imported(plugins: Sequence[PluginSource]) -> list[list[Declared]]:
    """What these plugins declare, by importing them."""
    if not plugins:
        return []
    from kdzoo.plugin.registry import collect

    _, registered = collect(plugins)
    return [[_declare(*entry[:3], plugin) for entry in registered if entry.plugin == plugin] for plugin in plugins]


def _declare(kind: str, name: str, thing: type[Plugin], plugin: PluginSource) -> Declared:
    from inspect import cleandoc

    from kdzoo.api.loss import Loss
    from kdzoo.api.token_weights import TokenWeights
    from kdzoo.plugin.json_schema import json_schema
    from kdzoo.plugin.registry import cause

    declared = Declared(
        kind, name, plugin.name, cleandoc(thing.__doc__ or ""), "", "", json_schema(thing.Params, f"{kind}.{name}.")
    )
    if issubclass(thing, TokenWeights):
        return replace(declared, paper=thing.paper, formula=thing.formula, deviations=[*thing.deviations])
    if not issubclass(thing, Loss):
        return declared
    try:
        needs, couples = _needs(thing), [[*pair] for pair in _couples(thing, declared.params)]
    except Exception as error:
        raise PluginError(f"{plugin}: 'needs' of the loss '{name}' failed; {cause(error, plugin)}") from error
    return replace(
        declared,
        paper=thing.paper,
        formula=thing.formula,
        deviations=[*thing.deviations],
        needs=needs,
        couples=couples,
    )


def _needs(loss: type[Loss]) -> dict[str, dict[str, Any]]:
    if any(parameter.is_required() for parameter in loss.Params.model_fields.values()):
        return {}
    params = loss.Params()
    both = loss.needs(params, False).tokenizers == "any"
    counts = {"one": True} | ({"two": False} if both else {})
    return {count: _plain(loss, params, same_tokens) for count, same_tokens in counts.items()}


def _plain(loss: type[Loss], params: Params, same_tokens: bool) -> dict[str, Any]:
    """What is read, in JSON's types."""
    needs = loss.needs(params, same_tokens)
    seen = list(dict.fromkeys(stream for visit in loss.visits(params) for stream in visit.streams))
    models = ("student", "teacher")
    return {
        "logits": [model for model in models if model in seen],
        "student": sorted(needs.student),
        "teacher": sorted(needs.teacher),
        "streams": [stream for stream in seen if stream not in models],
        "facts": sorted(needs.facts),
        "aligned": needs.aligned,
        "vocabularies": needs.vocabularies,
        "entries": sorted(needs.entries),
        "statistics": loss.reads_statistics(),
        "artifacts": sorted({*needs.artifacts, *(["answers"] if needs.answers else [])}),
    }


def _couples(loss: type[Loss], schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, parameter in schema.get("properties", {}).items():
        for value in _choices(parameter):
            params = _valid(loss, {name: value})
            if params is not None and any(loss.needs(params, same).batch_coupled for same in (True, False)):
                yield name, value


def _choices(parameter: dict[str, Any]) -> list[Any]:
    """The values of a parameter that has few."""
    match parameter:
        case {"const": value}:
            return [value]
        case {"enum": values}:
            return list(values)
        case {"anyOf": branches}:
            return [value for branch in branches for value in _choices(branch)]
        case {"type": "boolean"}:
            return [True, False]
    return []


def _valid(loss: type[Loss], values: dict[str, Any]) -> Params | None:
    from pydantic import ValidationError

    try:
        return loss.Params.model_validate(values)
    except ValidationError:  # it goes with other values only
        return None


def _fingerprint(plugin: PluginSource) -> str:
    """A hash of all that the declarations follow from: the plugin's code, this room's and the contract's, and pydantic.

    Contents, not times: reading a few small files costs less than the doubt about a clock.
    """
    ours = sorted(file for room in ("plugin", "api") for file in Path(__file__).parents[1].joinpath(room).glob("*.py"))
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
