"""A tiny world to try a loss in: two models with random weights, a few sequences of random tokens, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo.api.batch import Batch, Side
from kdzoo.api.entries import EntryMap
from kdzoo.api.head import HEAD_WEIGHT, Head
from kdzoo.api.loss import Loss, Needs
from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.api.models import AbsentModel, ModelInfo, ModelPair, Role, Vocabulary
from kdzoo.api.plugin import Params
from kdzoo.api.token_weights import TokenNeeds, TokenWeights
from kdzoo.errors import KdzooError
from kdzoo.plugin.registry import Registry, load_plugins
from kdzoo.step.capture import capture
from kdzoo.step.chunks import CHUNK_BYTES
from kdzoo.step.distiller import (
    Aim,
    Distiller,
    start_from_heads,
    start_from_statistics,
    statistics,
    statistics_of,
    student_sites,
    teacher_sites,
)
from kdzoo.step.inputs import PassInputs
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Report
from kdzoo.step.weighing import weigh_step
from kdzoo.testing.promises.rearrange import repeated
from kdzoo.testing.replay import default_dtype
from kdzoo.testing.tiny import tiny_batch, tiny_model

SLOT = "loss"
FIVE_TOKENS = ((4, 3, 3), (2, 2, 2))
"""A sequence is (prompt, student response, teacher response), in tokens."""
LENGTHS = ((4, 5, 4), (3, 2, 3), (5, 6, 5), (2, 1, 1))
TRAINING_ROWS = LENGTHS * 4
"""What statistics are taken of: more tokens than a state has features."""
STUDENT_VOCABULARY, TEACHER_VOCABULARY = 61, 53
"""With one tokenizer, both have the student's."""


@dataclass(frozen=True)
class Subject:
    """A loss with parameters: what is checked."""

    loss: type[Loss]
    params: Params
    artifacts: Mapping[str, Mapping[str, Tensor]]
    """Tensors of the stages that the loss names; a stage that is missing here is made by the loss of its name."""
    weights: type[TokenWeights] | None = None
    """What weighs its tokens."""
    weights_params: Params | None = None

    @classmethod
    def of(
        cls,
        loss: type[Loss],
        params: Mapping[str, Any] | None = None,
        artifacts: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Subject:
        return cls(loss, loss.Params.model_validate(dict(params or {})), artifacts or {})

    def needs(self, same_tokens: bool) -> Needs:
        return self.loss.needs(self.params, same_tokens)

    @property
    def fits_two_tokenizers(self) -> bool:
        return self.needs(same_tokens=False).tokenizers == "any" and not self.weight_needs.compares_models

    @property
    def weight_needs(self) -> TokenNeeds:
        return TokenNeeds() if self.weights is None else self.weights.needs(self.weights_params)

    @property
    def checked(self) -> type[Loss] | type[TokenWeights]:
        """Which of both the checks are of."""
        return self.loss if self.weights is None else self.weights


@dataclass(frozen=True)
class Outcome:
    """What a pass gave: terms divided by their counts, and a gradient per parameter, None where none arrived."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    watched: Mapping[str, Tensor] = field(default_factory=dict)
    """Means of what is watched, where something was counted."""

    def plus(self, other: Outcome) -> Outcome:
        def sum_of(mine: Tensor | None, yours: Tensor | None) -> Tensor | None:
            return yours if mine is None else mine if yours is None else mine + yours

        terms = {name: sum_of(self.terms.get(name), other.terms.get(name)) for name in {**self.terms, **other.terms}}
        gradients = {
            name: sum_of(self.gradients.get(name), other.gradients.get(name))
            for name in {**self.gradients, **other.gradients}
        }
        present = {name: value for name, value in terms.items() if value is not None}
        return Outcome(self.loss + other.loss, present, gradients)

    def difference(self, other: Outcome, tolerance: float = 1e-9) -> str:
        """What differs first, in words; empty where nothing does. No gradient is a gradient of zero.

        What is not a number differs from everything.
        """
        if not _close(self.loss, other.loss, tolerance):
            return f"the loss is {self.loss:.8g} and {other.loss:.8g}"
        for name in self.terms.keys() | other.terms.keys():
            values = [found.terms.get(name, torch.zeros(())) for found in (self, other)]
            if not _close(values[0], values[1], tolerance):
                return f"the term '{name}' is {values[0]:.8g} and {values[1]:.8g}"
        for name in self.gradients.keys() | other.gradients.keys():
            mine, yours = self.gradients.get(name), other.gradients.get(name)
            shown = mine if mine is not None else yours
            if shown is not None:
                zero = torch.zeros_like(shown)
                if not _close(zero if mine is None else mine, zero if yours is None else yours, tolerance):
                    return f"the gradient of '{name}' differs"
        return ""


class World:
    """A subject with one tokenizer or two; everything is the same for the same seed."""

    def __init__(self, subject: Subject, same_tokens: bool, seed: int = 0, twins: bool = False) -> None:
        """`twins`: the student is a copy of the teacher."""
        self.subject = subject
        self.same_tokens = same_tokens
        self.needs = subject.needs(same_tokens)
        self.vocabulary = STUDENT_VOCABULARY, STUDENT_VOCABULARY if same_tokens else TEACHER_VOCABULARY
        of_experts = any(site.partition(".")[0] in ("experts", "router") for site in self.needs.teacher)
        teacher = "mixtral" if of_experts else "llama"
        self._families = (teacher, teacher) if twins else ("gpt2", teacher)
        self._seeds = (seed, seed) if twins else (seed + 1, seed)
        self._batches: dict[tuple[tuple[tuple[int, int, int], ...], int], Batch] = {}

    @cached_property
    def has_student(self) -> bool:
        """Whether the loss reads a student at all: one of a stage that trains on the teacher alone does not."""
        visits = self.subject.loss.visits(self.subject.params)
        return bool(self.needs.student) or any("student" in visit.streams for visit in visits)

    @property
    def student(self) -> nn.Module:
        return _model(self._families[0], self.vocabulary[0], self._seeds[0], trains=True)

    @property
    def teacher(self) -> nn.Module:
        return _model(self._families[1], self.vocabulary[1], self._seeds[1], trains=False)

    @cached_property
    def whole(self) -> Outcome:
        """The loss, as a run would begin with it, on the batch."""
        return self.run([self.term()], self.batch())

    @property
    def model_adapters(self) -> tuple[ModelAdapter, ModelAdapter]:
        known = registry().model_adapters
        return known[self._families[0]], known[self._families[1]]

    @cached_property
    def pair(self) -> ModelPair:
        texts = [f"{' ' if token % 2 else ''}t{token}" for token in range(STUDENT_VOCABULARY)]
        theirs = [text if token % 4 else f"{text}'" for token, text in enumerate(texts)]
        words = (texts, texts if self.same_tokens else theirs[:TEACHER_VOCABULARY])
        v, w = (torch.arange(size) for size in self.vocabulary)
        same = torch.where((w % 4 > 0) | (w == 0) | self.same_tokens, w, -1)
        maps: dict[EntryMap, Tensor] = {
            "same_text": same,
            "nearest_in_student": torch.where(same >= 0, same, w - 1),
            "nearest_in_teacher": torch.where((v % 4 > 0) | (v == 0) | self.same_tokens, v, v - 1) % len(w),
        }
        return ModelPair(
            self._info(self.student, 0, words[0]) if self.has_student else AbsentModel("student"),
            self._info(self.teacher, 1, words[1]),
            self.same_tokens,
            same,
            {name: maps[name] for name in maps if name in self.needs.entries},
        )

    def _info(self, model: nn.Module, which: int, texts: Sequence[str]) -> ModelInfo:
        model_adapter = self.model_adapters[which]
        vocabulary, width = model_adapter.head(model).weight.shape
        words = Vocabulary(tuple(texts), frozenset({0}), 0) if self.needs.vocabularies else None
        layers, attention = len(model_adapter.blocks(model)), model_adapter.attention(model, 0)
        heads = None if attention is None else attention.heads
        return ModelInfo(width, vocabulary, layers, self._families[which], words, heads)

    def batch(self, lengths: Sequence[tuple[int, int, int]] = LENGTHS, seed: int = 0) -> Batch:
        """Sequences of random tokens, about half of which the teacher predicts; none: the stand-in of a rank without
        tokens."""
        key = tuple(lengths), seed
        if key not in self._batches:
            self._batches[key] = self._batch(lengths, seed)
        return self._batches[key]

    def _batch(self, lengths: Sequence[tuple[int, int, int]], seed: int) -> Batch:
        batch = tiny_batch(lengths, *self.vocabulary, self.same_tokens, seed)
        assert batch.teacher is not None
        assert batch.student is not None
        teacher = self._partly_predicted(batch.teacher)
        student = teacher if self.same_tokens else self._in_students_words(batch.student, teacher, batch.pairs)
        batch = replace(batch, teacher=teacher, student=student)
        if self.needs.tokens == "sequence" and lengths:
            batch = replace(batch, teacher=_every_token(teacher), pairs=batch.pairs[:0])
        if not self.has_student:
            batch = replace(batch, student=None)
        if self.subject.weights is not None and batch.student is not None:
            columns = {name: _column(batch.student) for name in self.subject.weight_needs.columns}
            batch = replace(batch, columns=columns)
        return replace(batch, counts=batch.local_counts())

    @torch.no_grad()
    def _partly_predicted(self, side: Side) -> Side:
        """The same positions; every second token is the one that the teacher puts first, but for the special one."""
        ids, width = side.input_ids.clone(), side.input_ids.shape[1]
        for column in range(0, width - 1, 2):  # in their order: each prediction follows from the tokens before it
            at = side.positions[side.positions % width == column] // width
            if len(at):
                first = self.teacher(input_ids=ids, attention_mask=side.attention_mask).logits[at, column].argmax(-1)
                ids[at, column + 1] = torch.where(first > 0, first, ids[at, column + 1])
        return _saying(side, ids)

    def _in_students_words(self, side: Side, teacher: Side, pairs: Tensor) -> Side:
        """The student's side, where tokens of aligned pairs say the same, as far as it has such a token."""
        ids = side.input_ids.clone()
        same = self.pair.student_ids[teacher.labels[pairs[:, 1]]]
        at = side.positions[pairs[:, 0]] + 1
        ids.view(-1)[at] = torch.where(same >= 0, same, ids.flatten()[at])
        return _saying(side, ids)

    def term(self, seed: int = 0, name: str = SLOT) -> LossTerm:
        """The loss as a run would begin with it."""
        pair, artifacts = self.pair, self.artifacts
        torch.manual_seed(seed)
        with default_dtype(torch.float64):  # so that frozen artifacts keep their precision
            loss = self.subject.loss(self.subject.params, pair, artifacts).double()
        weights = None if self.subject.weights is None else self.subject.weights(self.subject.weights_params)
        term = LossTerm.of(name, loss, weights=weights)
        if loss.statistics_of:
            start_from_statistics([term], self.statistics([term], self.batch(TRAINING_ROWS)))
        start_from_heads([term], self.heads)
        return term

    @cached_property
    def artifacts(self) -> dict[str, Mapping[str, Tensor]]:
        found = {stage: self._made(stage, insisted) for stage, insisted in self.needs.artifacts.items()}
        return {s: {name: value.double() for name, value in state.items()} for s, state in found.items()}

    def _made(self, stage: str, insisted: Mapping[str, Any]) -> Mapping[str, Tensor]:
        if stage in self.subject.artifacts:
            return self.subject.artifacts[stage]
        if stage not in registry().of(Loss):
            raise KdzooError(f"the artifact '{stage}' is of no loss that is called so; give its tensors as 'artifacts'")
        maker = Subject.of(registry().of(Loss)[stage], insisted)
        return World(maker, self.same_tokens, self._seeds[1]).term().loss.state_dict()

    @property
    def heads(self) -> dict[Role, Head]:
        heads: dict[Role, Head] = {"teacher": self.model_adapters[1].head(self.teacher)}
        return heads | ({"student": self.model_adapters[0].head(self.student)} if self.has_student else {})

    def statistics(self, terms: Sequence[LossTerm], batch: Batch) -> dict[tuple[str, str], Tensor]:
        """What the losses start from."""
        student: dict[str, Tensor] = {}
        if "student" in statistics_of(terms):
            assert batch.student is not None
            with torch.no_grad():
                student = capture(self.student, self.model_adapters[0], batch.student, student_sites(terms))
        return statistics(terms, batch, student, self.teacher_sites(terms, batch))

    def teacher_sites(self, terms: Sequence[LossTerm], batch: Batch) -> dict[str, Tensor]:
        assert batch.teacher is not None
        with torch.no_grad():
            return capture(self.teacher, self.model_adapters[1], batch.teacher, teacher_sites(terms))

    def run(self, terms: Sequence[LossTerm], batch: Batch, chunk_bytes: int = CHUNK_BYTES) -> Outcome:
        """The step's loss on real models, and the gradients of all that trains."""
        student, model_adapter = (self.student, self.model_adapters[0]) if self.has_student else (None, None)
        head = self.heads.get("student")
        distiller = Distiller(student, model_adapter, head, terms, chunk_bytes=chunk_bytes)
        report = Report()
        inputs = {
            "batch": batch,
            "teacher": self.teacher_sites(terms, batch),
            "teacher_head": self.heads["teacher"],
        }
        (weighed,) = weigh_step(terms, [batch], [distiller(**inputs, aim=None)])
        loss = distiller(**inputs, aim=Aim({term.name: 1.0 for term in terms}, report, weighed))
        return outcome(loss, report, {n: p for n, p in distiller.named_parameters() if p.requires_grad})

    def recorded(self, term: LossTerm, batch: Batch, dtype: torch.dtype = torch.float64) -> Recording:
        """The sites and heads of both models, cut off from the models."""
        wanted = {"hidden.last"} | (term.needs.student - {HEAD_WEIGHT})
        student: dict[str, Tensor] = {}
        if self.has_student:
            assert batch.student is not None
            with torch.no_grad():
                student = capture(
                    self.student, self.model_adapters[0], batch.student, {_whole(site) for site in wanted}
                )

        def cut(head: Head, learns: bool) -> Head:
            weight = nn.Parameter(head.weight.detach().to(dtype), requires_grad=learns)
            return replace(head, weight=weight, bias=None if head.bias is None else nn.Parameter(head.bias.to(dtype)))

        return Recording(
            batch,
            {site: value.to(dtype) for site, value in student.items()},
            {site: value.to(dtype) for site, value in self.teacher_sites([term], batch).items()},
            {name: cut(head, learns=name == "student") for name, head in self.heads.items()},
            frozenset(wanted) if self.has_student else frozenset(),
        )


@dataclass(frozen=True)
class Recording:
    """What both models said of a batch. Each of `student`'s tensors is free to vary on its own."""

    batch: Batch
    student: Mapping[str, Tensor]  # hidden states of every position, embeddings of tokens
    teacher: Mapping[str, Tensor]
    heads: Mapping[Role, Head]
    wanted: frozenset[str]

    def to(self, dtype: torch.dtype) -> Recording:
        """A copy of the same numbers in this precision."""
        heads = {
            name: replace(head, weight=nn.Parameter(head.weight.detach().to(dtype, copy=True), name == "student"))
            for name, head in self.heads.items()
        }
        student = {site: value.detach().to(dtype, copy=True) for site, value in self.student.items()}
        return replace(self, student=student, teacher={s: v.to(dtype) for s, v in self.teacher.items()}, heads=heads)

    def jittered(self, relative: float, seed: int) -> Recording:
        """Every state a little off, by a random part of itself."""
        generator = torch.Generator().manual_seed(seed)

        def off(value: Tensor) -> Tensor:
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            return value.detach() * (1 + relative * noise)

        student, teacher = ({s: off(v) for s, v in sites.items()} for sites in (self.student, self.teacher))
        return replace(self, student=student, teacher=teacher)

    def leaves(self, term: LossTerm) -> dict[str, Tensor]:
        """All that the loss may have a gradient for."""
        found = {f"student {site}": value.requires_grad_() for site, value in self.student.items()}
        if "student" in self.heads:
            found["student head"] = self.heads["student"].weight
        return found | {name: p for name, p in term.loss.named_parameters() if p.requires_grad}

    def sites(self) -> dict[str, Tensor]:
        """What the student shows."""
        return {site: self._site(site) for site in self.wanted}

    def score(self, term: LossTerm, sites: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Report]:
        report, ours = Report(), self.sites() if sites is None else sites
        inputs = PassInputs(self.batch, ours, self.teacher, self.heads, {term.name: 1.0}, report)
        return Distiller(None, None, None, [term]).score(inputs), report

    def repeated(self, times: int, longer: bool) -> Recording:
        """Every sequence `times` times; or, if `longer`, every response `times` times as long."""
        batch, made = repeated(self.batch, times, longer)

        def again(model: Role, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: made[model].site(name, value.detach()) for name, value in sites.items()}

        return replace(
            self, batch=batch, student=again("student", self.student), teacher=again("teacher", self.teacher)
        )

    def run(self, term: LossTerm) -> Outcome:
        leaves = self.leaves(term)
        return outcome(*self.score(term), leaves)

    def _site(self, site: str) -> Tensor:
        value = self.student[_whole(site)]
        assert self.batch.student is not None
        return value[self.batch.student.positions] if _whole(site) != site else value


def outcome(loss: Tensor, report: Report, leaves: Mapping[str, Tensor]) -> Outcome:
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    terms = {name: value.detach() for name, value in report.terms.items()}
    watched = {name: total / count for name, (total, count) in report.watched.items() if count}
    return Outcome(loss.detach(), terms, dict(zip(leaves, gradients, strict=True)), watched)


def _saying(side: Side, ids: Tensor) -> Side:
    """The same positions with other tokens [B, T]."""
    flat = ids.flatten()
    return replace(side, input_ids=ids, labels=flat[side.positions + 1], inputs=flat[side.positions])


def _column(side: Side) -> Tensor:
    """Some number for each token, that follows from what it says and is 0 for some."""
    return (side.labels % 4).to(torch.float64) / 2


def _every_token(side: Side) -> Side:
    """The same sequences with every real token scored that another follows."""
    width = side.input_ids.shape[1]
    followed = side.attention_mask[:, 1:].bool()
    at = torch.cat([followed, followed.new_zeros(len(followed), 1)], dim=1).flatten().nonzero().squeeze(-1)
    ids, nowhere = side.input_ids.flatten(), torch.full_like(at, -1)
    return replace(side, positions=at, labels=ids[at + 1], inputs=ids[at], sample=at // width, span=nowhere)


def clone(term: LossTerm) -> LossTerm:
    return replace(term, loss=deepcopy(term.loss))


@cache
def _model(family: str, vocabulary: int, seed: int, trains: bool) -> nn.Module:
    """Made once for all worlds, none of which changes it."""
    model = tiny_model(family, vocabulary, seed)
    model.set_experts_implementation("eager")  # the fast ones have no float64
    return model.double().eval().requires_grad_(trains)


@cache
def registry() -> Registry:
    """The installed plugins."""
    return load_plugins()


def _whole(site: str) -> str:
    """Of hidden states, the site of every position."""
    return site if "@" in site or not site.startswith("hidden.") else f"{site}@all"


def _close(mine: Tensor, yours: Tensor, tolerance: float) -> bool:
    return torch.allclose(mine.double(), yours.double(), rtol=tolerance, atol=tolerance)
