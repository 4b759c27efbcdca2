"""A recipe, resolved once at the start of a run: the losses, needs and rows of every stage, handed on from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdzoo.api.models import AbsentModel, ModelPair
from kdzoo.data.mixing import taken
from kdzoo.errors import RecipeError
from kdzoo.recipe.model import Answers, LossSlot, Recipe, Stage
from kdzoo.run.context import RunContext
from kdzoo.run.inputs import SourceRows, read_source
from kdzoo.run.losses import ResolvedLosses, check_tokenizers, resolve_losses

ALONE = ("teacher", "sft")
"""Stages that train one model on data alone."""


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with its losses and its rows."""

    name: str
    stage: Stage
    losses: ResolvedLosses
    source: SourceRows
    seed: int
    """Its own, else the recipe's."""

    @property
    def address(self) -> str:
        return f"stages.{self.name}"


@dataclass(frozen=True)
class ResolvedRecipe:
    """All stages of a run, and the rows that no stage trains on."""

    distill: ResolvedStage
    alone: Mapping[str, ResolvedStage]
    """`teacher` and `sft`, where the recipe has them."""
    artifacts: Mapping[str, Mapping[str, ResolvedStage]]
    """Term of `distill` that needs some -> artifact stage -> the stage, with the term's own parameters and fusion."""
    answers: Answers | None
    """How the teacher answers rows of `distill`, where the recipe asks for it."""
    held_out: SourceRows | None
    sets: Mapping[str, SourceRows]
    """The evaluation sets."""


def resolve_recipe(context: RunContext) -> ResolvedRecipe:
    """Raises RecipeError and DataError: whatever is wrong with losses and rows shows before anything is trained."""
    recipe = context.recipe
    models = context.models
    distill = resolve_losses(context, recipe.losses, models, "losses")
    check_tokenizers(context, distill)
    _check_answers_are_there(recipe, distill)
    alone = {name: _losses_alone(context, name, recipe.stages[name]) for name in ALONE if name in recipe.stages}
    artifacts = {
        term.name: {
            name: resolve_losses(
                context,
                {name: _artifact_entry(context, name, insists, term.entry.fuse)},
                ModelPair(AbsentModel("student"), models.teacher, models.same_tokens),
                "stages",
            )
            for name, insists in term.needs.artifacts.items()
        }
        for term in distill
        if term.needs.artifacts
    }
    sets = {name: read_source(source, f"evaluation.sets.{name}") for name, source in recipe.evaluation.sets.items()}
    sources = _sources(context, {"distill": distill, **alone})
    if recipe.stages.answers is not None:
        _check_share(recipe.stages.answers, sources["distill"])
        _check_columns(sources["distill"])
    held_out = None if recipe.data.held_out is None else read_source(recipe.data.held_out, "data.held_out")

    def stage(name: str, losses: ResolvedLosses) -> ResolvedStage:
        found = recipe.stages[name]
        seed = recipe.seed if found.seed is None else found.seed
        return ResolvedStage(name, found, losses, sources[name], seed)

    return ResolvedRecipe(
        distill=stage("distill", distill),
        alone={name: stage(name, losses) for name, losses in alone.items()},
        artifacts={
            term: {name: stage(name, losses) for name, losses in by_stage.items()}
            for term, by_stage in artifacts.items()
        },
        answers=recipe.stages.answers,
        held_out=held_out,
        sets=sets,
    )


def _check_answers_are_there(recipe: Recipe, losses: ResolvedLosses) -> None:
    for term in losses:
        if term.needs.answers and recipe.stages.answers is None:
            raise RecipeError(
                f"losses.{term.name}: '{term.entry.use}' learns from the teacher's answers, and no stage generates "
                "them; add 'stages.answers', or take another loss"
            )


def _check_share(answers: Answers, source: SourceRows) -> None:
    if not taken(len(source.rows), answers.share):
        raise RecipeError(
            f"stages.answers.share: {answers.share:g} of {len(source.rows)} rows is none, so that nobody uses an "
            "answer; raise it, or remove the stage"
        )


def _check_columns(source: SourceRows) -> None:
    """An answer has other tokens than the response that a row's numbers are of."""
    lists = {name for row in source.rows for name, value in row.columns.items() if isinstance(value, tuple)}
    for name in sorted(lists):
        raise RecipeError(
            f"{source.address}: field '{name}' has a number for each token of a response, which 'stages.answers' "
            "replaces; give one number for each row"
        )


def _sources(context: RunContext, losses: Mapping[str, ResolvedLosses]) -> dict[str, SourceRows]:
    """The rows of every stage, with the columns that its losses read: its own, else those of `data.train`, which are
    read once."""
    recipe = context.recipe
    columns = {name: losses[name].columns if name in losses else () for name, _ in recipe.stages.items()}
    own = {
        name: read_source(stage.data, f"stages.{name}.data", columns[name])
        for name, stage in recipe.stages.items()
        if stage.data is not None
    }
    others = [name for name, _ in recipe.stages.items() if name not in own]
    if not others:
        return own
    wanted = tuple(sorted({column for name in others for column in columns[name]}))
    return own | dict.fromkeys(others, read_source(recipe.data.train, "data.train", wanted))


def _losses_alone(context: RunContext, name: str, stage: Stage) -> ResolvedLosses:
    """The terms of a stage that trains one model alone; one that reads a teacher is refused."""
    if not stage.losses:
        raise RecipeError(f"stages.{name}: has no 'losses'; say what it trains on")
    model = context.models.of("teacher" if name == "teacher" else "student")
    pair = ModelPair(model, AbsentModel("teacher"), context.same_tokens)
    losses = resolve_losses(context, stage.losses, pair, f"stages.{name}.losses")
    for term in losses:
        if term.weights is not None and term.weights.needs.reads_teacher:
            raise RecipeError(
                f"stages.{name}.losses.{term.name}.weights: '{term.weights.entry.use}' reads a teacher, and there is "
                "none here; take other weights"
            )
        if term.reads_teacher:
            raise RecipeError(
                f"stages.{name}.losses.{term.name}: '{term.entry.use}' reads a teacher; there is none here"
            )
        if term.needs.answers:
            raise RecipeError(
                f"stages.{name}.losses.{term.name}: '{term.entry.use}' learns from the teacher's answers, which only "
                "rows of 'distill' have; take another loss"
            )
    return losses


def _artifact_entry(context: RunContext, name: str, insists: Mapping[str, object], fuse: str | None) -> LossSlot:
    """What an artifact stage trains: its plugin, with the parameters that a loss insists on before its own."""
    stage = context.recipe.stages.get(name)
    if stage is None or stage.use is None:
        raise RecipeError(
            f"stages.{name}: a loss needs this stage's module, and the recipe has no such stage; add it, or take the "
            "loss away"
        )
    fuse = fuse if fuse in context.fusions else None
    return LossSlot(use=stage.use, params={**stage.params, **insists}, fuse=fuse)
