"""Alignments are made once per dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdzoo.api.aligner import Aligner, Alignment, Tokens
from kdzoo.api.plugin import NoParams
from kdzoo.data.alignments import cached_alignments

EMPTY = Tokens([], [], [], "")
SOME = Tokens([5, 6], [0, 1], [1, 2], "ab")
MADE_FROM = {"rows": "r", "aligner": "counted"}


class Counted(Aligner):
    """Pairs tokens as far as both go, and counts how often it is asked."""

    name = "counted"
    calls = 0

    def align(self, student: Tokens, teacher: Tokens) -> Alignment:
        self.calls += 1
        n = min(len(student.ids), len(teacher.ids))
        return Alignment([(i, i) for i in range(n)], [(0, n, 0, n)] if n else [])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path))
    return tmp_path


def test_what_was_found_once_is_read_again() -> None:
    aligner = Counted(NoParams())
    sides = [EMPTY, SOME, SOME], [SOME, SOME, EMPTY]
    first, again = (cached_alignments(aligner, MADE_FROM, *sides) for _ in range(2))
    assert first == again == [Alignment([], []), Alignment([(0, 0), (1, 1)], [(0, 2, 0, 2)]), Alignment([], [])]
    assert aligner.calls == 3


def test_another_dataset_is_another_entry() -> None:
    aligner = Counted(NoParams())
    cached_alignments(aligner, MADE_FROM, [SOME], [SOME])
    cached_alignments(aligner, MADE_FROM | {"rows": "others"}, [SOME], [SOME])
    assert aligner.calls == 2


def test_no_rows_have_no_alignments() -> None:
    assert cached_alignments(Counted(NoParams()), MADE_FROM, [], []) == []
