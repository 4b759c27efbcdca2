"""Plugins, imported and asked for what they offer. Every fault is one line: the plugin and the cause."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pluggy

from kdzoo.api import hooks
from kdzoo.api.loss import Loss
from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.api.plugin import Plugin
from kdzoo.api.token_weights import TokenWeights
from kdzoo.errors import PluginError, did_you_mean
from kdzoo.plugin.discovery import PluginSource, find_plugins, refuse_clashes
from kdzoo.plugin.kinds import KINDS

P = TypeVar("P", bound=Plugin)


class Registered(NamedTuple):
    """One class that a plugin module registered, under one of its names: a model adapter has several."""

    kind: str
    name: str
    thing: type[Plugin]
    plugin: PluginSource


@dataclass(frozen=True)
class Registry:
    """What all plugins together offer."""

    things: Mapping[tuple[str, str], type[Plugin]]
    """(kind, name) -> class."""
    model_adapters: Mapping[str, ModelAdapter]
    """`model_type` -> the adapter that covers the family: one instance for all its families."""
    providers: Mapping[tuple[str, str], PluginSource]
    """(kind, name) -> the plugin that registered it."""
    hook: pluggy.HookRelay
    """For `hook.step_logged(step=..., metrics=..., stage=..., folder=...)`."""

    def of(self, kind: type[P]) -> dict[str, type[P]]:
        """The classes of a kind, by name."""
        return {name: thing for (_, name), thing in self.things.items() if issubclass(thing, kind)}


def load_plugins(loose: Sequence[Path] = ()) -> Registry:
    """Import every installed plugin and every loose file. Raises `PluginError` at the first fault."""
    hook, registered = collect(find_plugins(loose))
    refuse_clashes((entry.kind, entry.name, entry.plugin) for entry in registered)
    things = {(entry.kind, entry.name): entry.thing for entry in registered}
    adapters = {thing: thing() for thing in things.values() if issubclass(thing, ModelAdapter)}
    return Registry(
        things,
        {name: adapters[thing] for (_, name), thing in things.items() if issubclass(thing, ModelAdapter)},
        {(entry.kind, entry.name): entry.plugin for entry in registered},
        hook,
    )


def checked_classes(name_or_file: str, loose: Sequence[Path] = ()) -> list[type[Loss] | type[TokenWeights]]:
    """The loss or token weights of a name, or all of a plugin's file, installed or not. Neither is a `PluginError`."""
    file = Path(name_or_file)
    installed = {plugin.file for plugin in find_plugins()}
    registry = load_plugins([*loose, file] if file.suffix == ".py" and file.resolve() not in installed else loose)
    known: dict[str, type[Loss] | type[TokenWeights]] = {**registry.of(TokenWeights), **registry.of(Loss)}
    if name_or_file in known:
        return [known[name_or_file]]
    providers = {name: registry.providers[thing.kind, name].file for name, thing in known.items()}
    found = [thing for name, thing in known.items() if providers[name] == file.resolve()]
    if not found:
        why = "registers no loss" if file.is_file() else f"no such loss{did_you_mean(name_or_file, known)}"
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
    for plugin, module in modules.items():
        others = [other for other in modules.values() if other is not module]
        ask_one = manager.subset_hook_caller("register_plugins", others)
        _call_guarded(ask_one, plugin, _registrar(plugin, registered))
    order = list(KINDS)
    return manager.hook, sorted(registered, key=lambda entry: order.index(entry.kind))


def _registrar(plugin: PluginSource, registered: list[Registered]) -> Callable[[Any], None]:
    """The `register` that a hook of this plugin is called with."""

    def register(thing: Any) -> None:
        if fault := _fault(thing):
            raise PluginError(f"{plugin}: {fault}")
        registered.extend(Registered(thing.kind, name, thing, plugin) for name in thing.names())

    return register


def _import(plugin: PluginSource) -> object:
    try:
        return plugin.load()
    except Exception as error:
        raise PluginError(f"{plugin}: cannot be imported; {cause(error, plugin)}") from error


def _call_guarded(hook: pluggy.HookCaller, plugin: PluginSource, register: Callable[[Any], None]) -> None:
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


def _fault(thing: Any) -> str | None:
    """Why a registered thing is no class of a kind in good order."""
    is_class = inspect.isclass(thing)
    if not (is_class and issubclass(thing, tuple(KINDS.values()))):
        shown = f"'{thing.__name__}'" if is_class else f"a '{type(thing).__name__}' object"
        bases = ", ".join(f"kdzoo.{kind.__name__}" for kind in KINDS.values())
        return f"'register_plugins' got {shown}; it takes subclasses of {bases}"
    who = f"{thing.kind.replace('_', ' ')} class '{thing.__name__}'"
    if fault := thing.declared_fault():
        return f"{who} {fault}"
    if missing := sorted(thing.__abstractmethods__):
        return f"{who} does not implement {_quoted(missing)}"
    return None


def cause(error: Exception, plugin: PluginSource) -> str:
    """An exception as one line, with the line of the plugin's own file that it passed last."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == plugin.file]
    place = f" ({plugin.file.name}:{lines[-1]})" if plugin.file and lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def _quoted(words: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(repr, words))
