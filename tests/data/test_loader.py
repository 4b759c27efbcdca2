"""Micro-batches come in the plan's order and are the same, whoever collates them; a worker ends with its block."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch

from kdzoo.api.aligner import Alignment
from kdzoo.api.batch import Batch
from kdzoo.data.collate import Example
from kdzoo.data.encode import Encoded
from kdzoo.data.loader import WORKER_ROWS, MicroBatches, StepBatches, workers_for
from kdzoo.data.schedule import StepPlan


def example(number: int) -> Example:
    length = 2 + number % 3
    encoded = Encoded(
        ids=[number, 50, *range(length)],
        prompt_length=2,
        starts=list(range(length)),
        ends=list(range(1, length + 1)),
        text="x" * length,
    )
    pairs = [(index, index) for index in range(length)]
    return Example(str(number), encoded, encoded, Alignment(pairs, [(i, i + 1, i, i + 1) for i, _ in pairs]))


BATCHES = MicroBatches(
    [example(number) for number in range(7)], same_tokens=False, rows="response", pad_id_student=0, pad_id_teacher=1
)
PLAN = StepPlan(steps=4, accumulation=2, micro_batch=2, steps_per_epoch=2, examples=7, batch=4, rank=0, ranks=1, seed=5)
"""An epoch ends in the middle, with a step of three rows."""


def same(a: Batch, b: Batch) -> bool:
    sides = [(getattr(a, name), getattr(b, name)) for name in ("student", "teacher")]
    tensors = [(getattr(x, f.name), getattr(y, f.name)) for x, y in sides for f in fields(x)]
    return a.counts == b.counts and all(torch.equal(x, y) for x, y in [*tensors, (a.pairs, b.pairs)])


@pytest.fixture(
    scope="module",
    params=[pytest.param(0, id="in this process"), pytest.param(2, id="two workers", marks=pytest.mark.slow)],
)
def steps(request: pytest.FixtureRequest) -> Iterator[list[list[Batch]]]:
    with StepBatches(BATCHES, PLAN, workers=request.param) as batches:
        found = list(batches)
    assert multiprocessing.active_children() == []
    yield found


def test_batches_are_those_of_the_plan_in_its_order(steps):
    expected = [[BATCHES[indices] for indices in parts] for parts in PLAN.from_step()]
    assert [len(step) for step in steps] == [2, 2, 2, 2]
    assert all(same(a, b) for step, own in zip(steps, expected, strict=True) for a, b in zip(step, own, strict=True))


def test_a_stage_may_begin_later():
    with StepBatches(BATCHES, PLAN, start=3) as batches:
        ((first, second),) = batches
    (last,) = PLAN.from_step(3)
    assert same(first, BATCHES[last[0]]) and same(second, BATCHES[last[1]])


def test_the_global_random_state_is_not_moved():
    before = torch.get_rng_state()
    with StepBatches(BATCHES, PLAN) as batches:
        list(batches)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_workers_never_see_ctrl_c_and_end_where_the_loop_fails():
    with pytest.raises(ZeroDivisionError) as fault, StepBatches(BATCHES, PLAN, workers=1) as batches:
        for _ in batches:
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGINT)
            assert worker.is_alive()
            raise ZeroDivisionError
    assert fault.value is not None  # its traceback is still held here
    assert multiprocessing.active_children() == []
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_only_a_long_stage_on_several_cores_has_a_worker():
    assert workers_for(WORKER_ROWS, cores=2) == 1
    assert workers_for(WORKER_ROWS - 1, cores=64) == 0
    assert workers_for(WORKER_ROWS, cores=1) == 0
