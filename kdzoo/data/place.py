"""Places that recipes name: variables expanded, folders distinguished from hub names, hub names fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kdzoo.errors import KdzooError, did_you_mean
from kdzoo.quiet import quiet_hub

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expand(text: str, address: str, fault: type[KdzooError]) -> str:
    """`text` with `$NAME`, `${NAME}` and a leading `~` expanded; an unset variable raises `fault`."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise fault(f"{address}: '{text}' needs the environment variable '{name}', which is not set; export it")
        return os.environ[name]

    return str(Path(_VARIABLE.sub(value, text)).expanduser()) if text.startswith("~") else _VARIABLE.sub(value, text)


def existing_file(text: str, address: str, fault: type[KdzooError]) -> Path:
    """The file that `text` names after expansion; a missing one raises `fault` with the closest name."""
    path = Path(expand(text, address, fault))
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise fault(f"{address}: '{path}': {what}{_close_name(path)}")
    return path


def local_folder(text: str, address: str, fault: type[KdzooError]) -> Path | None:
    """The folder that `text` names after expansion; `None` where it reads as a hub name (`gpt2`, `a/b`)."""
    expanded = expand(text, address, fault)
    path = Path(expanded)
    if path.is_dir():
        return path
    if expanded != text or text.startswith((".", "/")) or text.count("/") > 1 or path.is_file():
        what = "is a file, not a folder" if path.is_file() else "no such folder"
        raise fault(f"{address}: '{path}': {what}{_close_name(path)}")
    return None


def hub_folder(name: str, revision: str | None, patterns: Sequence[str], address: str, fault: type[KdzooError]) -> Path:
    """The local snapshot of a hub repository, only files that match `patterns`; any failure is one line."""
    from huggingface_hub import snapshot_download

    try:
        with quiet_hub():
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises a dozen kinds: network, access, names, revisions
        raise fault(
            f"{address}: '{name}' is not a local folder and cannot be fetched from the hub ({one_line(error)}); "
            "check the name, the network and your access, or give a local folder"
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of a library's message, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _close_name(path: Path) -> str:
    """`", did you mean 'x'?"` for a neighbour with a close name; else where the path stops to exist."""
    parent = path.parent
    if parent.is_dir():
        return did_you_mean(path.name, (entry.name for entry in parent.iterdir()))
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    return f", and no folder '{path}'{did_you_mean(path.name, (entry.name for entry in parent.iterdir()))}"
