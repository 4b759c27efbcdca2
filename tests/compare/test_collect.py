"""A run folder becomes an entry of the ledger."""

from __future__ import annotations

import pytest
from made_up import made_up_run

from kdzoo.compare.collect import collect, cost, curve
from kdzoo.compare.ledger import Gold
from kdzoo.compare.suite import load_suite


@pytest.fixture
def collected(suite, tmp_path):
    cell = load_suite(suite).cells[0]
    made_up_run(tmp_path / "run", cell)
    return cell, *collect(cell, tmp_path / "run")


def test_it_holds_every_answer_with_its_score(collected):
    _, entry, _ = collected
    answers = entry.student.answers["seen"]
    assert [(a.seed, a.texts, a.rouge_l) for a in answers["greedy"]] == [(None, ["answer 0", "answer 1"], [50.0, 51.0])]
    assert [a.seed for a in answers["sample"]] == [10, 20]
    assert entry.student.gold == {"held out": Gold(2.0, 0.5, 1.0, 3.0), "seen": Gold(1.5, 0.25)}


def test_it_says_what_it_was_made_from_and_not_where(collected):
    cell, entry, _ = collected
    assert (entry.key, entry.seed, entry.resolved) == (cell.key, 1, cell.loaded.resolved)
    assert entry.environment["data"] == {"data.train": "abc"}
    assert entry.environment["packages"]["torch"]
    assert not {"command", "git"} & entry.environment.keys()


def test_an_answer_may_hold_any_separator_that_unicode_knows(suite, tmp_path):
    cell = load_suite(suite).cells[0]
    made_up_run(tmp_path / "run", cell, text="a\u2028b\x85c\x0cd")
    entry, _ = collect(cell, tmp_path / "run")
    assert entry.student.answers["seen"]["greedy"][0].texts[0] == "a\u2028b\x85c\x0cd 0"


def test_reference_models_are_kept_once_for_all(collected):
    _, _, reference_models = collected
    assert set(reference_models) == {"teacher", "copy of the input"}
    assert [a.texts for a in reference_models["copy of the input"].answers["seen"]["sample"]] == [
        ["answer 0", "answer 1"]
    ]
    assert reference_models["copy of the input"].gold == {}


def test_rows_of_somebody_elses_are_not_copied_into_a_ledger(suite, tmp_path):
    """A copy of the input is their text."""
    cell = load_suite(suite, sets=['evaluation.sets.seen={"jsonl": "own.jsonl"}']).cells[0]
    made_up_run(tmp_path / "run", cell)
    assert set(collect(cell, tmp_path / "run")[1]) == {"teacher"}


def test_a_curve_is_means_over_windows_and_has_gaps_where_nothing_was_looked_at():
    steps = [{"step": n, "loss": float(n)} | ({"kl/gradient_at_state": 2.0} if n == 1 else {}) for n in range(1, 41)]
    found = curve(steps)
    assert found["step"] == [float(n) for n in range(2, 41, 2)]
    assert found["loss"][:2] == [1.5, 3.5]
    assert found["kl/gradient_at_state"] == [2.0] + [None] * 19


def test_a_short_run_keeps_every_step():
    assert curve([{"step": n, "loss": 1.0} for n in (1, 2, 3)])["step"] == [1.0, 2.0, 3.0]


def test_a_slow_step_counts_for_the_time_and_not_for_the_speed():
    steps = [{"rows": 100.0, "rows_per_second": speed, "memory_gb": 1.0 + speed} for speed in (100.0, 100.0, 1.0)]
    found = cost(steps)
    assert (found.seconds, found.rows_per_second, found.memory_gb) == (102.0, 100.0, 101.0)
