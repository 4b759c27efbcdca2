"""A ledger is written and read; what is wrong with one is said in a line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kdzoo.compare.ledger import (
    Answers,
    Cell,
    Compared,
    Cost,
    Gold,
    Model,
    mean_rouge,
    read_ledger,
    write_cell,
    write_reference_models,
    write_suite,
)
from kdzoo.errors import KdzooError

MODEL = Model(
    {"seen": {"greedy": [Answers(None, ["a 字", ""], [12.5, 0.0])], "sample": [Answers(10, ["b", "c"], [1.0, 2.0])]}},
    {"seen": Gold(1.5, 0.25), "held out": Gold(1.25, 0.5, right=1.0, wrong=2.0)},
)
CELL = Cell(
    pair="lab",
    recipe="sft",
    seed=1,
    key="abc",
    resolved={"title": "x", "student": {"name": None}},
    environment={"data": {"data.train": "def"}},
    student=MODEL,
    curve={"step": [1.0, 20.0], "sft/gradient_at_state": [0.5, None]},
    cost=Cost(1.0, 2.0, 3.0),
)
SUITE = Compared("t", "d", {"lab": "A to B"}, {"sft": "alone", "dskd": "DSKD"}, [1, 2], "sft")


def test_what_is_written_is_read(tmp_path):
    write_suite(tmp_path / "zoo.json", SUITE)
    write_cell(tmp_path / "zoo.json", CELL)
    write_cell(tmp_path / "zoo.json", replace(CELL, seed=2))
    write_reference_models(tmp_path / "zoo.json", "lab", {"teacher": MODEL})
    found = read_ledger(tmp_path / "zoo.json")
    assert found.suite == SUITE
    assert found.pairs["lab"].cells == {"sft": {1: CELL, 2: replace(CELL, seed=2)}}
    assert found.pairs["lab"].reference_models == {"teacher": MODEL}


def test_the_mean_is_over_sets_and_of_the_first_decoding():
    assert mean_rouge(MODEL) == 6.25
    assert mean_rouge(Model({}, {})) is None


def test_one_content_is_one_file_to_the_byte(tmp_path):
    for folder in ("a", "b"):
        write_cell(tmp_path / folder / "zoo.json", CELL)
    assert (tmp_path / "a/lab/sft-1.json.gz").read_bytes() == (tmp_path / "b/lab/sft-1.json.gz").read_bytes()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "zoo.json").unlink(), "no such file; give the JSON file"),
        (lambda folder: (folder / "zoo.json").write_text('{"title": 1}'), "title: input should be a valid string"),
        (lambda folder: (folder / "lab/sft-1.json.gz").write_bytes(b"no"), "cannot be read .*gzip"),
        (lambda folder: (folder / "lab/sft-1.json.gz").write_bytes(b"\x1f\x8b\x08"), "cannot be read"),
    ],
)
def test_a_broken_ledger_is_told_in_a_line(tmp_path, spoil, told):
    write_suite(tmp_path / "zoo.json", SUITE)
    write_cell(tmp_path / "zoo.json", CELL)
    spoil(tmp_path)
    with pytest.raises(KdzooError, match=told) as raised:
        read_ledger(tmp_path / "zoo.json")
    assert "\n" not in str(raised.value)
