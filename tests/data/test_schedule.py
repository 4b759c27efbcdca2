from __future__ import annotations

from itertools import chain

import pytest

from kdzoo.data.schedule import StepPlan, plan
from kdzoo.errors import RecipeError
from kdzoo.recipe.model import Stage

ADDRESS = "stages.distill"


def planned(stage: Stage, rank: int = 0, ranks: int = 1, examples: int = 21, seed: int = 0) -> StepPlan:
    return plan(examples, stage, rank, ranks, seed, ADDRESS)


@pytest.mark.parametrize(("micro", "ranks"), [(8, 1), (1, 1), (4, 2), (2, 2), (1, 2), (2, 4), (1, 8)])
def test_a_step_reads_the_same_rows_however_it_is_split(micro: int, ranks: int) -> None:
    stage = Stage(batch=8, epochs=2, micro_batch=micro)
    whole = [step[0] for step in planned(Stage(batch=8, epochs=2)).from_step()]
    split = [planned(stage, rank, ranks) for rank in range(ranks)]
    assert {one.accumulation for one in split} == {8 // (micro * ranks)}
    for expected, *parts in zip(whole, *(one.from_step() for one in split), strict=True):
        in_order = chain.from_iterable(zip(*parts, strict=True))  # accumulation first, then rank
        assert list(chain.from_iterable(in_order)) == expected


def test_an_epoch_reads_every_row_once_and_ends_with_a_smaller_batch() -> None:
    steps = [step[0] for step in planned(Stage(batch=8, epochs=2)).from_step()]
    assert [len(step) for step in steps] == [8, 8, 5, 8, 8, 5]
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second


def test_a_rank_may_get_nothing_of_the_last_batch() -> None:
    last = [list(planned(Stage(batch=8, epochs=1), rank, 4, examples=11).from_step())[-1] for rank in range(4)]
    assert [[len(part) for part in parts] for parts in last] == [[2], [1], [0], [0]]


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_resumed_stage_reads_what_an_uninterrupted_one_does(start: int) -> None:
    one = planned(Stage(batch=8, epochs=2))
    assert list(one.from_step(start)) == list(one.from_step())[start:]


def test_the_length_is_said_in_steps_or_epochs() -> None:
    assert planned(Stage(steps=7, batch=8)).steps == 7
    assert planned(Stage(epochs=1, batch=8)).steps == 3
    assert planned(Stage(epochs=0.5, batch=8)).steps == 2
    assert len(list(planned(Stage(steps=7, batch=8)).from_step())) == 7


def test_the_order_follows_the_seed_and_a_stage_may_have_its_own() -> None:
    stage = Stage(batch=8, steps=1)
    assert planned(stage).step_rows(0) == planned(stage).step_rows(0)
    assert planned(stage).step_rows(0) != planned(stage, seed=1).step_rows(0)
    own = Stage(batch=8, steps=1, seed=1)
    assert planned(own, seed=5).step_rows(0) == planned(stage, seed=1).step_rows(0)


@pytest.mark.parametrize(
    ("stage", "ranks", "says"),
    [
        (Stage(), 1, "stages.distill: neither 'steps' nor 'epochs' is given; give exactly one"),
        (Stage(steps=1, epochs=1), 1, "stages.distill: both 'steps' and 'epochs' are given; give exactly one"),
        (
            Stage(steps=1, batch=8),
            3,
            "stages.distill.batch: 8 sequences cannot be divided among 3 ranks; run on 1, 2, 4 or 8",
        ),
        (
            Stage(steps=1, batch=8, micro_batch=3),
            2,
            "stages.distill.micro_batch: 3 on 2 ranks does not divide a batch of 8; use 1, 2 or 4",
        ),
    ],
)
def test_a_split_that_does_not_come_out_even_is_refused(stage: Stage, ranks: int, says: str) -> None:
    with pytest.raises(RecipeError) as fault:
        planned(stage, 0, ranks)
    assert str(fault.value).startswith(says)
