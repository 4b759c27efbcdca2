"""Which plugins there are: entry points of the group "kdzoo", sorted, and loose files. No import yet."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from kdzoo.errors import PluginError


@dataclass(frozen=True)
class PluginSource:
    """Where a plugin comes from: an entry point of an installed distribution, or a loose file."""

    name: str
    """The name of the entry point, or the loose file's path as it was given."""
    entry: EntryPoint | None
    file: Path | None
    """The file of its module; None where there is no such module: `load` fails then."""

    @property
    def distribution(self) -> str:
        """The name and version of the distribution; empty for a loose file."""
        if self.entry is None:
            return ""
        assert self.entry.dist is not None
        return f"{self.entry.dist.name} {self.entry.dist.version}"

    def __str__(self) -> str:
        return f"plugin '{self.name}'" + (f" ({self.distribution})" if self.entry else "")

    def load(self) -> object:
        """The plugin, imported. Whatever its import raises comes through."""
        if self.entry is not None:
            return self.entry.load()
        assert self.file is not None
        return _import_file(self.file)

    def code(self) -> list[Path]:
        """What its declarations may follow from: the module, or all of the package that it stands in."""
        if self.file is None:
            return []
        if self.entry is None or ("." not in self.entry.module and self.file.name != "__init__.py"):
            return [self.file]
        package = self.file.parents[self.entry.module.count(".") - (self.file.name != "__init__.py")]
        return sorted(package.rglob("*.py"))


def find_plugins(loose: Sequence[Path] = ()) -> list[PluginSource]:
    """Every plugin, always in the same order. Two entry points of one name are refused."""
    plugins: dict[str, PluginSource] = {}
    for entry in sorted(entry_points(group="kdzoo"), key=_distribution_and_name):
        plugin = PluginSource(entry.name, entry, _module_file(entry.module))
        if other := plugins.get(plugin.name):
            raise PluginError(
                f"plugin '{plugin.name}': installed twice, by '{other.distribution}' and by "
                f"'{plugin.distribution}'; uninstall one of them"
            )
        plugins[plugin.name] = plugin
    files: dict[Path, PluginSource] = {}
    for path in loose:
        if not path.is_file():
            raise PluginError(f"plugin '{path}': no such file; give the path of a Python file")
        files.setdefault(path.resolve(), PluginSource(str(path), None, path.resolve()))
    return [*plugins.values(), *files.values()]


def refuse_clashes(names: Iterable[tuple[str, str, PluginSource]]) -> None:
    """Two plugins, or one plugin twice, may not register two things of one kind under one name."""
    seen: dict[tuple[str, str], PluginSource] = {}
    for kind, name, plugin in names:
        if other := seen.get((kind, name)):
            both = f"by {other} and by {plugin}" if other != plugin else f"twice by {plugin}"
            raise PluginError(f"{kind.replace('_', ' ')} '{name}': registered {both}; rename or remove one of them")
        seen[kind, name] = plugin


def _distribution_and_name(entry: EntryPoint) -> tuple[str, str]:
    assert entry.dist is not None
    return entry.dist.name, entry.name


def _module_file(module: str) -> Path | None:
    """The file of a module. Unlike `find_spec` alone, it does not import the packages around it."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)
    name = first
    for part in rest:
        if spec is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _import_file(path: Path) -> ModuleType:
    """A loose file as a module of its own, named by path and content: the same text is imported once."""
    digest = sha256(bytes(path) + path.read_bytes()).hexdigest()[:12]
    name = f"kdzoo_loose_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file (its name does not end in '.py')")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pydantic look their own module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
