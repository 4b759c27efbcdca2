"""Losses that are wrong on purpose, each in one way that the conformance kit must find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo import Batch, Chunk, Loss, Models, Needs, Terms, View, Visit, hookimpl, ops


class Broken(Loss):
    """The forward KL, before it is broken."""

    paper = "none"
    formula = "none"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("tokens", ("student", "teacher")),), tokenizers="same")

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms | Mapping[str, Tensor]:
        return Terms().add("kl", ops.forward_kl(chunk.logprobs("teacher"), chunk.logprobs("student")).sum())


class OfStates(Broken):
    """The square of the student's states, before it is broken."""

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"hidden.last"}))

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        raise NotImplementedError

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        return Terms().add("square", self.of_states(student))

    def of_states(self, student: View) -> Tensor:
        return student["hidden.last"].square().mean(-1).sum()


class NotFinite(OfStates):
    """Divides by how many rows there are."""

    name = "not_finite"

    def of_states(self, student: View) -> Tensor:
        return student["hidden.last"].square().mean()


class Unread(Broken):
    """Declares a site that it does not read."""

    name = "unread"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(
            student=frozenset({"hidden.0"}), visits=(Visit("tokens", ("student", "teacher")),), tokenizers="same"
        )


class UnreadStage(Broken):
    """Has a stage trained whose module it does not take."""

    name = "unread_stage"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        visits = (Visit("tokens", ("student", "teacher")),)
        return Needs(visits=visits, tokenizers="same", artefacts={"projectors": {}})


class Undeclared(OfStates):
    """Reads a site that it does not declare."""

    name = "undeclared"

    def of_states(self, student: View) -> Tensor:
        return student["hidden.0"].square().mean(-1).sum()


class NotAligned(Broken):
    """Reads pairs of the aligner and does not say so."""

    name = "not_aligned"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("tokens", ("student", "teacher")),))

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        apart = chunk.logits("student")[:, :5] - chunk.logits("teacher")[:, :5]
        return Terms().add("apart", apart.square().sum(), per="pairs")


class WithLinear(OfStates):
    """Of projected states."""

    def __init__(self, params: Any, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(params, models, artefacts)
        assert models.student is not None
        self.project = nn.Linear(models.student.width, 8)

    def of_states(self, student: View) -> Tensor:
        return self.project(student["hidden.last"]).square().mean(-1).sum()


class SkipsEmpty(WithLinear):
    """Branches around its module where there are no rows."""

    name = "skips_empty"

    def of_states(self, student: View) -> Tensor:
        return super().of_states(student) if len(student) else torch.zeros(())


class Unused(WithLinear):
    """Has a module that it never uses."""

    name = "unused"

    def of_states(self, student: View) -> Tensor:
        return student["hidden.last"].square().mean(-1).sum()


class MeanOfChunk(Broken):
    """Returns the mean of a chunk where a sum is wanted."""

    name = "mean_of_chunk"

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        return Terms().add("kl", ops.forward_kl(chunk.logprobs("teacher"), chunk.logprobs("student")).mean())


class SeesPadding(OfStates):
    """Reads every position, padding too."""

    name = "sees_padding"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"hidden.last@all"}))

    def of_states(self, student: View) -> Tensor:
        return student["hidden.last@all"].square().mean(-1).sum()


class Normalised(OfStates):
    """Divides by the spread of the whole batch, and does not say that it couples."""

    name = "normalised"

    def of_states(self, student: View) -> Tensor:
        states = student["hidden.last"]
        return (states / (1 + states.detach().square().sum())).mean(-1).sum()


class ByPlace(OfStates):
    """Weighs a sequence by its place in the batch."""

    name = "by_place"

    def of_states(self, student: View) -> Tensor:
        return (student["hidden.last"].square().mean(-1) * (student.sample % 2)).sum()


class SaysCoupled(Broken):
    """Declares a coupling that it has not."""

    name = "says_coupled"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("tokens", ("student", "teacher")),), tokenizers="same", batch_coupled=True)


class NoDivergence(Broken):
    """Calls a cross-entropy a divergence: the teacher's entropy stays in."""

    name = "no_divergence"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("tokens", ("student", "teacher")),), tokenizers="same", divergence=True)

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        return Terms().add("ce", -(chunk.logprobs("teacher").exp() * chunk.logprobs("student")).sum())


class _WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * gradient


class WrongGradient(OfStates):
    """Has a backward pass of its own that forgets a factor of two."""

    name = "wrong_gradient"

    def of_states(self, student: View) -> Tensor:
        return _WrongSquare.apply(student["hidden.last"]).mean(-1).sum()


class HalfPrecision(Broken):
    """Subtracts two large sums in the models' precision."""

    name = "half_precision"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(
            student=frozenset({"hidden.last"}),
            visits=(Visit("tokens", ("student", "teacher"), kind="rows"),),
            tokenizers="same",
        )

    def over_vocab(self, visit: str, chunk: Chunk) -> Mapping[str, Tensor]:
        log_p, log_q = chunk.logprobs("teacher"), chunk.logprobs("student")
        return {"own": (log_p.exp() * log_p).sum(-1), "cross": (log_p.exp() * log_q).sum(-1)}

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        dtype = student["hidden.last"].dtype
        return Terms().add("kl", rows["tokens.own"].sum().to(dtype) - rows["tokens.cross"].sum().to(dtype))


class ColumnByColumn(Broken):
    """Compares two vocabularies column by column."""

    name = "column_by_column"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("tokens", ("student", "teacher")),), aligned=not same_tokens)

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        p, q = chunk.logprobs("teacher"), chunk.logprobs("student")
        return Terms().add("kl", ops.forward_kl(p, q).sum(), per="pairs")


class Forgets(OfStates):
    """Keeps a running mean where no checkpoint finds it."""

    name = "forgets"

    def __init__(self, params: Any, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(params, models, artefacts)
        self.calls = 0

    def of_states(self, student: View) -> Tensor:
        self.calls = min(self.calls + 1, 3)
        return super().of_states(student) * self.calls


class OnTheFirstRank(OfStates):
    """Works on the first rank only."""

    name = "on_the_first_rank"

    def of_states(self, student: View) -> Tensor:
        elsewhere = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        return super().of_states(student) * (0.0 if elsewhere else 1.0)


class OncePerSequence(WithLinear):
    """Calls its module once per sequence, of which ranks have different numbers."""

    name = "once_per_sequence"

    def of_states(self, student: View) -> Tensor:
        states = student["hidden.last"]
        parts = [self.project(states[student.sample == b]) for b in range(student.side.sequences)]
        return torch.cat(parts).square().mean(-1).sum()


BROKEN = (
    NotFinite,
    Unread,
    UnreadStage,
    Undeclared,
    NotAligned,
    SkipsEmpty,
    Unused,
    MeanOfChunk,
    SeesPadding,
    Normalised,
    ByPlace,
    SaysCoupled,
    NoDivergence,
    WrongGradient,
    HalfPrecision,
    ColumnByColumn,
    Forgets,
    OnTheFirstRank,
    OncePerSequence,
)


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    for loss in BROKEN:
        register(loss)
