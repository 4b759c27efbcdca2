"""The stages of a run: each is the one loop with its own models, losses and rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import kdzoo
from kdzoo.adapters import add_lora
from kdzoo.cache import cached_folder, cached_path
from kdzoo.data.schedule import StepPlan, plan
from kdzoo.data.tokenizer import lexicon, student_ids
from kdzoo.engine.close import release
from kdzoo.engine.config import engine_config, frozen_config
from kdzoo.engine.distributed import added_up, barrier, from_rank_0, rank, world
from kdzoo.engine.frozen import FrozenModel, gather
from kdzoo.engine.loading import load_model
from kdzoo.engine.student import StudentEngine, build_distiller
from kdzoo.errors import RecipeError
from kdzoo.plugin.contracts import ModelFacts, Models
from kdzoo.recipe.model import LossSlot, Stage
from kdzoo.run.export import save_trained
from kdzoo.run.loop import measure, train
from kdzoo.run.progress import say, stage_progress
from kdzoo.run.session import (
    Artefacts,
    Corpus,
    Party,
    Session,
    Weights,
    corpus,
    encoding_key,
    shared_entries,
    sizes,
)
from kdzoo.step.distiller import prepare, set_up, survey, teacher_sites
from kdzoo.step.head import Head
from kdzoo.step.vocabulary import Slot

StepLog = Callable[[str, int, dict[str, float]], None]
"""(stage, step, metrics) of every optimizer step."""


LOOKED_AT = 256
"""Training rows, at most, that a trained artefact or the teacher is measured on."""

SURVEYED = 1024
"""Training rows, at most, that a loss surveys before its first step."""


@dataclass
class Ground:
    """What a stage stands on: whose student side, which teacher, which rows."""

    student: Party | None
    student_folder: Path | None
    teacher: FrozenModel | None
    rows: Corpus
    artefacts: Mapping[str, Artefacts]
    """By slot."""


def train_stage(
    session: Session,
    name: str,
    stage: Stage,
    losses: Mapping[str, LossSlot],
    ground: Ground,
    log: StepLog,
    checkpoints: Path | None = None,
) -> tuple[StudentEngine, StepPlan]:
    """Run one stage to its end; the caller takes what it wants from the engine and closes it."""
    recipe = session.recipe
    address = f"stages.{name}"
    seed = recipe.seed if stage.seed is None else stage.seed
    schedule = plan(len(ground.rows.examples), stage, rank(), world(), seed, address)
    config = engine_config(recipe, stage, schedule.micro_batch, schedule.accumulation)
    module = anatomy = None
    if ground.student is not None:
        assert ground.student_folder is not None
        module = load_model(ground.student_folder, recipe.precision, config, session.device)
        anatomy = session.registry.anatomies[module.config.model_type]
        if ground.student.lora is not None:
            module = add_lora(module, anatomy, ground.student.lora, seed, address)
        if recipe.student.gradient_checkpointing and ground.student is session.student:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    models, entries = models_of(ground, losses, session)
    slots = session.slots(losses, models, ground.artefacts, seed)
    survey_rows(slots, ground, schedule, session)
    heads: dict[str, Head] = {} if ground.teacher is None else {"teacher": ground.teacher.head}
    if module is not None and anatomy is not None:
        heads["student"] = anatomy.head(module)
    set_up(slots, {name: replace(head, entries=entries) for name, head in heads.items()}, gather)
    distiller = build_distiller(module, anatomy, slots, entries)
    engine = StudentEngine(distiller, ground.teacher, stage, losses, schedule.steps, config, session.device)
    with stage_progress(name, schedule.steps, enabled=rank() == 0) as bar:

        def logged(step: int, metrics: dict[str, float]) -> None:
            log(name, step, metrics)  # before it is shown: what was seen is on disk
            bar.update(step, metrics["loss"], metrics["rows_per_second"])
            due = stage.checkpoint_every is not None and step % stage.checkpoint_every == 0
            if checkpoints is not None and (due or step == schedule.steps):
                engine.save_checkpoint(checkpoints, step)

        train(engine, schedule, ground.rows.collate, logged)
    return engine, schedule


def models_of(ground: Ground, losses: Mapping[str, LossSlot], session: Session) -> tuple[Models, int | None]:
    """What losses may know of the models of a stage; and how many entries of both heads count, if not all do."""
    told = any(needs.lexicons for needs in session.needs(losses).values())
    teacher = None if ground.teacher is None else _told(ground.teacher.facts, session.teacher, told)
    if ground.student_folder is None:
        return Models(teacher, None, session.same_tokens), None
    assert ground.student is not None
    student = _told(sizes(ground.student_folder, session), ground.student, told)
    if teacher is None:
        return Models(None, student, session.same_tokens), None
    entries = shared_entries(session, student.vocabulary, teacher.vocabulary)
    if entries is not None:
        student, teacher = replace(student, vocabulary=entries), replace(teacher, vocabulary=entries)
    tokenizers = ground.student.encoder.tokenizer, session.teacher.encoder.tokenizer
    partners = student_ids(*tokenizers, (student.vocabulary, teacher.vocabulary))
    return Models(teacher, student, session.same_tokens, partners), entries


def _told(facts: ModelFacts, party: Party, lexicons: bool) -> ModelFacts:
    """The same, and what the model's vocabulary says, if anybody asks."""
    return replace(facts, lexicon=lexicon(party.encoder.tokenizer)) if lexicons else facts


def survey_rows(slots: Sequence[Slot], ground: Ground, schedule: StepPlan, session: Session) -> None:
    """Show the first training rows to the losses that ask for it, before anything is sharded or trained."""
    if not any(slot.needs.survey for slot in slots):
        return
    assert ground.teacher is not None
    totals: dict[tuple[str, str], Tensor] = {}
    for indices in deal(min(SURVEYED, len(ground.rows.examples)), schedule.micro_batch):
        batch = ground.rows.collate(indices).to(session.device)
        assert batch.teacher is not None
        for key, value in survey(slots, batch, ground.teacher.sites(batch.teacher, teacher_sites(slots))).items():
            totals[key] = totals[key] + value if key in totals else value
    prepare(slots, added_up(totals, session.device))


def stage_losses(session: Session, name: str, stage: Stage) -> dict[str, LossSlot]:
    """The terms of a stage that trains one model alone; one that reads a teacher is refused."""
    if not stage.losses:
        raise RecipeError(f"stages.{name}: has no 'losses'; say what it trains on")
    for slot_name, needs in session.needs(stage.losses).items():
        reads = needs.teacher or needs.facts or any("teacher" in v.streams or v.facts for v in needs.visits)
        if reads:
            raise RecipeError(
                f"stages.{name}.losses.{slot_name}: '{stage.losses[slot_name].use}' reads a teacher; there is none here"
            )
    return dict(stage.losses)


def single_model(session: Session, name: str, stage: Stage, party: Party, folder: Path, log: StepLog) -> Path:
    """One model trained on data alone (`teacher`, `sft`): its folder, from the cache if it is there."""
    losses = stage_losses(session, name, stage)
    source = stage.data or session.recipe.data.train
    rows = corpus(session, source, f"stages.{name}.data" if stage.data else "data.train", student=party, teacher=None)
    content = {
        "model": party.model.fingerprint,
        "rows": rows.fingerprint,
        **common_key(session, stage, losses, party),
    }
    if party.lora is not None:
        content["lora"] = party.lora.model_dump(mode="json", exclude={"export"})
    target = cached_path(name, content)
    if from_rank_0(target.exists()):
        say(f"{name}: trained before, found in the cache ({target})", enabled=rank() == 0)
        return target
    engine, _ = train_stage(session, name, stage, losses, Ground(party, folder, None, rows, {}), log)
    state = engine.state("student.", trained_only=party.lora is not None)
    if rank() == 0:
        cached_folder(name, content, lambda out: save_trained(out, folder, party, state))
    engine.close()
    del engine
    release()
    barrier()
    return target


@dataclass(frozen=True)
class Artefact:
    """What a stage that runs the teacher alone has made."""

    state: Mapping[str, Tensor]
    report: Mapping[str, Mapping[str, float]]
    """"train", "held_out" -> terms and watched values after training."""


def artefact_stage(session: Session, name: str) -> tuple[Stage, str]:
    """The stage that makes an artefact, and the plugin that it trains; one that a loss needs must be there."""
    stage = session.recipe.stages.get(name)
    if stage is None or stage.use is None:
        raise RecipeError(
            f"stages.{name}: a loss needs this stage's module, and the recipe has no such stage; add it, or take the "
            "loss away"
        )
    return stage, stage.use


def make_artefact(
    session: Session,
    name: str,
    insists: Mapping[str, Any],
    fuse: str | None,
    teacher: FrozenModel,
    teacher_key: str,
    log: StepLog,
) -> Artefact:
    """The trained module of an artefact stage, from the cache if it is there.

    `insists`: the parameters that a loss fixes; they go before the stage's own. `fuse`: the fusion whose states it is
    trained on, which is the loss's.
    """
    stage, use = artefact_stage(session, name)
    fuse = fuse if fuse in session.fusions else None
    losses = {name: LossSlot(use=use, params={**stage.params, **insists}, fuse=fuse)}
    needs = session.needs(losses)[name]
    address = f"stages.{name}.data" if stage.data else "data.train"
    source = stage.data or session.recipe.data.train
    rows = corpus(session, source, address, student=None, teacher=session.teacher, rows=needs.rows)
    content = {"teacher": teacher_key, "rows": rows.fingerprint, **common_key(session, stage, losses, session.teacher)}
    if fuse is not None:
        content["fusion"] = session.recipe.fuse[fuse].model_dump(mode="json")
    held_out = session.recipe.data.held_out
    if held_out is not None:
        held = corpus(session, held_out, "data.held_out", student=None, teacher=session.teacher, rows=needs.rows)
        content["held_out"] = held.fingerprint
    target = cached_path("artefacts", content)
    found = from_rank_0(target.exists())
    if not found:
        engine, schedule = train_stage(session, name, stage, losses, Ground(None, None, teacher, rows, {}), log)
        looked_at = min(LOOKED_AT, len(rows.examples), *([] if held_out is None else [len(held.examples)]))
        report = {"train": measure(engine, deal(looked_at, schedule.micro_batch), rows.collate)}
        if held_out is not None:
            report["held_out"] = measure(engine, deal(len(held.examples), schedule.micro_batch), held.collate)
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
    artefact = Artefact(load_file(target / "state.safetensors"), json.loads((target / "report.json").read_text()))
    for split, values in artefact.report.items():
        told = ", ".join(f"{key.partition('/')[2].replace('_', ' ')} {value:.3f}" for key, value in values.items())
        where = "held-out rows" if split == "held_out" else "training rows"
        say(f"{name}: on {where} {told}{' (cached)' if found else ''}", enabled=rank() == 0)
    return artefact


def deal(count: int, micro_batch: int) -> list[list[int]]:
    """The first `count` rows dealt out to this rank in micro-batches, as many on every rank."""
    stride = micro_batch * world()
    starts = range(rank() * micro_batch, -(-count // stride) * stride, stride)
    return [list(range(start, min(start + micro_batch, count))) for start in starts]


def common_key(session: Session, stage: Stage, losses: Mapping[str, LossSlot], party: Party) -> dict[str, Any]:
    """What a trained thing depends on beside its model and rows. How the work was sharded is no part of it."""
    return {
        "kdzoo": kdzoo.__version__,
        "stage": stage.model_dump(
            mode="json",
            exclude={"deepspeed", "micro_batch", "gradients_every", "checkpoint_every"}
            | {"data", "losses", "use", "params", "seed"},
        ),
        # What a fusion is called is no part of it.
        "losses": {name: slot.model_dump(mode="json", exclude={"fuse"}) for name, slot in losses.items()},
        "seed": session.recipe.seed if stage.seed is None else stage.seed,
        "precision": session.recipe.precision,
        "encoding": encoding_key(session, party),
    }


def open_frozen(session: Session, weights: Weights, always_sharded: bool) -> FrozenModel:
    """A model that only runs. Sharded as `distill` is; on a single rank, evaluation reads it plainly: it is whole there
    anyway."""
    config = frozen_config(session.recipe, session.recipe.stages["distill"])
    if not always_sharded and world() == 1:
        config = {**config, "zero_optimization": {"stage": 0}}
    return FrozenModel(
        weights.folder,
        session.registry.anatomies,
        session.recipe.precision,
        config,
        session.device,
        session.fusions,
        weights.adapter,
    )
