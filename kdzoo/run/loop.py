"""The one training loop: every stage is a run of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import psutil
import torch

from kdzoo.data.schedule import StepPlan
from kdzoo.engine.distributed import summed
from kdzoo.engine.student import StudentEngine
from kdzoo.step.batch import Batch, Per

Collate = Callable[[Sequence[int]], Batch]
"""Row indices to a micro-batch; no indices give a stand-in without rows."""


def train(
    engine: StudentEngine,
    plan: StepPlan,
    collate: Collate,
    logged: Callable[[int, dict[str, float]], None],
    start: int = 0,
) -> None:
    """Optimizer steps from `start` to the plan's end; `logged` gets each one's metrics, counted from 1."""
    for number, parts in enumerate(plan.from_step(start), start):
        began = time.perf_counter()
        batches = with_global_counts([collate(indices) for indices in parts], engine.device)
        metrics = engine.step(batches, number)
        seconds = time.perf_counter() - began
        rows = batches[0].counts["rows"] or batches[0].counts["teacher_rows"]
        logged(
            number + 1,
            metrics | {"rows": rows, "rows_per_second": rows / seconds, "memory_gb": memory_gb(engine.device)},
        )


def measure(engine: StudentEngine, plan: Iterable[Sequence[int]], collate: Collate) -> dict[str, float]:
    """Terms and watched values over this rank's micro-batches, without training."""
    return engine.measure(with_global_counts([collate(indices) for indices in plan], engine.device))


def with_global_counts(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    """Every micro-batch with the denominators of all of them, over all ranks, before any forward pass."""
    local = [batch.local_counts() for batch in batches]
    totals = {per: torch.tensor(sum(counts[per] for counts in local), dtype=torch.float64) for per in local[0]}
    counts = cast(dict[Per, float], summed(cast(dict[str, torch.Tensor], totals), device))
    return [replace(batch, counts=counts) for batch in batches]


def memory_gb(device: torch.device) -> float:
    """What this rank holds now (CPU), or held at most (GPU), in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
