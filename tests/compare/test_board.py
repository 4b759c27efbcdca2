"""The board on a terminal and in a log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from kdzoo.compare.board import Board
from kdzoo.compare.suite import load_suite


@pytest.fixture
def board(suite):
    def make(terminal: bool, height: int = 40) -> Board:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100, height=height, color_system=None)
        return Board(load_suite(suite).cells, 2, console)

    return make


def text(board: Board) -> str:
    board.console.print(board.table())
    return board.console.file.getvalue()


def test_a_log_gets_a_line_per_cell_that_ran(board, suite):
    made, cells = board(False), load_suite(suite).cells
    made.done(cells[0], 40.0)
    made.started(cells[1], Path("nowhere"))
    made.done(cells[1], 41.257, 60.0)
    made.fail(cells[2], "data.train: no rows", Path("x.log"))
    assert made.console.file.getvalue().splitlines() == [
        "2/4  tiny  kl-1  Rouge-L 41.26, took 1:00, about 1:00 left",
        "3/4  tiny  sft-2  failed: data.train: no rows (x.log)",
    ]


def test_a_terminal_gets_a_table_that_fills_up(board, suite, tmp_path):
    made, cells = board(True), load_suite(suite).cells
    made.done(cells[0], 40.0)
    made.started(cells[1], tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("{}\n" * 10)
    made.fail(cells[2], "why", Path("x.log"))
    lines = text(made).splitlines()
    assert lines[0].startswith("1 of 4 cells done, 1 failed")
    assert [line.split() for line in lines[1:]] == [
        ["seed", "1", "seed", "2"],
        ["tiny"],
        ["sft", "40.00", "failed"],
        ["kl", "25%", "0:00", "·"],
    ]


def test_a_low_screen_shows_what_is_at_work(suite, write, board):
    for number in range(12):
        write(f"m{number}.json", {"extends": "sft.json", "losses": {"sft": {"weight": 1.0 + number / 8 + 0.1}}})
    content = suite.read_text().replace('["../kl.json"]', str([f"../m{n}.json" for n in range(12)]).replace("'", '"'))
    suite.write_text(content)
    made, cells = board(True, height=10), load_suite(suite).cells
    for cell in cells[:8]:
        made.done(cell, 1.0)
    shown = text(made)
    assert " m7 " in shown and " m0 " not in shown
    assert len(shown.splitlines()) <= 10
