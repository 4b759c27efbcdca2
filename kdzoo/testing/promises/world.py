"""A tiny world to try a loss in: two models with random weights, a few sequences of random tokens, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo.errors import KdzooError
from kdzoo.plugin.contracts import Anatomy, Lexicon, Loss, ModelFacts, Models, Needs, Params
from kdzoo.plugin.registry import Registry, load_plugins
from kdzoo.step.batch import Batch, Side
from kdzoo.step.capture import capture
from kdzoo.step.distiller import Distiller, prepare, set_up, survey, teacher_sites
from kdzoo.step.head import HEAD_WEIGHT, Head
from kdzoo.step.report import Report
from kdzoo.step.vocabulary import CHUNK_BYTES, Call, Slot
from kdzoo.testing.replay import default_dtype
from kdzoo.testing.tiny import tiny_batch, tiny_model

SLOT = "loss"
FIVE_ROWS = ((4, 3, 3), (2, 2, 2))
"""A sequence is (prompt, student response, teacher response), in tokens."""
LENGTHS = ((4, 5, 4), (3, 2, 3), (5, 6, 5), (2, 1, 1))
STUDENT_VOCABULARY, TEACHER_VOCABULARY = 61, 53
"""With one tokenizer, both have the student's."""


@dataclass(frozen=True)
class Subject:
    """A loss with parameters: what is checked."""

    loss: type[Loss]
    params: Params
    artefacts: Mapping[str, Mapping[str, Tensor]]
    """Tensors of the stages that the loss names; a stage that is missing here is made by the loss of its name."""

    @classmethod
    def of(
        cls,
        loss: type[Loss],
        params: Mapping[str, Any] | None = None,
        artefacts: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Subject:
        return cls(loss, loss.Params.model_validate(dict(params or {})), artefacts or {})

    def needs(self, same_tokens: bool) -> Needs:
        return self.loss.needs(self.params, same_tokens)

    @property
    def fits_two_tokenizers(self) -> bool:
        return self.needs(same_tokens=False).tokenizers == "any"


@dataclass(frozen=True)
class Outcome:
    """What a pass gave: terms divided by their counts, and a gradient per parameter, None where none arrived."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]

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
        """What differs first, in words; empty where nothing does. No gradient is a gradient of zero."""
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

    @property
    def has_student(self) -> bool:
        """Whether the loss reads a student at all: one of a stage that trains on the teacher alone does not."""
        visited = {stream for visit in self.needs.visits for stream in visit.streams}
        owned = {place for stream in self.needs.streams for place in (stream.axis, stream.head)}
        return bool(self.needs.student) or "student" in visited | owned

    @cached_property
    def student(self) -> nn.Module:
        return self._model(0)

    @cached_property
    def teacher(self) -> nn.Module:
        return self._model(1).requires_grad_(False)

    def _model(self, which: int) -> nn.Module:
        model = tiny_model(self._families[which], self.vocabulary[which], self._seeds[which])
        model.set_experts_implementation("eager")  # the fast ones have no float64
        return model.double().eval()

    @property
    def anatomies(self) -> tuple[Anatomy, Anatomy]:
        known = registry().anatomies
        return known[self._families[0]], known[self._families[1]]

    @cached_property
    def models(self) -> Models:
        texts = [f"{' ' if token % 2 else ''}t{token}" for token in range(STUDENT_VOCABULARY)]
        theirs = [text if token % 4 else f"{text}'" for token, text in enumerate(texts)]
        words = (texts, texts if self.same_tokens else theirs[:TEACHER_VOCABULARY])
        entries = torch.arange(self.vocabulary[1])
        return Models(
            student=self._facts(self.student, 0, words[0]) if self.has_student else None,
            teacher=self._facts(self.teacher, 1, words[1]),
            same_tokens=self.same_tokens,
            student_ids=torch.where((entries % 4 > 0) | (entries == 0) | self.same_tokens, entries, -1),
        )

    def _facts(self, model: nn.Module, which: int, texts: Sequence[str]) -> ModelFacts:
        anatomy = self.anatomies[which]
        vocabulary, width = anatomy.head(model).weight.shape
        lexicon = Lexicon(tuple(texts), frozenset({0}), 0) if self.needs.lexicons else None
        return ModelFacts(width, vocabulary, len(anatomy.blocks(model)), self._families[which], lexicon)

    def batch(self, lengths: Sequence[tuple[int, int, int]] = LENGTHS, seed: int = 0) -> Batch:
        """Sequences of random tokens; none: the stand-in of a rank without rows."""
        batch = tiny_batch(lengths, *self.vocabulary, self.same_tokens, seed)
        assert batch.teacher is not None
        if self.needs.rows == "sequence" and lengths:
            batch = replace(batch, teacher=_every_row(batch.teacher), pairs=batch.pairs[:0])
        if not self.has_student:
            batch = replace(batch, student=None)
        return replace(batch, counts=batch.local_counts())

    def slot(self, seed: int = 0, name: str = SLOT) -> Slot:
        """The loss as a run would begin with it."""
        models, artefacts = self.models, self.artefacts
        torch.manual_seed(seed)
        with default_dtype(torch.float64):  # so that frozen artefacts keep their precision
            loss = self.subject.loss(self.subject.params, models, artefacts).double()
        slot = Slot(name, loss, self.needs)
        if self.needs.survey:
            batch = self.batch()
            prepare([slot], survey([slot], batch, self.teacher_sites([slot], batch)))
        set_up([slot], self.heads)
        return slot

    @cached_property
    def artefacts(self) -> dict[str, Mapping[str, Tensor]]:
        found = {stage: self._made(stage, insisted) for stage, insisted in self.needs.artefacts.items()}
        return {s: {name: value.double() for name, value in state.items()} for s, state in found.items()}

    def _made(self, stage: str, insisted: Mapping[str, Any]) -> Mapping[str, Tensor]:
        if stage in self.subject.artefacts:
            return self.subject.artefacts[stage]
        if stage not in registry().losses:
            raise KdzooError(f"the artefact '{stage}' is of no loss that is called so; give its tensors as 'artefacts'")
        maker = Subject.of(registry().losses[stage], insisted)
        return World(maker, self.same_tokens, self._seeds[1]).slot().loss.state_dict()

    @property
    def heads(self) -> dict[str, Head]:
        heads = {"teacher": self.anatomies[1].head(self.teacher)}
        return heads | ({"student": self.anatomies[0].head(self.student)} if self.has_student else {})

    def teacher_sites(self, slots: Sequence[Slot], batch: Batch) -> dict[str, Tensor]:
        assert batch.teacher is not None
        with torch.no_grad():
            return capture(self.teacher, self.anatomies[1], batch.teacher, teacher_sites(slots))

    def run(self, slots: Sequence[Slot], batch: Batch, chunk_bytes: int = CHUNK_BYTES) -> Outcome:
        """The step's loss on real models, and the gradients of all that trains."""
        student, anatomy = (self.student, self.anatomies[0]) if self.has_student else (None, None)
        distiller = Distiller(student, anatomy, slots, chunk_bytes=chunk_bytes)
        report = Report()
        loss = distiller(
            batch=batch,
            teacher=self.teacher_sites(slots, batch),
            teacher_head=self.heads["teacher"],
            weights={slot.name: 1.0 for slot in slots},
            report=report,
        )
        return outcome(loss, report, {n: p for n, p in distiller.named_parameters() if p.requires_grad})

    def recorded(self, slot: Slot, batch: Batch, dtype: torch.dtype = torch.float64) -> Recording:
        """The sites and heads of both models, cut off from the models."""
        wanted = {"hidden.last"} | (slot.needs.student - {HEAD_WEIGHT})
        student: dict[str, Tensor] = {}
        if self.has_student:
            assert batch.student is not None
            with torch.no_grad():
                student = capture(self.student, self.anatomies[0], batch.student, {_whole(site) for site in wanted})

        def cut(head: Head, learns: bool) -> Head:
            weight = nn.Parameter(head.weight.detach().to(dtype), requires_grad=learns)
            return replace(head, weight=weight, bias=None if head.bias is None else nn.Parameter(head.bias.to(dtype)))

        return Recording(
            batch,
            {site: value.to(dtype) for site, value in student.items()},
            {site: value.to(dtype) for site, value in self.teacher_sites([slot], batch).items()},
            {name: cut(head, learns=name == "student") for name, head in self.heads.items()},
            frozenset(wanted) if self.has_student else frozenset(),
        )


@dataclass(frozen=True)
class Recording:
    """What both models said of a batch. Each of `student`'s tensors is free to vary on its own."""

    batch: Batch
    student: Mapping[str, Tensor]  # hidden states of every position, embeddings of rows
    teacher: Mapping[str, Tensor]
    heads: Mapping[str, Head]
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

    def leaves(self, slot: Slot) -> dict[str, Tensor]:
        """All that the loss may have a gradient for."""
        found = {f"student {site}": value.requires_grad_() for site, value in self.student.items()}
        if "student" in self.heads:
            found["student head"] = self.heads["student"].weight
        return found | {name: p for name, p in slot.loss.named_parameters() if p.requires_grad}

    def score(self, slot: Slot) -> tuple[Tensor, Report]:
        sites = {site: self._site(site) for site in self.wanted}
        report = Report()
        call = Call(self.batch, sites, self.teacher, self.heads, {slot.name: 1.0}, report)
        return Distiller(None, None, [slot]).score(call), report

    def run(self, slot: Slot) -> Outcome:
        leaves = self.leaves(slot)
        return outcome(*self.score(slot), leaves)

    def _site(self, site: str) -> Tensor:
        value = self.student[_whole(site)]
        assert self.batch.student is not None
        return value[self.batch.student.rows] if _whole(site) != site else value


def outcome(loss: Tensor, report: Report, leaves: Mapping[str, Tensor]) -> Outcome:
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    terms = {name: value.detach() for name, value in report.terms.items()}
    return Outcome(loss.detach(), terms, dict(zip(leaves, gradients, strict=True)))


def rearranged(batch: Batch, order: Sequence[int], padding: int = 0) -> Batch:
    """These sequences of a batch, in this order, with so many positions of padding more; counts are the whole's."""
    index = torch.tensor(order, dtype=torch.long)
    student = None if batch.student is None else _side(batch.student, index, padding)
    teacher = None if batch.teacher is None else _side(batch.teacher, index, padding)
    pairs = batch.pairs[:0]
    if student is not None and teacher is not None:
        moved = torch.stack([student[1][batch.pairs[:, 0]], teacher[1][batch.pairs[:, 1]]], dim=1)
        moved = moved[(moved >= 0).all(1)]
        pairs = moved[moved[:, 0].argsort()]
    spans = torch.cat([side[0].span for side in (student, teacher) if side is not None])
    number = {span: n for n, span in enumerate(_in_order(spans, student, teacher))}

    def numbered(side: Side) -> Side:
        return replace(side, span=torch.tensor([number.get(s, -1) for s in side.span.tolist()], dtype=torch.long))

    return replace(
        batch,
        student=None if student is None else numbered(student[0]),
        teacher=None if teacher is None else numbered(teacher[0]),
        pairs=pairs,
    )


def _side(side: Side, order: Tensor, padding: int) -> tuple[Side, Tensor]:
    """The side's sequences `order`, and where each of its rows went (-1: nowhere)."""
    width = side.input_ids.shape[1]
    generator = torch.Generator().manual_seed(99)
    more = torch.randint(1, int(side.input_ids.max()) + 1, (len(order), padding), generator=generator)
    ids = torch.cat([side.input_ids[order], more], dim=1)
    mask = torch.cat([side.attention_mask[order], torch.zeros_like(more)], dim=1)
    kept = torch.cat([(side.sample == b).nonzero().squeeze(-1) for b in order])
    sample = torch.repeat_interleave(torch.arange(len(order)), torch.bincount(side.sample, minlength=len(mask))[order])
    if not len(order):
        kept = sample = torch.zeros(0, dtype=torch.long)
    went = torch.full_like(side.rows, -1)
    went[kept] = torch.arange(len(kept))
    rows = side.rows[kept] % width + sample * ids.shape[1]
    return Side(ids, mask, rows, side.labels[kept], side.inputs[kept], sample, side.span[kept]), went


def _every_row(side: Side) -> Side:
    """The same sequences with a row for every real token that another follows."""
    width = side.input_ids.shape[1]
    followed = side.attention_mask[:, 1:].bool()
    rows = torch.cat([followed, followed.new_zeros(len(followed), 1)], dim=1).flatten().nonzero().squeeze(-1)
    ids, nowhere = side.input_ids.flatten(), torch.full_like(rows, -1)
    return replace(side, rows=rows, labels=ids[rows + 1], inputs=ids[rows], sample=rows // width, span=nowhere)


def _in_order(spans: Tensor, *sides: tuple[Side, Tensor] | None) -> list[int]:
    """The spans by the sequence that they stand in, and within it as they were."""
    of: dict[int, int] = {}
    for side in sides:
        if side is not None:
            of |= dict(zip(side[0].span.tolist(), side[0].sample.tolist(), strict=True))
    return sorted({s for s in spans.tolist() if s >= 0}, key=lambda span: (of[span], span))


def clone(slot: Slot) -> Slot:
    return replace(slot, loss=deepcopy(slot.loss))


@cache
def registry() -> Registry:
    """The installed plugins."""
    return load_plugins()


def _whole(site: str) -> str:
    """Of hidden states, the site of every position."""
    return site if "@" in site or not site.startswith("hidden.") else f"{site}@all"


def _close(mine: Tensor, yours: Tensor, tolerance: float) -> bool:
    return torch.allclose(mine.double(), yours.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
