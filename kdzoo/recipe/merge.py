"""JSON Merge Patch (RFC 7396), and who set what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Address = tuple[str | int, ...]


@dataclass(frozen=True)
class Layer:
    """One patch: a recipe file, or a flag."""

    label: str
    """As it stands in messages: the file's path, or the flag as it was given."""
    folder: Path
    """What relative paths in it are relative to."""
    patch: dict[str, Any]


@dataclass(frozen=True)
class Merged:
    """A document and the layer behind each of its values, and behind each key that a layer deleted."""

    document: dict[str, Any]
    origins: dict[Address, Layer]
    """Of an object: the last layer that changed something in it."""

    def origin(self, address: Address) -> Layer | None:
        """The layer behind a value; inside a list, the one behind the list."""
        while address and address not in self.origins:
            address = address[:-1]
        return self.origins.get(address)

    def objects(self, *pattern: str) -> Iterator[tuple[Address, dict[str, Any]]]:
        """The objects at an address; `"*"` is any key. What is no object is passed over."""
        found: list[tuple[Address, Any]] = [((), self.document)]
        for part in pattern:
            found = [
                ((*at, key), value)
                for at, parent in found
                for key, value in parent.items()
                if part in ("*", key) and isinstance(value, dict)
            ]
        yield from found


def merge_patch(target: Any, patch: Any) -> Any:
    """`target` with `patch` merged over it (RFC 7396): objects by key, null deletes. Neither is changed."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def merge(layers: Sequence[Layer]) -> Merged:
    """All layers, each merged over the ones before it."""
    document: dict[str, Any] = {}
    origins: dict[Address, Layer] = {}
    for layer in layers:
        document = merge_patch(document, layer.patch)
        _trace(origins, layer, layer.patch, ())
    return Merged(document, origins)


def leaves(document: dict[str, Any], at: Address = ()) -> Iterator[tuple[Address, Any]]:
    """Every value that is no object, and every empty object, with its address."""
    for key, value in document.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value


def in_text(address: Address) -> str:
    """`("stages", "distill", "betas", 0)` as `stages.distill.betas[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in address).removeprefix(".")


def _trace(origins: dict[Address, Layer], layer: Layer, patch: dict[str, Any], at: Address) -> None:
    for key, value in patch.items():
        here = (*at, key)
        if not isinstance(value, dict):
            for below in [address for address in origins if address[: len(here)] == here]:
                del origins[below]
        origins[here] = layer
        if isinstance(value, dict):
            _trace(origins, layer, value, here)
