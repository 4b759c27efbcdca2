"""What all stages of a run share: models as folders, tokenizers, plugins, data; made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kdzoo.adapters import add_lora
from kdzoo.data.alignments import cached_alignments
from kdzoo.data.collate import Align, Example, build_examples, collate
from kdzoo.data.encode import Encoder
from kdzoo.data.rows import Row, load_rows
from kdzoo.data.tokenizer import load_tokenizer, same_tokens, tokens_fingerprint
from kdzoo.engine.config import check_zero
from kdzoo.engine.distributed import rank_0_first
from kdzoo.engine.frozen import model_facts
from kdzoo.engine.loading import DTYPES
from kdzoo.errors import ModelError, RecipeError
from kdzoo.evaluate.generation import require_positions
from kdzoo.models.source import LocalModel, resolve_model
from kdzoo.plugin.contracts import Aligner, Fusion, ModelFacts, Models, Needs
from kdzoo.plugin.registry import Registry
from kdzoo.recipe.model import Lora, LossSlot, Recipe, Source
from kdzoo.run.loop import Collate
from kdzoo.step.vocabulary import Slot

Artefacts = Mapping[str, Mapping[str, torch.Tensor]]
"""Artefact stage -> the state of the module it has trained."""


class Weights(NamedTuple):
    """Where the weights of a model are: its folder, and that of an adapter which stays beside them."""

    folder: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Party:
    """One model of the run: where its weights and its tokenizer are."""

    model: LocalModel
    encoder: Encoder
    lora: Lora | None
    """The adapters that are trained in place of its weights."""

    @property
    def pad_id(self) -> int:
        return int(self.encoder.tokenizer.pad_token_id)


@dataclass
class Session:
    """The run's fixed ground."""

    recipe: Recipe
    registry: Registry
    device: torch.device
    teacher: Party
    student: Party
    same_tokens: bool
    aligner: Aligner
    fusions: Mapping[str, Fusion]
    """The recipe's; none where the teacher is no mixture of experts."""

    def place_student(self, teacher_folder: Path) -> None:
        """A student that is cut from its teacher is cut from the trained one."""
        if self.recipe.student.layers is not None:
            with rank_0_first():
                model = resolve_model(
                    self.recipe.student,
                    "student",
                    teacher_folder=teacher_folder,
                    anatomies=self.registry.anatomies,
                    address="student",
                )
            self.student = replace(self.student, model=model)

    def slots(
        self,
        losses: Mapping[str, LossSlot],
        models: Models,
        artefacts: Mapping[str, Artefacts],
        seed: int,
    ) -> list[Slot]:
        """The losses of a stage with their artefacts by slot, initialised from `seed` (the same on every rank)."""
        torch.manual_seed(seed)
        slots = []
        for name, slot in losses.items():
            loss = self.registry.losses[slot.use]
            params = loss.Params.model_validate(slot.params)
            needs = loss.needs(params, models.same_tokens)
            made = loss(params, models, artefacts.get(name, {})).to(DTYPES[self.recipe.precision])
            slots.append(Slot(name, made, needs, *self.state_and_judge(slot.fuse)))
        return slots

    def state_and_judge(self, fuse: str | None) -> tuple[str, str]:
        """The teacher's sites that a loss reads as its last state, and as its prediction."""
        if fuse is None or fuse not in self.fusions:
            return "hidden.last", "hidden.last"
        state = f"fused.{fuse}"
        return state, state if self.fusions[fuse].params.judge == "fused" else "hidden.last"

    def needs(self, losses: Mapping[str, LossSlot]) -> dict[str, Needs]:
        return {
            name: (loss := self.registry.losses[slot.use]).needs(
                loss.Params.model_validate(slot.params), self.same_tokens
            )
            for name, slot in losses.items()
        }


def open_session(recipe: Recipe, registry: Registry, device: torch.device) -> Session:
    """Find or build both models' folders and load their tokenizers; everything that can be wrong with them is told."""
    check_zero(recipe)
    with rank_0_first():
        teacher = resolve_model(
            recipe.teacher, "teacher", teacher_folder=None, anatomies=registry.anatomies, address="teacher"
        )
        student = resolve_model(
            recipe.student,
            "student",
            teacher_folder=teacher.folder,
            anatomies=registry.anatomies,
            address="student",
        )
    parties = {
        name: Party(model, Encoder(load_tokenizer(model.tokenizer, f"{name}.tokenizer"), recipe.data), lora)
        for name, model, lora in (
            ("teacher", teacher, recipe.teacher.lora),
            ("student", student, recipe.student.lora),
        )
    }
    aligner = registry.aligners[recipe.align.use]
    session = Session(
        recipe,
        registry,
        device,
        parties["teacher"],
        parties["student"],
        same_tokens(parties["teacher"].encoder.tokenizer, parties["student"].encoder.tokenizer),
        aligner(aligner.Params.model_validate(recipe.align.params)),
        open_fusions(recipe, registry, teacher.folder),
    )
    check_tokenizers(session, recipe.losses)
    for name, party in parties.items():
        config = AutoConfig.from_pretrained(party.model.folder)
        if config.model_type not in registry.anatomies:
            raise ModelError(
                f"{name}: no installed anatomy knows the family '{config.model_type}'; known are "
                f"{', '.join(sorted(registry.anatomies))}; a plugin can add one"
            )
        if party.lora is not None:
            check_lora(config, party.lora, registry, f"{name}.lora")
        if recipe.evaluation.sets:
            require_positions(config, recipe.data.max_prompt_length, recipe.evaluation.max_new_tokens)
    return session


def check_lora(config: PreTrainedConfig, lora: Lora, registry: Registry, address: str) -> None:
    """Refuse targets that the model does not have, before anything is trained."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    add_lora(model, registry.anatomies[config.model_type], lora, 0, address)


def experts(session: Session) -> int:
    """How many experts a block of the teacher has; 0 where it is no mixture."""
    config = AutoConfig.from_pretrained(session.teacher.model.folder)
    return session.registry.anatomies[config.model_type].experts(config)


def open_fusions(recipe: Recipe, registry: Registry, teacher: Path) -> dict[str, Fusion]:
    """The recipe's fusions, each on a block that has experts; none for a dense teacher."""
    config = AutoConfig.from_pretrained(teacher)
    anatomy = registry.anatomies.get(config.model_type)
    if anatomy is None or not anatomy.experts(config) or not recipe.fuse:
        return {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    fusions = {}
    for name, plugged in recipe.fuse.items():
        fusion = registry.fusions[plugged.use]
        made = fusion(fusion.Params.model_validate(plugged.params))
        layer, count = made.params.layer, len(anatomy.blocks(model))
        if not -count <= layer < count:
            raise RecipeError(f"fuse.{name}.params.layer: the teacher has {count} blocks, counted from 0, not {layer}")
        if anatomy.mixture(model, layer % count) is None:
            raise RecipeError(f"fuse.{name}.params.layer: block {layer} of the teacher has no experts; name another")
        fusions[name] = made
    return fusions


def check_tokenizers(session: Session, losses: Mapping[str, LossSlot]) -> None:
    """Refuse a loss for one tokenizer where the pair has two."""
    for name, needs in session.needs(losses).items():
        if needs.tokenizers == "same" and not session.same_tokens:
            ours, theirs = (
                source.tokenizer or source.name or "its own"
                for source in (session.recipe.student, session.recipe.teacher)
            )
            raise RecipeError(
                f"losses.{name}: '{losses[name].use}' compares two models token by token and needs one tokenizer, "
                f"but the student has '{ours}' and the teacher '{theirs}'; take a pair with one, or another loss"
            )


@dataclass(frozen=True)
class Corpus:
    """Rows of one source, tokenised for the models of a stage."""

    rows: Sequence[Row]
    examples: Sequence[Example]
    fingerprint: str
    collate: Collate


def corpus(
    session: Session,
    source: Source,
    address: str,
    *,
    student: Party | None,
    teacher: Party | None,
    rows: str = "response",
) -> Corpus:
    """`student` and `teacher` are the parties whose tokens are wanted."""
    found = load_rows(source, address)
    fingerprint = rows_fingerprint(found)
    same = session.same_tokens and student is not None and teacher is not None
    examples = build_examples(
        found,
        None if student is None else student.encoder,
        None if teacher is None else teacher.encoder,
        None if student is None or teacher is None else aligner_of(session, fingerprint, student, teacher),
        same,
        address,
    )
    batch = partial(
        collate,
        same_tokens=same,
        rows=rows,  # type: ignore[arg-type]
        pad_id_student=None if student is None else student.pad_id,
        pad_id_teacher=None if teacher is None else teacher.pad_id,
    )
    return Corpus(found, examples, fingerprint, lambda indices: batch([examples[i] for i in indices]))


def aligner_of(session: Session, rows: str, student: Party, teacher: Party) -> Align:
    """The recipe's aligner, of these rows; what it has found before is read from the cache."""
    used = session.recipe.align
    code = [file.read_bytes() for file in session.registry.providers["aligner", used.use].code()]
    made_from = {
        "rows": rows,
        "encoding": encoding_key(session, student, teacher),
        "aligner": used.use,
        "params": session.aligner.params.model_dump(),
        "code": [hashlib.sha256(content).hexdigest() for content in code],
    }
    return partial(cached_alignments, session.aligner, made_from)


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """A hash of what the rows say."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.instruction, row.input, row.references], ensure_ascii=False).encode())
    return digest.hexdigest()[:20]


def encoding_key(session: Session, *parties: Party) -> dict[str, Any]:
    """What decides how rows become tokens."""
    data = session.recipe.data
    return {
        "template": data.template.model_dump(),
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "tokenizers": [tokens_fingerprint(party.encoder.tokenizer) for party in parties],
    }


def sizes(folder: Path, session: Session) -> ModelFacts:
    """Sizes of the model in `folder`, from its configuration alone."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model_facts(model, session.registry.anatomies[config.model_type])


def shared_entries(session: Session, student: int, teacher: int) -> int | None:
    """How many entries of two heads count, where one tokenizer has heads of two sizes: those that it has itself.

    The others are padding, which each family's checkpoints fill up to a size of their own. None: all.
    """
    if not session.same_tokens or student == teacher:
        return None
    return min(student, teacher, len(session.teacher.encoder.tokenizer))
