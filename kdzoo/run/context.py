"""What all stages of a run share: models as folders, tokenizers, plugins; made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kdzoo.api.aligner import Aligner
from kdzoo.api.fusion import Fusion
from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.api.models import ModelInfo, ModelPair
from kdzoo.data.encode import Encoder
from kdzoo.data.tokenizer import load_tokenizer, same_tokens
from kdzoo.engine.config import check_zero, frozen_config, generating_config
from kdzoo.engine.distributed import rank_0_first, world
from kdzoo.engine.frozen import FrozenModel, model_info
from kdzoo.errors import ModelError, RecipeError
from kdzoo.evaluate.answers import Candidates
from kdzoo.evaluate.generation import require_positions
from kdzoo.lora import add_lora
from kdzoo.models.source import LocalModel, resolve_model
from kdzoo.plugin.registry import Registry
from kdzoo.recipe.model import Lora, Recipe


class Weights(NamedTuple):
    """Where the weights of a model are: its folder, and that of an adapter that is not merged into them."""

    folder: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class ModelRole:
    """A model in its role: where its weights and its tokenizer are."""

    name: Literal["teacher", "student"]
    model: LocalModel
    encoder: Encoder
    lora: Lora | None
    """The adapters that are trained in place of its weights."""

    @property
    def pad_id(self) -> int:
        return int(self.encoder.tokenizer.pad_token_id)


@dataclass(frozen=True)
class RunContext:
    """What does not change while a run goes on."""

    recipe: Recipe
    registry: Registry
    device: torch.device
    teacher: ModelRole
    student: ModelRole
    models: ModelPair
    """Their sizes, from their configurations."""
    aligner: Aligner
    fusions: Mapping[str, Fusion]
    """The recipe's; none where the teacher is no mixture of experts."""

    @property
    def same_tokens(self) -> bool:
        """Whether both tokenizers are one."""
        return self.models.same_tokens

    def with_teacher_in(self, folder: Path) -> RunContext:
        """The same once the teacher has been trained into `folder`: a student that is cut from it is cut anew."""
        if self.recipe.student.layers is None:
            return self
        with rank_0_first():
            model = resolve_model(
                self.recipe.student,
                "student",
                teacher_folder=folder,
                model_adapters=self.registry.model_adapters,
                address="student",
            )
        return replace(self, student=replace(self.student, model=model))


def open_context(recipe: Recipe, registry: Registry, device: torch.device) -> RunContext:
    """Find or make both models' folders and load their tokenizers. Raises KdzooError for what is wrong with them."""
    check_zero(recipe)
    with rank_0_first():
        teacher = resolve_model(
            recipe.teacher, "teacher", teacher_folder=None, model_adapters=registry.model_adapters, address="teacher"
        )
        student = resolve_model(
            recipe.student,
            "student",
            teacher_folder=teacher.folder,
            model_adapters=registry.model_adapters,
            address="student",
        )
    teacher_role = ModelRole("teacher", teacher, _encoder(recipe, teacher, "teacher"), recipe.teacher.lora)
    student_role = ModelRole("student", student, _encoder(recipe, student, "student"), recipe.student.lora)
    if recipe.stages.answers is not None:
        wanted = Candidates.of(recipe.stages.answers, recipe.evaluation)
        config = AutoConfig.from_pretrained(teacher.folder)
        address = "stages.answers.max_new_tokens"
        require_positions(config, recipe.data.max_prompt_length, wanted.max_new_tokens, address)
    for role in (teacher_role, student_role):
        config = AutoConfig.from_pretrained(role.model.folder)
        if config.model_type not in registry.model_adapters:
            raise ModelError(
                f"{role.name}: no installed model adapter knows the family '{config.model_type}'; known are "
                f"{', '.join(sorted(registry.model_adapters))}; a plugin can add one"
            )
        if role.lora is not None:
            check_lora(config, role.lora, registry, f"{role.name}.lora")
        if recipe.evaluation.sets:
            require_positions(config, recipe.data.max_prompt_length, recipe.evaluation.max_new_tokens)
    aligner = registry.of(Aligner)[recipe.align.use]
    return RunContext(
        recipe,
        registry,
        device,
        teacher_role,
        student_role,
        ModelPair(
            sizes(student.folder, registry.model_adapters),
            sizes(teacher.folder, registry.model_adapters),
            same_tokens(teacher_role.encoder.tokenizer, student_role.encoder.tokenizer),
        ),
        aligner(aligner.Params.model_validate(recipe.align.params)),
        open_fusions(recipe, registry, teacher.folder),
    )


def _encoder(recipe: Recipe, model: LocalModel, role: str) -> Encoder:
    return Encoder(load_tokenizer(model.tokenizer, f"{role}.tokenizer"), recipe.data)


def check_lora(config: PreTrainedConfig, lora: Lora, registry: Registry, address: str) -> None:
    """Refuse targets that the model does not have, before anything is trained."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    add_lora(model, registry.model_adapters[config.model_type], lora, 0, address)


def experts(context: RunContext) -> int:
    """How many experts a block of the teacher has; 0 where it is no mixture."""
    config = AutoConfig.from_pretrained(context.teacher.model.folder)
    return context.registry.model_adapters[config.model_type].experts(config)


def open_fusions(recipe: Recipe, registry: Registry, teacher: Path) -> dict[str, Fusion]:
    """The recipe's fusions, each on a block that has experts; none for a dense teacher."""
    config = AutoConfig.from_pretrained(teacher)
    model_adapter = registry.model_adapters.get(config.model_type)
    if model_adapter is None or not model_adapter.experts(config) or not recipe.fuse:
        return {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    fusions = {}
    for name, plugged in recipe.fuse.items():
        fusion = registry.of(Fusion)[plugged.use]
        made = fusion(fusion.Params.model_validate(plugged.params))
        layer, count = made.params.layer, len(model_adapter.blocks(model))
        if not -count <= layer < count:
            raise RecipeError(f"fuse.{name}.params.layer: the teacher has {count} blocks, counted from 0, not {layer}")
        if model_adapter.mixture(model, layer % count) is None:
            raise RecipeError(f"fuse.{name}.params.layer: block {layer} of the teacher has no experts; name another")
        fusions[name] = made
    return fusions


def sizes(folder: Path, model_adapters: Mapping[str, ModelAdapter]) -> ModelInfo:
    """Sizes of the model in `folder`, from its configuration alone."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model_info(model, model_adapters[config.model_type])


def shared_entries(context: RunContext, student: int, teacher: int) -> int | None:
    """How many entries of two heads count, where one tokenizer has heads of two sizes: those that it has itself.

    The others are padding, which each family's checkpoints fill up to a size of their own. None: all.
    """
    if not context.same_tokens or student == teacher:
        return None
    return min(student, teacher, len(context.teacher.encoder.tokenizer))


def open_frozen(context: RunContext, weights: Weights, always_sharded: bool) -> FrozenModel:
    """A model that only runs, sharded as `distill` is; not `always_sharded`: one that may also generate. On a single
    rank that one is read without sharding, where it is whole anyway."""
    config = frozen_config(context.recipe, context.recipe.stages["distill"])
    if not always_sharded:
        config = {**config, "zero_optimization": {"stage": 0}} if world() == 1 else generating_config(config)
    return FrozenModel(
        weights.folder,
        context.registry.model_adapters,
        context.recipe.precision,
        config,
        context.device,
        context.fusions,
        weights.adapter,
    )
