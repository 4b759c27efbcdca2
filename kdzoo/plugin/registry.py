"""Plugins, imported and asked for what they offer. Every fault is one line: the plugin and the cause."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pluggy

from kdzoo.errors import PluginError, did_you_mean
from kdzoo.plugin import hooks
from kdzoo.plugin.contracts import Aligner, Anatomy, Fusion, FusionParams, Loss, Params, Tracker
from kdzoo.plugin.discovery import Kind, PluginSource, find_plugins, refuse_clashes


class Contract(NamedTuple):
    """What a hook registers, and the texts that such a class must carry."""

    hook: str
    base: type
    texts: tuple[str, ...]


CONTRACTS: Mapping[Kind, Contract] = {
    "loss": Contract("register_losses", Loss, ("name", "paper", "formula")),
    "aligner": Contract("register_aligners", Aligner, ("name",)),
    "fusion": Contract("register_fusions", Fusion, ("name",)),
    "anatomy": Contract("register_anatomies", Anatomy, ()),
    "tracker": Contract("register_trackers", Tracker, ("name",)),
}


class Registered(NamedTuple):
    """One thing that a plugin registered. An anatomy has an entry for every family that it covers."""

    kind: Kind
    name: str
    thing: type
    plugin: PluginSource


@dataclass(frozen=True)
class Registry:
    """What all plugins together offer, by name; anatomies by `model_type`."""

    losses: dict[str, type[Loss]]
    aligners: dict[str, type[Aligner]]
    fusions: dict[str, type[Fusion]]
    anatomies: dict[str, Anatomy]
    providers: dict[tuple[Kind, str], PluginSource]
    """Which plugin registered what."""
    trackers: dict[str, type[Tracker]]
    hook: pluggy.HookRelay
    """For `hook.step_logged(step=..., metrics=..., stage=..., folder=...)`."""


def load_plugins(loose: Sequence[Path] = ()) -> Registry:
    """Import every installed plugin and every loose file. Raises `PluginError` at the first fault."""
    hook, registered = collect(find_plugins(loose))
    refuse_clashes((entry.kind, entry.name, entry.plugin) for entry in registered)

    def of(kind: Kind) -> dict[str, Any]:
        return {entry.name: entry.thing for entry in registered if entry.kind == kind}

    anatomies = {thing: thing() for thing in of("anatomy").values()}
    return Registry(
        losses=of("loss"),
        aligners=of("aligner"),
        fusions=of("fusion"),
        anatomies={family: anatomies[thing] for family, thing in of("anatomy").items()},
        providers={(entry.kind, entry.name): entry.plugin for entry in registered},
        trackers=of("tracker"),
        hook=hook,
    )


def losses_called(name_or_file: str, loose: Sequence[Path] = ()) -> list[type[Loss]]:
    """The loss of a name, or every loss of a plugin's file, installed or not. Neither is a `PluginError`."""
    file = Path(name_or_file)
    installed = {plugin.file for plugin in find_plugins()}
    registry = load_plugins([*loose, file] if file.suffix == ".py" and file.resolve() not in installed else loose)
    if name_or_file in registry.losses:
        return [registry.losses[name_or_file]]
    providers = {name: registry.providers["loss", name].file for name in registry.losses}
    found = [loss for name, loss in registry.losses.items() if providers[name] == file.resolve()]
    if not found:
        why = "registers no loss" if file.is_file() else f"no such loss{did_you_mean(name_or_file, registry.losses)}"
        raise PluginError(f"{name_or_file}: {why}; give a loss of 'kdzoo list', or a plugin's file")
    return found


def collect(plugins: Sequence[PluginSource]) -> tuple[pluggy.HookRelay, list[Registered]]:
    """Import these plugins and let each register; clashes between them are not looked at."""
    manager = pluggy.PluginManager("kdzoo")
    modules = {plugin: _import(plugin) for plugin in plugins}
    for plugin, module in modules.items():
        if twin := manager.get_name(module):
            raise PluginError(f"{plugin}: is the same module as plugin '{twin}'; remove one entry point")
        manager.register(module, plugin.name)
        _check_implementations(plugin, manager.get_hookcallers(module) or [])
    # The specifications come last, so that the check above, whose messages say more, is the first to look.
    manager.add_hookspecs(hooks)
    manager.check_pending()

    registered: list[Registered] = []
    for kind, contract in CONTRACTS.items():
        for plugin, module in modules.items():
            ask_one = manager.subset_hook_caller(
                contract.hook, [other for other in modules.values() if other is not module]
            )
            _call_guarded(ask_one, plugin, _registrar(kind, plugin, registered))
    return manager.hook, registered


def _registrar(kind: Kind, plugin: PluginSource, registered: list[Registered]) -> Callable[[type], None]:
    """The `register` that a hook of this plugin is called with."""

    def register(thing: Any) -> None:
        if fault := _fault(kind, thing):
            raise PluginError(f"{plugin}: {fault}")
        names = thing.families if issubclass(thing, Anatomy) else (thing.name,)
        registered.extend(Registered(kind, name, thing, plugin) for name in names)

    return register


def _import(plugin: PluginSource) -> object:
    try:
        return plugin.load()
    except Exception as error:
        raise PluginError(f"{plugin}: cannot be imported; {cause(error, plugin)}") from error


def _call_guarded(hook: pluggy.HookCaller, plugin: PluginSource, register: Callable[[type], None]) -> None:
    try:
        hook(register=register)
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(f"{plugin}: '{hook.name}' failed; {cause(error, plugin)}") from error


def _check_implementations(plugin: PluginSource, callers: Sequence[pluggy.HookCaller]) -> None:
    """Every marked function is a hook, with arguments that the hook has."""
    specs = {
        name: list(inspect.signature(spec).parameters) for name, spec in vars(hooks).items() if inspect.isfunction(spec)
    }
    if not callers:
        raise PluginError(f"{plugin}: implements no hook; mark one with '@kdzoo.hookimpl', of {_quoted(specs)}")
    implementations = chain.from_iterable(caller.get_hookimpls() for caller in callers)
    for implementation in (one for one in implementations if one.plugin_name == plugin.name):
        name = implementation.opts["specname"] or implementation.function.__name__
        if name not in specs:
            hint = did_you_mean(name, specs) or f"; hooks are {_quoted(specs)}"
            raise PluginError(f"{plugin}: '{name}' is no hook{hint}")
        for argument in implementation.argnames:
            if argument not in specs[name]:
                raise PluginError(
                    f"{plugin}: hook '{name}' has no argument '{argument}'; it has {_quoted(specs[name])}"
                )


def _fault(kind: Kind, thing: Any) -> str | None:
    """Why a registered thing is not a concrete subclass of its contract with the texts that users see."""
    hook, base, texts = CONTRACTS[kind]
    if not _inherits(thing, base):
        shown = f"'{thing.__name__}'" if inspect.isclass(thing) else f"a '{type(thing).__name__}' object"
        return f"'{hook}' got {shown}; it takes subclasses of kdzoo.{base.__name__}"
    who = f"{kind} class '{thing.__name__}'"
    for text in texts:
        if not _is_text(getattr(thing, text, None)):
            return f"{who} has no '{text}'; give it a line of text"
    if kind == "loss" and not _are_texts(thing.deviations):
        return f"{who} has 'deviations' that are no sentences; give it a tuple of strings"
    if kind == "anatomy":
        families = getattr(thing, "families", ())
        if not (families and _are_texts(families)):
            return f"{who} has no 'families'; give it a tuple of strings"
    elif not re.fullmatch(r"[a-z][a-z0-9_]*", thing.name):
        return f"{who} is named '{thing.name}'; use lower-case letters, digits and '_'"
    elif not _inherits(thing.Params, wanted := FusionParams if kind == "fusion" else Params):
        return f"{who} has 'Params' that do not inherit kdzoo.{wanted.__name__}"
    if missing := sorted(getattr(thing, "__abstractmethods__", ())):
        return f"{who} does not implement {_quoted(missing)}"
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_text, value))


def _inherits(thing: Any, base: type) -> bool:
    return inspect.isclass(thing) and issubclass(thing, base)


def cause(error: Exception, plugin: PluginSource) -> str:
    """An exception as one line, with the line of the plugin's own file that it passed last."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == plugin.file]
    place = f" ({plugin.file.name}:{lines[-1]})" if plugin.file and lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def _quoted(words: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(repr, words))
