"""`by_position` and `min_edit`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdzoo import Alignment, Tokens
from kdzoo.api.plugin import NoParams
from kdzoo_aligners import ByPosition, MinEdit

by_position = ByPosition(NoParams())
min_edit = MinEdit(MinEdit.Params())
WORDS = st.lists(st.text("ab ", min_size=1, max_size=3), max_size=6)


def tokens(*words: str, eos: bool = False) -> Tokens:
    """One token per word, with the space before it if it has one."""
    text = "".join(words)
    edges = [0, *accumulate(map(len, words)), *([len(text)] if eos else [])]
    return Tokens(range(len(edges) - 1), edges[:-1], edges[1:], text)


def edit_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(edit_distance(a[1:], b) + 1, edit_distance(a, b[1:]) + 1, edit_distance(a[1:], b[1:]) + (a[0] != b[0]))


def walk(student: Sequence[str], teacher: Sequence[str]) -> list[tuple[int, int]]:
    """Cells (teacher, student) of the cheapest walk, found from its end; of equal ones the diagonal, then up, left."""
    cheapest: dict[tuple[int, int], float] = {}
    for i, yours in enumerate(teacher):
        for j, mine in enumerate(student):
            before = [cheapest.get(cell, float("inf")) for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1))]
            cost = edit_distance(yours.replace(" ", ""), mine.replace(" ", ""))
            cheapest[i, j] = cost + (min(before) if i or j else 0)
    cells = [(len(teacher) - 1, len(student) - 1)]
    while cells[-1] != (0, 0):
        i, j = cells[-1]
        steps = [cell for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in cheapest]
        cells.append(min(steps, key=cheapest.__getitem__))  # the first of equal ones
    return cells[::-1]


@given(WORDS, WORDS)
def test_pairs_are_the_tokens_that_the_cheapest_walk_puts_only_together(mine, yours):
    found = min_edit.align(tokens(*mine), tokens(*yours))
    cells = walk(mine, yours) if mine and yours else []
    partners = (
        {j: [i for i, other in cells if other == j] for j in range(len(mine))},
        {i: [j for other, j in cells if other == i] for i in range(len(yours))},
    )
    assert list(found.pairs) == [(j, i) for i, j in cells if partners[0][j] == [i] and partners[1][i] == [j]]


@given(WORDS, WORDS)
def test_groups_follow_each_other_from_end_to_end_and_hold_the_walk(mine, yours):
    found = min_edit.align(tokens(*mine), tokens(*yours))
    if not (mine and yours):
        assert found == Alignment([], [])
        return
    assert found.spans[0][0] == found.spans[0][2] == 0
    assert found.spans[-1][1::2] == (len(mine), len(yours))
    assert all((b, d) == (a, c) for (_, b, _, d), (a, _, c, _) in pairwise(found.spans))
    for i, j in walk(mine, yours):
        assert any(a <= j < b and c <= i < d for a, b, c, d in found.spans)
    assert list(found.pairs) == [(a, c) for a, b, c, d in found.spans if (b - a, d - c) == (1, 1)]


@given(WORDS)
def test_equal_sides_are_paired_token_by_token(words):
    found = min_edit.align(tokens(*words, eos=True), tokens(*words, eos=True))
    # Tokens of spaces alone are all alike: any walk through them costs nothing, and the diagonal is taken.
    assert list(found.pairs) == [(k, k) for k in range(len(words) + 1)]


def test_a_token_that_is_cut_on_one_side_is_no_pair():
    student = tokens("I", " like", " dis", "till", "ation", eos=True)
    teacher = tokens("I", " like", " distill", "ation", eos=True)
    assert min_edit.align(student, teacher) == Alignment(
        [(0, 0), (3, 2), (4, 3), (5, 4)], [(0, 1, 0, 1), (1, 3, 1, 2), (3, 4, 2, 3), (4, 5, 3, 4), (5, 6, 4, 5)]
    )


def test_a_space_counts_for_nothing():
    assert min_edit.align(tokens("a", " cat"), tokens("a ", "cat")).pairs == [(0, 0), (1, 1)]


def test_the_end_is_near_to_no_word():
    student, teacher = tokens("yes", eos=True), tokens("yes", " yes", eos=True)
    assert min_edit.align(student, teacher).spans == [(0, 1, 0, 2), (1, 2, 2, 3)]


def test_rows_that_have_read_the_same_are_the_next_ones():
    student, teacher = tokens("a", "xyz", "house", "f", eos=True), tokens("a", "xy", "z", "house", "f", eos=True)
    labels = min_edit.align(student, teacher)
    assert labels.pairs == [(0, 0), (2, 3), (3, 4), (4, 5)]
    inputs = MinEdit(MinEdit.Params(rows="input")).align(student, teacher)
    # The first rows have read their prompts; the row after a token is the one that has read it.
    assert inputs.pairs == [(0, 0), (1, 1), (3, 4), (4, 5)]


@pytest.mark.parametrize("rows", ["label", "input"])
def test_sides_without_tokens_have_no_groups(rows):
    aligner = MinEdit(MinEdit.Params(rows=rows))
    assert aligner.align(tokens(), tokens("a")) == aligner.align(tokens("a"), tokens()) == Alignment([], [])


def test_by_position_goes_as_far_as_both():
    student, teacher = tokens("a", "b", "c"), tokens("abc", "d")
    assert by_position.align(student, teacher) == Alignment([(0, 0), (1, 1)], [(0, 1, 0, 1), (1, 2, 1, 2)])
    assert by_position.align(student, tokens()) == Alignment([], [])


def test_a_long_response_takes_some_milliseconds():
    words = [" " + "xyz"[: 1 + k % 3] * (1 + k % 5) for k in range(512)]
    sides = tokens(*words), tokens(*words[::2], *words[1::2])
    began = time.process_time()
    found = min_edit.align(*sides)
    assert time.process_time() - began < 0.1
    assert found.spans[-1][1::2] == (512, 512)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="rows"):
        MinEdit.Params(rows="both")
