"""An empty site-packages folder of our own, in which plugins are really installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Site:
    folder: Path

    def install(self, distribution: str, version: str = "1.0", **entries: str) -> None:
        """A distribution with entry points `name = module`; a module of the fixtures comes with it."""
        for module in entries.values():
            if (FIXTURES / f"{module}.py").exists():
                shutil.copy(FIXTURES / f"{module}.py", self.folder)
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = "".join(f"{name} = {module}\n" for name, module in entries.items())
        (info / "entry_points.txt").write_text(f"[kdzoo]\n{lines}")
        importlib.invalidate_caches()

    def entry_points(self, group: str) -> list[importlib.metadata.EntryPoint]:
        """Those of this folder alone: what else the machine has installed is none of a test's business."""
        return [
            entry
            for entry in importlib.metadata.entry_points(group=group)
            if entry.dist is not None and Path(str(entry.dist.locate_file(""))) == self.folder
        ]


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))
    site = Site(folder)
    monkeypatch.setattr("kdzoo.plugin.discovery.entry_points", site.entry_points)
    yield site
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]
