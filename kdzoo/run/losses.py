"""The losses of a recipe: resolved once at the start of a run, and built where a stage begins.

No other file of this room calls a loss's own methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kdzoo.api.head import Head
from kdzoo.api.loss import Loss, Needs
from kdzoo.api.models import AbsentModel, ModelInfo, ModelPair, Role
from kdzoo.api.plugin import Params
from kdzoo.data.tokenizer import student_ids, vocabulary
from kdzoo.engine.distributed import added_up
from kdzoo.engine.frozen import gather
from kdzoo.engine.loading import DTYPES
from kdzoo.errors import RecipeError
from kdzoo.recipe.model import LossSlot
from kdzoo.run.context import ModelRole, RunContext, shared_entries, sizes
from kdzoo.run.inputs import Artifacts, StageInputs, deal
from kdzoo.step.distiller import start_from_heads, start_from_statistics, statistics, teacher_sites
from kdzoo.step.loss_term import LossTerm, in_precision

STATISTICS_ROWS = 1024
"""Training rows, at most, that a loss takes statistics of before its first step."""

OWN_STATE = "hidden.last"
"""The site of the teacher's own last state, where no fusion takes its place."""


@dataclass(frozen=True)
class ResolvedLoss:
    """One term of a recipe, with its parameters validated and its needs known."""

    name: str
    """Of the term, in the recipe."""
    entry: LossSlot
    """The recipe's own words: use, params, weight, lr, fuse."""
    loss: type[Loss]
    params: Any
    """Of the loss's class `Params`."""
    needs: Needs
    fused: bool
    """Whether the teacher's last state is that of the entry's fusion. A dense teacher has nothing to fuse."""
    state: str
    """The site of the teacher that the loss reads as its last state."""
    prediction: str
    """The site of the teacher whose logits are the teacher's prediction."""

    @property
    def reads_teacher(self) -> bool:
        visits = self.loss.visits(self.params)
        return bool(self.needs.teacher or self.needs.facts or any("teacher" in visit.streams for visit in visits))


@dataclass(frozen=True)
class ResolvedLosses:
    """The terms of a stage, in the order of the recipe."""

    terms: tuple[ResolvedLoss, ...]

    def __iter__(self) -> Iterator[ResolvedLoss]:
        return iter(self.terms)

    @property
    def entries(self) -> dict[str, LossSlot]:
        """The recipe's own words, by the name of the term."""
        return {term.name: term.entry for term in self.terms}


def resolve_losses(context: RunContext, losses: Mapping[str, LossSlot]) -> ResolvedLosses:
    """The terms of a stage, by their names in the recipe."""
    return ResolvedLosses(tuple(_resolve(context, name, entry) for name, entry in losses.items()))


def valid_params(name: str, loss: type[Loss], given: Mapping[str, Any]) -> Params:
    """The parameters of a slot. The schema has seen each by itself; what does not fit together is refused here."""
    try:
        return loss.Params.model_validate(given)
    except ValidationError as error:
        fault = error.errors()[0]
        address = ".".join(map(str, ("losses", name, "params", *fault["loc"])))
        raise RecipeError(f"{address}: {fault['msg'].removeprefix('Value error, ')}") from error


def _resolve(context: RunContext, name: str, entry: LossSlot) -> ResolvedLoss:
    loss = context.registry.of(Loss)[entry.use]
    params = valid_params(name, loss, entry.params)
    fusion = None if entry.fuse is None else context.fusions.get(entry.fuse)
    state = OWN_STATE if fusion is None else f"fused.{entry.fuse}"
    return ResolvedLoss(
        name,
        entry,
        loss,
        params,
        needs=loss.needs(params, context.same_tokens),
        fused=fusion is not None,
        state=state,
        prediction=state if fusion is not None and fusion.params.judge == "fused" else OWN_STATE,
    )


def check_tokenizers(context: RunContext, losses: ResolvedLosses) -> None:
    """Refuse a loss for one tokenizer where the pair has two."""
    for term in losses:
        if term.needs.tokenizers == "same" and not context.same_tokens:
            ours, theirs = (
                source.tokenizer or source.name or "its own"
                for source in (context.recipe.student, context.recipe.teacher)
            )
            raise RecipeError(
                f"losses.{term.name}: '{term.entry.use}' compares two models token by token and needs one tokenizer, "
                f"but the student has '{ours}' and the teacher '{theirs}'; take a pair with one, or another loss"
            )


# What a stage makes of them


def build_losses(
    context: RunContext, losses: ResolvedLosses, pair: ModelPair, artifacts: Mapping[str, Artifacts], seed: int
) -> list[LossTerm]:
    """The modules of a stage's losses, initialised from `seed` (the same on every rank)."""
    torch.manual_seed(seed)
    built = []
    for term in losses:
        made = term.loss(term.params, pair, artifacts.get(term.name, {}))
        ready = in_precision(made, DTYPES[context.recipe.precision])
        built.append(LossTerm.of(term.name, ready, term.state, term.prediction))
    return built


def models_of(context: RunContext, losses: ResolvedLosses, inputs: StageInputs) -> tuple[ModelPair, int | None]:
    """What losses may know of the models of a stage; and how many entries of both heads count, if not all do."""
    asked = any(term.needs.vocabularies for term in losses)
    teacher = None if inputs.teacher is None else _described(inputs.teacher.info, context.teacher, asked)
    if inputs.student_folder is None:
        return ModelPair(AbsentModel("student"), teacher or AbsentModel("teacher"), context.same_tokens), None
    assert inputs.student is not None
    student = _described(sizes(inputs.student_folder, context), inputs.student, asked)
    if teacher is None:
        return ModelPair(student, AbsentModel("teacher"), context.same_tokens), None
    entries = shared_entries(context, student.vocab_size, teacher.vocab_size)
    if entries is not None:
        student, teacher = replace(student, vocab_size=entries), replace(teacher, vocab_size=entries)
    tokenizers = inputs.student.encoder.tokenizer, context.teacher.encoder.tokenizer
    partners = student_ids(*tokenizers, (student.vocab_size, teacher.vocab_size))
    return ModelPair(student, teacher, context.same_tokens, partners), entries


def _described(info: ModelInfo, role: ModelRole, asked: bool) -> ModelInfo:
    """The same with the texts of the model's vocabulary, where a loss needs them."""
    return replace(info, known_vocabulary=vocabulary(role.encoder.tokenizer)) if asked else info


def start_losses(
    terms: Sequence[LossTerm], inputs: StageInputs, micro_batch: int, heads: Mapping[Role, Head], device: torch.device
) -> None:
    """Show losses what they start from, before anything is sharded or trained: training rows, then the heads."""
    if any(term.loss.reads_statistics() for term in terms):
        start_from_statistics(terms, added_up(_statistics(terms, inputs, micro_batch, device), device))
    start_from_heads(terms, heads, gather)


def _statistics(
    terms: Sequence[LossTerm], inputs: StageInputs, micro_batch: int, device: torch.device
) -> dict[tuple[str, str], Tensor]:
    """Of this rank: sums over its share of the first training rows, by loss term and name."""
    assert inputs.teacher is not None
    totals: dict[tuple[str, str], Tensor] = {}
    for indices in deal(min(STATISTICS_ROWS, len(inputs.corpus.examples)), micro_batch):
        batch = inputs.corpus.batches[indices].to(device)
        assert batch.teacher is not None
        sites = inputs.teacher.sites(batch.teacher, teacher_sites(terms))
        for key, value in statistics(terms, batch, sites).items():
            totals[key] = totals[key] + value if key in totals else value
    return totals
