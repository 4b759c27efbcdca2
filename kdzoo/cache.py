"""The content-addressed cache: what is made once is found again by what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdzoo.errors import KdzooError


def cache_dir() -> Path:
    """`$KDZOO_CACHE`, by default `~/.cache/kdzoo`."""
    return Path(os.environ.get("KDZOO_CACHE") or "~/.cache/kdzoo").expanduser()


def content_key(content: Any) -> str:
    """A short hash of plain data, the same on every machine."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def cached_path(kind: str, content: Mapping[str, Any]) -> Path:
    """Where the artifact made from `content` stands, or will."""
    return cache_dir() / kind / content_key(content)


def cached_folder(kind: str, content: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder made from `content`: found, or built by `build(folder)` and moved into place whole.

    A build that fails or is interrupted leaves nothing behind. `made_from.json` in it holds `content`.
    """
    target = cached_path(kind, content)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    except OSError as error:
        raise KdzooError(
            f"cache {cache_dir()}: cannot be written ({error.strerror}); set $KDZOO_CACHE to a folder that can"
        ) from error
    try:
        build(work)
        (work / "made_from.json").write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False))
        try:
            work.rename(target)
        except OSError:
            if not target.exists():  # another process was not faster: a real fault
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
