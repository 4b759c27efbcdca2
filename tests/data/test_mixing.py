"""Which rows get another response, and what they then are."""

from __future__ import annotations

import pytest

from kdzoo.data.mixing import Response, row_order, taken, with_responses
from kdzoo.data.rows import Row


def rows(count: int) -> list[Row]:
    return [Row(str(i), f"ask {i}", "", (f"gold {i}", "another")) for i in range(count)]


def test_the_order_is_the_same_everywhere_and_another_for_another_seed():
    assert row_order(8, seed=0) == [6, 4, 2, 1, 7, 5, 0, 3]
    assert row_order(8, seed=1) != row_order(8, seed=0)
    assert sorted(row_order(1000, seed=3)) == list(range(1000))


def test_the_order_does_not_follow_the_rows():
    first = row_order(2000, seed=0)[:1000]
    assert 450 < sum(row < 1000 for row in first) < 550


@pytest.mark.parametrize(("share", "count"), [(1.0, 9), (0.5, 5), (0.05, 0), (0.06, 1), (1 / 3, 3)])
def test_a_share_is_the_nearest_number_of_rows(share, count):
    assert taken(9, share) == count


def test_a_row_with_another_response_keeps_all_else():
    before = rows(3)
    after = with_responses(before, {1: Response("answer", ended=True), 2: Response("answ", ended=False)})
    assert after[0] is before[0]
    assert after[1] == Row("1", "ask 1", "", ("answer",), ended=True)
    assert after[2] == Row("2", "ask 2", "", ("answ",), ended=False)


def test_an_empty_response_replaces_nothing():
    before = rows(1)
    assert with_responses(before, {0: Response("", ended=True)}) == before
