"""How a stage is trained: its schedule, its engine, the one training loop, its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import psutil
import torch

from kdzoo.api.batch import Batch, Reduction
from kdzoo.api.head import Head
from kdzoo.api.models import Role
from kdzoo.data.loader import MicroBatches, StepBatches
from kdzoo.data.schedule import StepPlan, plan
from kdzoo.engine.config import engine_config
from kdzoo.engine.distributed import rank, summed, world
from kdzoo.engine.loading import load_model
from kdzoo.engine.student import StudentEngine, build_distiller
from kdzoo.lora import add_lora
from kdzoo.run.context import RunContext
from kdzoo.run.inputs import StageInputs
from kdzoo.run.losses import build_losses, models_of, start_losses
from kdzoo.run.progress import stage_progress
from kdzoo.run.resolved import ResolvedStage

StepLog = Callable[[str, int, dict[str, float]], None]
"""(stage, step, metrics) of every optimizer step."""


def train_stage(
    context: RunContext,
    resolved: ResolvedStage,
    inputs: StageInputs,
    log: StepLog,
    checkpoints: Path | None = None,
) -> tuple[StudentEngine, StepPlan]:
    """Run one stage to its end; the caller takes what it wants from the engine and closes it."""
    name, stage = resolved.name, resolved.stage
    schedule = plan(len(inputs.corpus.examples), stage, rank(), world(), resolved.seed, resolved.address)
    with StepBatches(inputs.corpus.batches, schedule) as batches:
        engine = build_engine(context, resolved, inputs, schedule)
        with stage_progress(name, schedule.steps, enabled=rank() == 0) as bar:

            def logged(step: int, metrics: dict[str, float]) -> None:
                log(name, step, metrics)  # before it is shown: what was seen is on disk
                bar.update(step, metrics["loss"], metrics["rows_per_second"])
                due = stage.checkpoint_every is not None and step % stage.checkpoint_every == 0
                if checkpoints is not None and (due or step == schedule.steps):
                    engine.save_checkpoint(checkpoints, step)

            train(engine, batches, logged)
    return engine, schedule


def build_engine(
    context: RunContext, resolved: ResolvedStage, inputs: StageInputs, schedule: StepPlan
) -> StudentEngine:
    """Student and losses of a stage, ready for its first step."""
    recipe, stage = context.recipe, resolved.stage
    config = engine_config(recipe, stage, schedule.micro_batch, schedule.accumulation)
    module = model_adapter = None
    if inputs.student is not None:
        assert inputs.student_folder is not None
        module = load_model(inputs.student_folder, recipe.precision, config, context.device)
        model_adapter = context.registry.model_adapters[module.config.model_type]
        if inputs.student.lora is not None:
            module = add_lora(module, model_adapter, inputs.student.lora, resolved.seed, resolved.address)
        if recipe.student.gradient_checkpointing and inputs.student.name == "student":
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pair, entries = models_of(context, resolved.losses, inputs)
    terms = build_losses(context, resolved.losses, pair, inputs.artifacts, resolved.seed)
    heads: dict[Role, Head] = {} if inputs.teacher is None else {"teacher": inputs.teacher.head}
    if module is not None and model_adapter is not None:
        heads["student"] = model_adapter.head(module)
    heads = {name: replace(head, entries=entries) for name, head in heads.items()}
    start_losses(context, terms, inputs, schedule.micro_batch, heads)
    distiller = build_distiller(module, model_adapter, heads.get("student"), terms, stage.balance)
    entries_of = resolved.losses.entries
    head = heads.get("teacher")
    return StudentEngine(distiller, inputs.teacher, head, stage, entries_of, schedule.steps, config, context.device)


def train(
    engine: StudentEngine,
    batches: Iterable[Sequence[Batch]],
    logged: Callable[[int, dict[str, float]], None],
    start: int = 0,
) -> None:
    """One optimizer step for each of `batches`, from `start` on; `logged` gets each one's metrics, counted from 1."""
    began = time.perf_counter()
    for number, own in enumerate(batches, start):
        counted = with_global_counts(own, engine.device)
        metrics = engine.step(counted, number)
        seconds = time.perf_counter() - began
        rows = counted[0].counts["tokens"] or counted[0].counts["teacher_tokens"]
        logged(
            number + 1,
            metrics | {"rows": rows, "rows_per_second": rows / seconds, "memory_gb": memory_gb(engine.device)},
        )
        began = time.perf_counter()


def measure(engine: StudentEngine, plan: Iterable[Sequence[int]], batches: MicroBatches) -> dict[str, float]:
    """Terms and watched values over this rank's micro-batches, without training."""
    return engine.measure(with_global_counts([batches[indices] for indices in plan], engine.device))


def with_global_counts(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    """Every micro-batch with the denominators of all of them, over all ranks, before any forward pass."""
    local = [batch.local_counts() for batch in batches]
    totals = {per: torch.tensor(sum(counts[per] for counts in local), dtype=torch.float64) for per in local[0]}
    counts = cast(dict[Reduction, float], summed(cast(dict[str, torch.Tensor], totals), device))
    return [replace(batch, counts=counts) for batch in batches]


def memory_gb(device: torch.device) -> float:
    """What this rank holds now (CPU), or held at most (GPU), in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
