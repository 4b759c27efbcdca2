"""Which tokens make a chunk, and how a chunk is cut into tiles."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdzoo.api.chunk import Index

CHUNK_BYTES = 64 * 2**20
"""Float32 logits of one chunk, all streams together: what one matrix product makes, and what memory depends on."""

CHUNK_TOKENS = 128
"""Tokens of one chunk at least, where `CHUNK_BYTES` would be less (a large vocabulary): every chunk reads and writes
the head's whole gradient once, which only pays for many tokens."""

TILE_BYTES = 4 * 2**20
"""On a CPU, softmax and losses pass over the chunk in tiles of this size per stream, which stay in the cache."""

Chunk = Mapping[str, Index]
"""Axis -> which of its tokens. Tokens of two axes in one chunk are pairs, or (with `GROUPS`) whole groups."""

Cut = Callable[[int], Iterator[Chunk]]
"""Chunks of so many tokens."""

GROUPS = "groups"
"""Where a chunk has whole groups: which. No axis has this name: those of own streams have a slash in theirs."""


def chunk_tokens(chunk_bytes: int, width: int) -> int:
    """Tokens of a chunk whose streams have `width` logits together. An odd `chunk_bytes` (in tests) has no floor."""
    floor = CHUNK_TOKENS if chunk_bytes >= CHUNK_BYTES else 1
    return max(floor, chunk_bytes // (4 * width))


@dataclass(frozen=True)
class Tile:
    """A part of a chunk: by axis, which of the chunk's tokens, and which tokens of the axis they are."""

    part: Mapping[str, slice]
    chunk: Chunk


def side_by_side(axes: Sequence[str], length: int) -> Cut:
    """Tokens of one axis, or of two whose tokens are the same."""

    def cut(size: int) -> Iterator[Chunk]:
        # One empty chunk where there is no token: every rank must report the same terms and train the same modules.
        for start in range(0, max(length, 1), size):
            yield {axis: slice(start, start + size) for axis in axes}

    return cut


def pairs_and_others(pairs: Tensor, lengths: Mapping[str, int], leftovers: Sequence[str]) -> Cut:
    """Aligned pairs side by side, then the tokens of `leftovers` that no pair holds."""

    def cut(size: int) -> Iterator[Chunk]:
        for part in pairs.split(size):
            yield {"student": part[:, 0], "teacher": part[:, 1]}
        for column, axis in enumerate(("student", "teacher")):
            if axis in leftovers:
                alone = torch.ones(lengths[axis], dtype=torch.bool, device=pairs.device)
                alone[pairs[:, column]] = False
                for part in alone.nonzero().squeeze(-1).split(size):
                    yield {axis: part}

    return cut


class Groups:
    """Where the groups of several packings begin, so that they can be cut between groups."""

    def __init__(self, streams: Mapping[str, tuple[Tensor, int]]) -> None:
        """`streams`: axis -> the group of each token [n], and how many logits a token has."""
        found = {axis: (group.cpu(), width) for axis, (group, width) in streams.items()}
        assert all((group[1:] >= group[:-1]).all() for group, _ in found.values()), "groups must be ascending"
        self.count = 1 + max(int(group[-1]) if len(group) else -1 for group, _ in found.values())
        sizes = {axis: torch.bincount(group, minlength=self.count) for axis, (group, _) in found.items()}
        self.starts = {axis: [0, *size.cumsum(0).tolist()] for axis, size in sizes.items()}
        ends = [(self.starts[axis], width) for axis, (_, width) in found.items()]
        self._logits = [sum(starts[g] * width for starts, width in ends) for g in range(self.count + 1)]
        self.width = sum(width for _, width in streams.values())

    def cut(self, first: int, last: int, logits: int) -> Iterator[Chunk]:
        """Groups `first` to `last` in parts of so many logits, or of one group; at least one part."""
        while True:
            fits = bisect_right(self._logits, self._logits[first] + logits, first, last + 1) - 1
            stop = min(max(fits, first + 1), last)
            parts: dict[str, Index] = {axis: slice(starts[first], starts[stop]) for axis, starts in self.starts.items()}
            yield parts | {GROUPS: slice(first, stop)}
            first = stop
            if first == last:
                return

    def whole(self, size: int) -> Iterator[Chunk]:
        """All groups, in chunks of about `size` tokens of every packing."""
        return self.cut(0, self.count, size * self.width)


def tiles(chunk: Chunk, products: Mapping[str, Tensor], groups: Groups | None) -> Iterator[Tile]:
    """The chunk in pieces that stay in the processor's cache while softmax and losses pass over them.

    `products`: by stream [n, V]. `groups`: those of a chunk that has whole ones.
    """
    length = next(len(product) for product in products.values())
    width = max(product.shape[1] for product in products.values())
    on_cpu = next(iter(products.values())).device.type == "cpu"
    size = max(1, TILE_BYTES // (4 * width)) if on_cpu else max(1, length)
    if groups is not None:
        whole = as_slice(chunk[GROUPS])
        logits = sum(product.shape[1] * (size if on_cpu else len(product)) for product in products.values())
        for part in groups.cut(whole.start, whole.stop, logits):
            yield Tile({axis: _within(chunk[axis], part[axis]) for axis in groups.starts}, part)
        return
    for start in range(0, max(length, 1), size):
        here = slice(start, min(start + size, length))
        yield Tile(dict.fromkeys(chunk, here), {axis: _part(i, start, size, length) for axis, i in chunk.items()})


def as_slice(index: Index) -> slice:
    assert isinstance(index, slice)
    return index


def _within(whole: Index, part: Index) -> slice:
    """Where a part of an axis stands in a chunk that holds more of it."""
    start = as_slice(whole).start
    return slice(as_slice(part).start - start, as_slice(part).stop - start)


def _part(index: Index, start: int, size: int, length: int) -> Index:
    """Tokens `start` to `start + size` of a chunk's index into an axis."""
    if isinstance(index, slice):
        return slice(index.start + start, index.start + min(start + size, length))
    return index[start : start + size]
