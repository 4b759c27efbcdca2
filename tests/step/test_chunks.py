"""Which tokens make a chunk, and how a chunk is cut into tiles."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from kdzoo.step.chunks import (
    CHUNK_BYTES,
    CHUNK_TOKENS,
    GROUPS,
    Chunk,
    Groups,
    chunk_tokens,
    pairs_and_others,
    side_by_side,
    tiles,
)

BOTH = ("student", "teacher")
PAIRS = torch.tensor([[0, 1], [2, 0], [5, 3]])
LENGTHS = {"student": 7, "teacher": 4}


def tokens(chunks: Iterable[Chunk], axis: str, length: int) -> list[list[int]]:
    """Which tokens of an axis each chunk has, if it has the axis."""
    return [torch.arange(length)[chunk[axis]].tolist() for chunk in chunks if axis in chunk]


def tensor(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)


def test_a_chunk_has_as_many_tokens_as_its_bytes_of_logits_hold():
    assert chunk_tokens(CHUNK_BYTES, 32_000) == CHUNK_BYTES // (4 * 32_000)
    assert chunk_tokens(CHUNK_BYTES, 300_000) == CHUNK_TOKENS
    assert chunk_tokens(4 * 20 * 3, 20) == 3
    assert chunk_tokens(1, 20) == 1


# Tokens side by side.


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_tokens_side_by_side_are_cut_at_the_same_places(size):
    chunks = list(side_by_side(BOTH, 7)(size))
    expected = [list(range(start, min(start + size, 7))) for start in range(0, 7, size)]
    assert tokens(chunks, "student", 7) == tokens(chunks, "teacher", 7) == expected


def test_no_token_is_one_empty_chunk():
    assert tokens(side_by_side(("student",), 0)(5), "student", 0) == [[]]


# Pairs.


@pytest.mark.parametrize("size", [1, 2, 100])
def test_pairs_come_first_and_then_what_no_pair_holds(size):
    chunks = list(pairs_and_others(PAIRS, LENGTHS, BOTH)(size))
    paired = [chunk for chunk in chunks if chunk.keys() == set(BOTH)]
    assert chunks[: len(paired)] == paired
    assert [*chain(*tokens(paired, "student", 7))] == [0, 2, 5]
    assert [*chain(*tokens(paired, "teacher", 4))] == [1, 0, 3]
    others = chunks[len(paired) :]
    assert [*chain(*tokens(others, "student", 7))] == [1, 3, 4, 6]
    assert [*chain(*tokens(others, "teacher", 4))] == [2]
    assert all(len(part) <= size for axis in BOTH for part in tokens(chunks, axis, LENGTHS[axis]))


def test_only_the_leftovers_that_are_asked_for_are_walked():
    chunks = list(pairs_and_others(PAIRS, LENGTHS, ("student",))(100))
    assert [set(chunk) for chunk in chunks] == [set(BOTH), {"student"}]


def test_no_pair_is_an_empty_chunk_so_that_every_rank_sees_every_visit():
    chunks = list(pairs_and_others(PAIRS[:0], {"student": 0, "teacher": 2}, BOTH)(100))
    assert [set(chunk) for chunk in chunks] == [set(BOTH), {"student"}, {"teacher"}]
    assert tokens(chunks, "student", 0) == [[], []]
    assert tokens(chunks, "teacher", 2) == [[], [0, 1]]


# Groups.

P, Q = tensor([0, 0, 1, 3, 3, 3]), tensor([0, 1, 1, 2, 2, 3])


def grouped(p: Tensor = P, q: Tensor = Q, widths: tuple[int, int] = (10, 5)) -> Groups:
    return Groups({"x/p": (p, widths[0]), "x/q": (q, widths[1])})


def test_a_chunk_has_whole_groups_of_every_packing():
    groups = grouped()
    assert groups.count == 4
    chunks = list(groups.whole(2))
    assert [chunk[GROUPS] for chunk in chunks] == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert tokens(chunks, "x/p", 6) == [[0, 1], [2], [3, 4, 5]]
    assert tokens(chunks, "x/q", 6) == [[0], [1, 2, 3, 4], [5]]


def test_a_group_that_is_too_large_is_a_chunk_of_its_own():
    chunks = list(grouped().whole(1))
    assert [chunk[GROUPS] for chunk in chunks] == [slice(g, g + 1) for g in range(4)]


def test_no_group_is_one_empty_chunk():
    (chunk,) = grouped(tensor([]), tensor([])).whole(3)
    assert chunk == {"x/p": slice(0, 0), "x/q": slice(0, 0), GROUPS: slice(0, 0)}


def test_groups_that_are_not_ascending_are_refused():
    with pytest.raises(AssertionError, match=r"^groups must be ascending$"):
        grouped(P.flip(0))


ascending = some.lists(some.integers(0, 6), max_size=12).map(sorted)


@given(ascending, ascending, some.integers(1, 8))
def test_every_group_is_in_one_chunk_and_chunks_are_as_small_as_asked_for(p, q, size):
    groups = grouped(tensor(p), tensor(q))
    chunks = list(groups.whole(size))
    for axis, group in (("x/p", p), ("x/q", q)):
        parts = tokens(chunks, axis, len(group))
        assert [*chain(*parts)] == list(range(len(group)))
        for chunk, part in zip(chunks, parts, strict=True):
            assert {group[token] for token in part} <= set(range(chunk[GROUPS].start, chunk[GROUPS].stop))
    for chunk in chunks:
        logits = 10 * len(p[chunk["x/p"]]) + 5 * len(q[chunk["x/q"]])
        assert logits <= size * groups.width or chunk[GROUPS].stop - chunk[GROUPS].start == 1


# Tiles.


@pytest.fixture
def two_tokens(monkeypatch):
    """Tiles of two tokens of ten logits."""
    monkeypatch.setattr("kdzoo.step.chunks.TILE_BYTES", 4 * 10 * 2)


def products(**lengths: int) -> dict[str, Tensor]:
    return {name: torch.zeros(n, 10) for name, n in lengths.items()}


def test_a_small_chunk_is_one_tile():
    chunk = {"student": slice(4, 9)}
    (tile,) = tiles(chunk, products(student=5), None)
    assert tile.part == {"student": slice(0, 5)}
    assert tile.chunk == chunk


@pytest.mark.usefixtures("two_tokens")
def test_tiles_cut_all_axes_of_a_chunk_at_the_same_places():
    chunk = {"student": slice(4, 9), "teacher": tensor([7, 1, 3, 0, 2])}
    found = list(tiles(chunk, products(student=5, teacher=5), None))
    assert [tile.part["student"] for tile in found] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert all(tile.part["student"] == tile.part["teacher"] for tile in found)
    assert tokens([tile.chunk for tile in found], "student", 12) == [[4, 5], [6, 7], [8]]
    assert tokens([tile.chunk for tile in found], "teacher", 12) == [[7, 1], [3, 0], [2]]


@pytest.mark.usefixtures("two_tokens")
def test_an_empty_chunk_is_one_empty_tile():
    (tile,) = tiles({"student": slice(0, 0)}, products(student=0), None)
    assert tile.part == {"student": slice(0, 0)}


@pytest.mark.usefixtures("two_tokens")
def test_a_chunk_of_groups_is_cut_between_groups():
    groups = grouped(widths=(10, 10))
    (_, chunk, *_) = [*groups.cut(0, 1, 1000), *groups.cut(1, 4, 1000)]
    assert chunk[GROUPS] == slice(1, 4)
    made = {"x/p": torch.zeros(4, 10), "x/q": torch.zeros(5, 10)}
    found = list(tiles(chunk, made, groups))
    assert [tile.chunk[GROUPS] for tile in found] == [slice(1, 2), slice(2, 3), slice(3, 4)]
    assert [tile.part["x/p"] for tile in found] == [slice(0, 1), slice(1, 1), slice(1, 4)]
    assert [tile.part["x/q"] for tile in found] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert tokens([tile.chunk for tile in found], "x/q", 6) == [[1, 2], [3, 4], [5]]
