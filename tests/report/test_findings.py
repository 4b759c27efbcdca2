"""From a ledger to numbers: what is a mean over what, what is compared with what, what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_ledger import write_ledger

from kdzoo.compare.ledger import read_ledger
from kdzoo.errors import KdzooError
from kdzoo.report.findings import Number, find
from kdzoo.report.published import Published, read_published

ROOT = Path(__file__).parents[2]
PUBLISHED = Published("a paper", "its mean", {"mixtral_to_gpt2": {"residual": 20.0, "uld": 1.0, "teacher": 30.0}})


def found(folder, **how):
    return find(read_ledger(write_ledger(folder, **how)), PUBLISHED).pairs[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is found in a ledger of which nothing is missing."""
    return found(tmp_path_factory.mktemp("ledger"))


def test_a_row_is_a_mean_over_training_seeds_with_its_deviation(whole):
    greedy = whole.decoded[0]
    rows = {row.name: row for row in greedy.rows}
    assert list(rows) == ["teacher", "sft", "residual", "dskd"]
    assert rows["sft"].mean.mean == pytest.approx(23.2)
    assert rows["sft"].mean.deviation == pytest.approx(0.1)
    assert rows["sft"].sets["seen"] == rows["sft"].mean
    assert (rows["teacher"].seeds, rows["teacher"].mean) == (None, Number(40.0, None))
    assert rows["sft"].decoding_deviation is None


def test_decoding_seeds_are_apart_from_training_seeds(whole):
    sample = whole.decoded[1]
    assert sample.seeds == [10, 20]
    sft = sample.rows[0]
    assert sft.name == "sft"  # the teacher was not sampled
    assert sft.mean.deviation == pytest.approx(0.1)
    assert sft.decoding_deviation == pytest.approx(0.5**0.5)  # of 1 and 2


def test_each_method_is_compared_with_what_the_suite_says_prompt_by_prompt(whole):
    residual, dskd = whole.decoded[0].contrasts
    assert (residual.recipe, residual.against, dskd.recipe, dskd.against) == ("residual", "sft", "dskd", "residual")
    assert residual.difference.estimate == pytest.approx(5.0)
    assert residual.difference.over is not None and residual.difference.over.low == pytest.approx(5.0)
    assert dskd.difference.estimate == pytest.approx(-0.1)
    assert dskd.difference.within is not None and dskd.difference.within.high == pytest.approx(-0.1)
    assert dskd.difference.over is not None and dskd.difference.over.high > 3
    assert dskd.p_holm is not None and dskd.p_holm > 0.9


def test_only_seeds_that_both_have_are_compared(tmp_path):
    pair = found(tmp_path, without=(("sft", 3), ("dskd", 1), ("dskd", 2)))
    residual, dskd = pair.decoded[0].contrasts
    assert residual.difference.seeds == 2
    assert dskd.difference.seeds == 1
    assert dskd.difference.estimate == pytest.approx(2.9)
    assert dskd.difference.over is None and dskd.p_holm is None
    assert pair.missing == {"sft": [3], "dskd": [1, 2]}
    assert pair.cells == 6


def test_what_does_not_fit_is_left_out_and_not_missing(whole):
    assert whole.left_out == {"abkd": "needs one tokenizer"}
    assert whole.missing == {}


def test_held_out_cross_entropy_is_compared_by_training_seeds(whole):
    rows = {row.name: row for row in whole.gold}
    assert rows["teacher"].cross_entropy == Number(1.0, None)
    assert rows["teacher"].right is None
    assert rows["residual"].cross_entropy.mean == pytest.approx(1.52)
    assert rows["residual"].wrong is not None and rows["residual"].wrong.mean == pytest.approx(2.52)
    assert rows["residual"].accuracy.mean == pytest.approx(50.0)
    assert rows["residual"].lower_by is not None and rows["residual"].lower_by.mean == pytest.approx(0.5)
    assert rows["dskd"].against == "residual"
    assert rows["sft"].lower_by is None


def test_costs_curves_and_gradients(whole):
    pair = whole
    assert [(row.name, row.seconds.mean, row.speed, row.memory_gb) for row in pair.costs] == [
        ("sft", 10.0, 1.0, 1.5),
        ("residual", 10.0, 0.5, 1.5),
        ("dskd", 10.0, 0.5, 1.5),
    ]
    assert (pair.curves["sft"].steps, pair.curves["sft"].values) == ([20.0, 40.0], [4.0, 3.0])
    assert pair.gradients["residual"] == {"sft": 0.75, "kd": 0.25}


def test_published_numbers_stand_beside_what_is_there(whole):
    assert whole.published == {"residual": 20.0, "teacher": 30.0}


def test_cells_of_different_rows_are_not_compared(tmp_path):
    other = {("residual", 2): {"data": {"data.train": "abc", "evaluation.sets.seen": "another"}}}
    with pytest.raises(KdzooError, match="'residual' of seed 2 and 'sft' of seed 1 used different rows of eval"):
        found(tmp_path, environments=other)


def test_what_may_move_a_number_is_told(tmp_path):
    other = {
        ("residual", 2): {"commit": {"commit": "fedcba9876543210", "dirty": True}},
        ("dskd", 1): {"packages": {"torch": "2.14.0"}, "device": {"type": "cuda", "name": "NVIDIA H100"}},
    }
    warnings = found(tmp_path, environments=other).warnings
    assert warnings[0] == "The cells were run at 2 commits: 0123456, fedcba9."
    assert "not committed when these were run: `residual-2`." in warnings[1]
    assert "The cells were run with different versions of torch: 2.13.0, 2.14.0." in warnings
    assert warnings[-1] == (
        "The cells were run on different machines: cpu, 1 thread, 1 rank; NVIDIA H100, 1 rank. Costs do not compare."
    )


def test_a_ledger_without_cells_says_how_to_get_some(tmp_path):
    suite = write_ledger(tmp_path, seeds=())
    with pytest.raises(KdzooError, match="no run has finished yet; start them with 'kdzoo compare'"):
        find(read_ledger(suite), PUBLISHED)


def test_the_published_numbers_are_of_committed_recipes_and_pairs():
    published = read_published()
    names = {path.stem for folder in ("recipes", "recipes/ablations") for path in (ROOT / folder).glob("*.json")}
    for pair, scores in published.pairs.items():
        assert (ROOT / "recipes" / "pairs" / f"{pair}.json").is_file()
        assert set(scores) <= names | {"teacher"}
    assert published.of("mixtral_to_gpt2")["residual"] == 20.01
    assert published.of("of nobody") == {}
