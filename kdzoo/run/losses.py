"""The losses of a recipe: resolved once at the start of a run, and built where a stage begins.

No other file of this room calls a loss's own methods.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kdzoo.api.entries import EntryMap
from kdzoo.api.head import Head
from kdzoo.api.loss import Loss, Needs
from kdzoo.api.models import AbsentModel, ModelInfo, ModelPair, Role
from kdzoo.api.plugin import Params, Plugin
from kdzoo.api.token_weights import TokenNeeds, TokenWeights
from kdzoo.data.entries import entry_maps
from kdzoo.data.tokenizer import vocabulary
from kdzoo.engine.close import release
from kdzoo.engine.distributed import added_up, rank_0_first
from kdzoo.engine.frozen import FrozenModel, gather
from kdzoo.engine.loading import DTYPES
from kdzoo.errors import KdzooError, PluginError, RecipeError
from kdzoo.recipe.model import LossSlot, Plugged
from kdzoo.run.context import ModelRole, RunContext, Weights, open_frozen, shared_entries, sizes
from kdzoo.run.inputs import Artifacts, StageInputs, deal
from kdzoo.step.capture import block_of
from kdzoo.step.distiller import (
    start_from_heads,
    start_from_statistics,
    statistics,
    statistics_of,
    student_sites,
    teacher_sites,
)
from kdzoo.step.loss_term import LossTerm, in_precision

STATISTICS_ROWS = 1024
"""Training rows, at most, that a loss takes statistics of before its first step."""

OWN_STATE = "hidden.last"
"""The site of the teacher's own last state, where no fusion takes its place."""


@dataclass(frozen=True)
class ResolvedWeights:
    """What a term's tokens are weighed by."""

    name: str
    """In the recipe's `token_weights`."""
    entry: Plugged
    weights: type[TokenWeights]
    params: Any
    needs: TokenNeeds


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
    weights: ResolvedWeights | None = None

    @property
    def reads_teacher(self) -> bool:
        visits = self.loss.visits(self.params)
        seen = any("teacher" in visit.streams for visit in visits) or self.weight_needs.reads_teacher
        return bool(self.needs.teacher or self.needs.facts or seen)

    @property
    def weight_needs(self) -> TokenNeeds:
        return TokenNeeds() if self.weights is None else self.weights.needs

    @property
    def reads_alignment(self) -> bool:
        """Whether pairs or spans of two tokenizers matter to it."""
        return self.needs.aligned or self.weight_needs.reads_teacher


@dataclass(frozen=True)
class ResolvedLosses:
    """The terms of a stage, in the order of the recipe."""

    terms: tuple[ResolvedLoss, ...]

    def __iter__(self) -> Iterator[ResolvedLoss]:
        return iter(self.terms)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the rows that token weights read."""
        return tuple(sorted({column for term in self.terms for column in term.weight_needs.columns}))

    @property
    def weights(self) -> dict[str, Any]:
        """The recipe's own words on what weighs tokens, by the name of the term."""
        return {
            term.name: term.weights.entry.model_dump(mode="json") for term in self.terms if term.weights is not None
        }

    @property
    def entries(self) -> dict[str, LossSlot]:
        """The recipe's own words, by the name of the term."""
        return {term.name: term.entry for term in self.terms}


def resolve_losses(
    context: RunContext, losses: Mapping[str, LossSlot], pair: ModelPair, address: str
) -> ResolvedLosses:
    """The terms of a stage that has the models of `pair`, by their names in the recipe, where they are at `address`."""
    return ResolvedLosses(tuple(_resolve(context, name, entry, pair, address) for name, entry in losses.items()))


def valid_params(address: str, plugin: type[Plugin], given: Mapping[str, Any]) -> Params:
    """The parameters of a plugin that the recipe has at `address`.

    The schema has seen each by itself; what does not fit together is refused here.
    """
    try:
        return plugin.Params.model_validate(given)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, (address, "params", *fault["loc"])))
        raise RecipeError(f"{place}: {fault['msg'].removeprefix('Value error, ')}") from error


def _resolve(context: RunContext, name: str, entry: LossSlot, pair: ModelPair, address: str) -> ResolvedLoss:
    loss = context.registry.of(Loss)[entry.use]
    params = valid_params(f"{address}.{name}", loss, entry.params)
    fusion = None if entry.fuse is None else context.fusions.get(entry.fuse)
    state = OWN_STATE if fusion is None else f"fused.{entry.fuse}"
    needs = _needs(loss, params, pair, f"{address}.{name}")
    return ResolvedLoss(
        name,
        entry,
        loss,
        params,
        needs=needs,
        fused=fusion is not None,
        state=state,
        prediction=state if fusion is not None and fusion.params.judge == "fused" else OWN_STATE,
        weights=None if entry.weights is None else _resolve_weights(context, entry.weights),
    )


def _resolve_weights(context: RunContext, name: str) -> ResolvedWeights:
    entry = context.recipe.token_weights[name]
    weights = context.registry.of(TokenWeights)[entry.use]
    params = valid_params(f"token_weights.{name}", weights, entry.params)
    needs = weights.needs(params)
    if unknown := needs.unknown_fact():
        raise PluginError(f"token_weights.{name}: {unknown}; correct 'needs' of '{entry.use}'")
    return ResolvedWeights(name, entry, weights, params, needs)


def _needs(loss: type[Loss], params: Any, pair: ModelPair, address: str) -> Needs:
    """What the loss reads of these models; blocks that one of them does not have are refused."""
    try:
        needs = loss.needs_of(params, pair)
    except RecipeError as error:  # a parameter asks for what these models do not have
        plain = loss.needs(params, pair.same_tokens)
        if plain.tokenizers == "same" and not pair.same_tokens:
            return plain  # two tokenizers are refused for all that they are, not for a size
        raise RecipeError(f"{address}.params.{error}") from error
    except KdzooError as error:  # it reads a model that the stage does not have
        raise RecipeError(f"{address}: {error}") from error
    declared: dict[Role, frozenset[str]] = {"student": needs.student, "teacher": needs.teacher}
    for role, sites in declared.items():
        for site in sorted(sites):
            block, model = block_of(site), pair.of(role)
            if block is None or isinstance(model, AbsentModel):
                continue
            layers = model.layers
            if not -layers <= block < layers:
                raise RecipeError(
                    f"{address}: '{loss.name}' reads the {role}'s site '{site}', and the {role} has {layers} blocks, "
                    "counted from 0 or from the end; name another block"
                )
    return needs


def check_tokenizers(context: RunContext, losses: ResolvedLosses) -> None:
    """Refuse a loss for one tokenizer where the pair has two."""
    for term in losses:
        if context.same_tokens:
            continue
        ours, theirs = (
            source.tokenizer or source.name or "its own" for source in (context.recipe.student, context.recipe.teacher)
        )
        if term.needs.tokenizers == "same":
            raise RecipeError(
                f"losses.{term.name}: '{term.entry.use}' compares two models token by token and needs one tokenizer, "
                f"but the student has '{ours}' and the teacher '{theirs}'; take a pair with one, or another loss"
            )
        if term.weights is not None and term.weights.needs.compares_models:
            raise RecipeError(
                f"token_weights.{term.weights.name}: '{term.weights.entry.use}' compares both models' predictions of a "
                f"token and needs one tokenizer, but the student has '{ours}' and the teacher '{theirs}'; take a pair "
                "with one, or other weights"
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
        ready = in_precision(made, DTYPES[context.recipe.precision]).to(context.device)
        weights = None if term.weights is None else term.weights.weights(term.weights.params).to(context.device)
        built.append(LossTerm.of(term.name, ready, term.state, term.prediction, weights))
    return built


def models_of(context: RunContext, losses: ResolvedLosses, inputs: StageInputs) -> tuple[ModelPair, int | None]:
    """What losses may know of the models of a stage; and how many entries of both heads count, if not all do."""
    asked = any(term.needs.vocabularies for term in losses)
    teacher = None if inputs.teacher is None else _described(inputs.teacher.info, context.teacher, asked)
    if inputs.student_folder is None:
        return ModelPair(AbsentModel("student"), teacher or AbsentModel("teacher"), context.same_tokens), None
    assert inputs.student is not None
    student = _described(sizes(inputs.student_folder, context.registry.model_adapters), inputs.student, asked)
    if teacher is None:
        return ModelPair(student, AbsentModel("teacher"), context.same_tokens), None
    entries = shared_entries(context, student.vocab_size, teacher.vocab_size)
    if entries is not None:
        student, teacher = replace(student, vocab_size=entries), replace(teacher, vocab_size=entries)
    names = frozenset[EntryMap]({"same_text"}).union(*(term.needs.entries for term in losses))
    maps = entries_of(context, inputs.student, names, (student.vocab_size, teacher.vocab_size))
    return ModelPair(student, teacher, context.same_tokens, maps["same_text"], maps), entries


def entries_of(
    context: RunContext, student: ModelRole, names: Collection[EntryMap], heads: tuple[int, int]
) -> dict[EntryMap, Tensor]:
    """Maps between the vocabularies, for heads of so many entries: the student's and the teacher's."""
    with rank_0_first():
        return entry_maps(names, student.encoder.tokenizer, context.teacher.encoder.tokenizer, heads)


def check_entries(losses: ResolvedLosses, maps: Mapping[EntryMap, Tensor]) -> None:
    """Refuse a loss that maps entries where none has a partner."""
    for term in losses:
        if any(not (maps[name] >= 0).any() for name in term.needs.entries):
            raise RecipeError(
                f"losses.{term.name}: '{term.entry.use}' maps the entries of one vocabulary to those of the other, but "
                "none of these two has a partner; take another loss, or another pair"
            )


def _described(info: ModelInfo, role: ModelRole, asked: bool) -> ModelInfo:
    """The same with the texts of the model's vocabulary, where a loss needs them."""
    return replace(info, known_vocabulary=vocabulary(role.encoder.tokenizer)) if asked else info


def start_losses(
    context: RunContext, terms: Sequence[LossTerm], inputs: StageInputs, micro_batch: int, heads: Mapping[Role, Head]
) -> None:
    """Show losses what they start from, before anything is sharded or trained: training rows, then the heads."""
    if seen := statistics_of(terms):
        student = None
        if "student" in seen:
            # In an engine of its own, as the teacher is: the weights that train are not whole before theirs is there.
            assert inputs.student_folder is not None
            student = open_frozen(context, Weights(inputs.student_folder), always_sharded=True)
        sums = _statistics(terms, inputs, student, micro_batch, context.device)
        start_from_statistics(terms, added_up(sums, context.device))
        if student is not None:
            student.close()
            del student
            release()
    start_from_heads(terms, heads, gather)


def _statistics(
    terms: Sequence[LossTerm], inputs: StageInputs, student: FrozenModel | None, micro_batch: int, device: torch.device
) -> dict[tuple[str, str], Tensor]:
    """Of this rank: sums over its share of the first training rows, by loss term and name."""
    assert inputs.teacher is not None
    totals: dict[tuple[str, str], Tensor] = {}
    for indices in deal(min(STATISTICS_ROWS, len(inputs.corpus.examples)), micro_batch):
        batch = inputs.corpus.batches[indices].to(device)
        assert batch.teacher is not None
        sites = inputs.teacher.sites(batch.teacher, teacher_sites(terms))
        ours: dict[str, Tensor] = {}
        if student is not None:
            assert batch.student is not None
            ours = student.sites(batch.student, student_sites(terms))
        for key, value in statistics(terms, batch, ours, sites).items():
            totals[key] = totals[key] + value if key in totals else value
    return totals
