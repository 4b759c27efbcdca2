"""What stages train for other stages to use, kept in the cache: a model alone, or the module of a loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import kdzoo
from kdzoo.cache import cached_folder, cached_path
from kdzoo.engine.close import release
from kdzoo.engine.distributed import barrier, from_rank_0, rank
from kdzoo.engine.frozen import FrozenModel
from kdzoo.run import messages
from kdzoo.run.context import ModelRole, RunContext
from kdzoo.run.export import save_trained
from kdzoo.run.inputs import Artifacts, SourceRows, StageInputs, columns_fingerprint, deal, encoding_key, tokenise
from kdzoo.run.progress import print_message
from kdzoo.run.resolved import ResolvedRecipe, ResolvedStage
from kdzoo.run.trainer import StepLog, measure, train_stage

MEASURED = 256
"""Training rows, at most, that a trained artifact is measured on."""


def single_model(context: RunContext, resolved: ResolvedStage, role: ModelRole, folder: Path, log: StepLog) -> Path:
    """One model trained on data alone (`teacher`, `sft`), from the weights in `folder`: its own folder in the cache."""
    corpus = tokenise(context, resolved.source, student=role, teacher=None, columns=resolved.losses.columns)
    content = {
        "model": role.model.fingerprint,
        "rows": resolved.source.fingerprint,
        **common_key(context, resolved, role),
    }
    if role.lora is not None:
        content["lora"] = role.lora.model_dump(mode="json", exclude={"export"})
    target = cached_path(resolved.name, content)
    if from_rank_0(target.exists()):
        print_message(messages.found_in_cache(resolved.name, target), enabled=rank() == 0)
        return target
    engine, _ = train_stage(context, resolved, StageInputs(role, folder, None, corpus, {}), log)
    state = engine.state("student.", trained_only=role.lora is not None)
    if rank() == 0:
        cached_folder(resolved.name, content, lambda out: save_trained(out, folder, role, state))
    engine.close()
    del engine
    release()
    barrier()
    return target


@dataclass(frozen=True)
class Artifact:
    """What a stage that runs the teacher alone has made."""

    state: Mapping[str, Tensor]
    report: Mapping[str, Mapping[str, float]]
    """"train", "held_out" -> terms and watched values after training."""


def make_artifacts(
    context: RunContext, resolved: ResolvedRecipe, teacher: FrozenModel, teacher_key: str, log: StepLog
) -> dict[str, Artifacts]:
    """The trained modules that the terms of `distill` need, by term and stage."""
    return {
        term: {
            name: make_artifact(context, stage, resolved.held_out, teacher, teacher_key, log).state
            for name, stage in stages.items()
        }
        for term, stages in resolved.artifacts.items()
    }


def make_artifact(
    context: RunContext,
    resolved: ResolvedStage,
    held_out: SourceRows | None,
    teacher: FrozenModel,
    teacher_key: str,
    log: StepLog,
) -> Artifact:
    """The trained module of an artifact stage, from the cache if it is there. Its one term has the stage's name."""
    name, (term,) = resolved.name, resolved.losses
    corpus = tokenise(context, resolved.source, student=None, teacher=context.teacher, rows=term.needs.tokens)
    content = {
        "teacher": teacher_key,
        "rows": resolved.source.fingerprint,
        **common_key(context, resolved, context.teacher),
    }
    if term.entry.fuse is not None:
        content["fusion"] = context.recipe.fuse[term.entry.fuse].model_dump(mode="json")
    held = None
    if held_out is not None:
        held = tokenise(context, held_out, student=None, teacher=context.teacher, rows=term.needs.tokens)
        content["held_out"] = held_out.fingerprint
    target = cached_path("artefacts", content)
    found = from_rank_0(target.exists())
    if not found:
        engine, schedule = train_stage(context, resolved, StageInputs(None, None, teacher, corpus, {}), log)
        measured = min(MEASURED, len(corpus.examples), *([] if held is None else [len(held.examples)]))
        report = {"train": measure(engine, deal(measured, schedule.micro_batch), corpus.batches)}
        if held is not None:
            report["held_out"] = measure(engine, deal(len(held.examples), schedule.micro_batch), held.batches)
        state = engine.state(f"losses.{name}.")
        if rank() == 0:

            def build(out: Path) -> None:
                save_file(dict(state), out / "state.safetensors")
                (out / "report.json").write_text(json.dumps(report, indent=2))

            cached_folder("artefacts", content, build)
        engine.close()
        del engine
        release()
        barrier()
    artifact = Artifact(load_file(target / "state.safetensors"), json.loads((target / "report.json").read_text()))
    for split, values in artifact.report.items():
        print_message(messages.artifact_report(name, split, values, cached=found), enabled=rank() == 0)
    return artifact


def common_key(context: RunContext, resolved: ResolvedStage, role: ModelRole) -> dict[str, Any]:
    """What a trained thing depends on apart from its model and rows. How the work was sharded is no part of it."""
    weights, columns = resolved.losses.weights, resolved.losses.columns
    weighed: dict[str, Any] = {"token_weights": weights} if weights else {}
    if columns:
        weighed["columns"] = columns_fingerprint(resolved.source.rows, columns)
    if resolved.stage.balance is not None:
        weighed["balance"] = [resolved.stage.balance, resolved.stage.gradients_every]
    return weighed | {
        "kdzoo": kdzoo.__version__,
        "stage": resolved.stage.model_dump(
            mode="json",
            exclude={"deepspeed", "micro_batch", "gradients_every", "checkpoint_every"}
            | {"balance", "data", "losses", "use", "params", "seed"},
        ),
        # The names of a fusion and of token weights are no part of it.
        "losses": {
            name: entry.model_dump(mode="json", exclude={"fuse", "weights"})
            for name, entry in resolved.losses.entries.items()
        },
        "seed": resolved.seed,
        "precision": context.recipe.precision,
        "encoding": encoding_key(context, role),
    }
