"""Micro-batches in the order of a stage's plan, collated in this process or, in a long stage, ahead of it by a worker.

Collating takes about a microsecond per token, a worker's start some seconds of another core: only a stage with many
rows gets one. Batches and their order are the same either way.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from types import TracebackType
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from kdzoo.api.batch import Batch
from kdzoo.data.collate import Example, collate
from kdzoo.data.schedule import StepPlan

WORKER_ROWS = 100_000
"""From this many rows on, as one rank reads them in a whole stage, a worker saves more than its start costs."""


@dataclass(frozen=True)
class MicroBatches(Dataset[Batch]):
    """Rows by their indices, as a micro-batch on the CPU; no indices give a stand-in without rows."""

    examples: Sequence[Example]
    same_tokens: bool
    rows: Literal["response", "sequence"]
    pad_id_student: int | None
    """None: without the student's side."""
    pad_id_teacher: int | None
    columns: tuple[str, ...] = ()
    """Those of the rows that token weights read."""

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.examples)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return collate(
            [self.examples[index] for index in indices],
            same_tokens=self.same_tokens,
            rows=self.rows,
            pad_id_student=self.pad_id_student,
            pad_id_teacher=self.pad_id_teacher,
            columns=self.columns,
        )


def workers_for(rows: int, cores: int) -> int:
    """How many worker processes collate where a rank reads `rows` rows in a stage, on a machine of so many cores."""
    return 1 if rows >= WORKER_ROWS and cores > 1 else 0


class StepBatches:
    """For every optimizer step from `start` on, its micro-batches on this rank: an iterable, once.

    Workers start here, so that they are ready once an engine is, and end with the `with` block.
    """

    def __init__(self, batches: MicroBatches, plan: StepPlan, start: int = 0, workers: int | None = None) -> None:
        """`workers` None: as many as `workers_for` says."""
        if workers is None:
            rows = (plan.steps - start) * plan.batch // plan.ranks
            workers = workers_for(rows, len(os.sched_getaffinity(0)))
        loader = DataLoader(
            batches,
            batch_size=None,  # an item is a micro-batch already
            sampler=chain.from_iterable(plan.from_step(start)),
            collate_fn=_unchanged,
            num_workers=workers,
            # A forked copy of a process with the threads of gloo, DeepSpeed and CUDA may stand still for good.
            multiprocessing_context="spawn" if workers else None,
            # Without one of its own it would draw from the global random state, which dropout draws from.
            generator=torch.Generator(),
        )
        with _interrupts_held_back():
            self._batches: Iterator[Batch] = iter(loader)
        self._accumulation = plan.accumulation

    def __iter__(self) -> Iterator[list[Batch]]:
        while step := list(islice(self._batches, self._accumulation)):
            yield step

    def __enter__(self) -> StepBatches:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._batches = iter(())  # the loader's iterator ends its workers when nobody holds it


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes that start within the block never see ctrl-C: the one that started them does, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
