"""Losses that are wrong on purpose, each in one way that the conformance kit must find."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdzoo import Logits, Loss, Needs, Step, Stream, Terms, View, hookimpl, ops, visit


class Broken(Loss):
    """The forward KL, before it is broken."""

    paper = "none"
    formula = "none"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same")

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        return Terms().add("kl", ops.forward_kl(teacher.logprobs(), student.logprobs()))


class OfStates(Loss):
    """The square of the student's states, before it is broken."""

    paper = "none"
    formula = "none"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(student=frozenset({"hidden.last"}), tokenizers="same")

    def finish(self, step: Step) -> Terms:
        return Terms().add("square", self.of_states(step.student))

    def of_states(self, student: View) -> Tensor:
        return student["hidden.last"].square().mean(-1)


class WithLinear(OfStates):
    """Of projected states."""

    def build(self, student, teacher, artifacts):
        self.project = nn.Linear(student.width, 8)

    def of_states(self, student: View) -> Tensor:
        return self.project(student["hidden.last"]).square().mean(-1)


# What is declared.


class NoFormula(Broken):
    """Says no formula."""

    name = "no_formula"
    formula = ""


class Undeclared(OfStates):
    """Reads a site that it does not declare."""

    name = "undeclared"

    def of_states(self, student: View) -> Tensor:
        return student["hidden.0"].square().mean(-1)


class Misspelt(Broken):
    """Sees a stream that nobody makes."""

    name = "misspelt"

    @visit
    def tokens(self, studnet: Logits, teacher: Logits) -> Terms:
        return Terms().add("kl", ops.forward_kl(teacher.logprobs(), studnet.logprobs()))


class MisspeltEach(OfStates):
    """Sees each of two streams, one of which it makes under another name."""

    name = "misspelt_each"

    def streams(self, step: Step):
        hidden = step.student["hidden.last"]
        return {
            "once": Stream(hidden, "student", beside="student"),
            "twice": Stream(2 * hidden, "student", beside="student"),
        }

    @visit(each=("once", "twcie"))
    def each(self, seen: Logits) -> Terms:
        return Terms().add(seen.stream, ops.cross_entropy(seen.logprobs(), seen.labels))


class BareParameter(OfStates):
    """Has a parameter of its own: on several ranks each would hold an empty part of it."""

    name = "bare_parameter"

    def build(self, student, teacher, artifacts):
        self.scale = nn.Parameter(torch.ones(student.width))

    def of_states(self, student: View) -> Tensor:
        return (student["hidden.last"] * self.scale).square().mean(-1)


class NotCalled(WithLinear):
    """Uses the weight of a module that it never calls: nobody gathers it."""

    name = "not_called"

    def of_states(self, student: View) -> Tensor:
        return F.linear(student["hidden.last"], self.project.weight, self.project.bias).square().mean(-1)


class Unread(Broken):
    """Declares a site that it does not read."""

    name = "unread"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(student=frozenset({"hidden.0"}), tokenizers="same")


class UnreadStage(Broken):
    """Has a stage trained whose module it does not take."""

    name = "unread_stage"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", artifacts={"projectors": {}})


class UnreadEntries(Broken):
    """Declares a map between vocabularies that it does not read."""

    name = "unread_entries"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", entries=frozenset({"same_text"}))


class NotAligned(Broken):
    """Reads pairs of the aligner and does not say so."""

    name = "not_aligned"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs()

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        return Terms().add("apart", (student.logits[:, :5] - teacher.logits[:, :5]).square(), per="pairs")


class ColumnByColumn(Broken):
    """Compares two vocabularies column by column."""

    name = "column_by_column"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(aligned=not same_tokens)

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        p, q = teacher.logprobs(), student.logprobs()
        return Terms().add("kl", ops.forward_kl(p, q), per="pairs")


# What trains.


class NothingLearns(Broken):
    """Cuts the student off."""

    name = "nothing_learns"

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        return Terms().add("kl", ops.forward_kl(teacher.logprobs(), student.logprobs().detach()))


class OnlyItsOwn(WithLinear):
    """Sees the student's prediction, cuts it off, and trains a module of its own."""

    name = "only_its_own"

    def of_states(self, student: View) -> Tensor:
        return self.project(student["hidden.last"].detach()).square().mean(-1)

    @visit
    def tokens(self, student: Logits) -> Terms:
        return Terms().add("nll", ops.cross_entropy(student.logprobs().detach(), student.labels))


class OncePerSequence(WithLinear):
    """Calls its module once per sequence, of which ranks have different numbers."""

    name = "once_per_sequence"

    def of_states(self, student: View) -> Tensor:
        states = student["hidden.last"]
        parts = [self.project(states[student.sample == b]) for b in range(student.side.sequences)]
        return torch.cat(parts).square().mean(-1)


class Unused(WithLinear):
    """Has a module whose result it throws away."""

    name = "unused"

    def of_states(self, student: View) -> Tensor:
        self.project(student["hidden.last"])
        return student["hidden.last"].square().mean(-1)


class SkipsEmpty(WithLinear):
    """Branches around its module where there are no tokens."""

    name = "skips_empty"

    def of_states(self, student: View) -> Tensor:
        return super().of_states(student) if len(student) else torch.zeros(())


class WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return x * gradient


class WrongGradient(OfStates):
    """Has a backward pass of its own that forgets a factor of two."""

    name = "wrong_gradient"

    def of_states(self, student: View) -> Tensor:
        return WrongSquare.apply(student["hidden.last"]).mean(-1)


# What is not a number.


class NotFinite(Broken):
    """Takes the logarithm of a probability without what it may not keep."""

    name = "not_finite"

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        gap = (student.logprobs().exp() - teacher.logprobs().exp()).log()
        return Terms().add("gap", gap)


class MeanOfTokens(OfStates):
    """Divides by how many tokens there are."""

    name = "mean_of_tokens"

    def of_states(self, student: View) -> Tensor:
        return student["hidden.last"].square().mean()


class NoDivergence(Broken):
    """Calls a cross-entropy a divergence: the teacher's entropy stays in."""

    name = "no_divergence"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", divergence=True)

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        return Terms().add("ce", -(teacher.logprobs().exp() * student.logprobs()).sum(-1))


class NotANumberAtEquality(NoDivergence):
    """Divides by the distance, which is 0 where both models say the same."""

    name = "not_a_number_at_equality"

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        apart = (student.logprobs() - teacher.logprobs()).square().sum(-1)
        return Terms().add("apart", apart.square() / apart)


class HalfPrecision(Broken):
    """Subtracts two large sums in the models' precision."""

    name = "half_precision"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(student=frozenset({"hidden.last"}), tokenizers="same")

    @visit(kind="tokens")
    def tokens(self, student: Logits, teacher: Logits) -> dict[str, Tensor]:
        log_p, log_q = teacher.logprobs(), student.logprobs()
        return {"own": (log_p.exp() * log_p).sum(-1), "cross": (log_p.exp() * log_q).sum(-1)}

    def finish(self, step: Step) -> Terms:
        dtype = step.student["hidden.last"].dtype
        own, cross = step.values["tokens.own"], step.values["tokens.cross"]
        return Terms().add("kl", own.sum().to(dtype) - cross.sum().to(dtype))


# What others see.


class EditsLogits(Broken):
    """Clamps the teacher's logits in place, which its neighbours see too."""

    name = "edits_logits"

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        return Terms().add("logit", (student.logits - teacher.logits.clamp_(max=0)).square().mean(-1))


class EditsLogprobs(Broken):
    """Turns the teacher's shared log-probabilities into probabilities, behind autograd's back."""

    name = "edits_logprobs"

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        p = teacher.logprobs().data.exp_()
        return Terms().add("ce", -(p * student.logprobs()).sum(-1))


class EditsStates(OfStates):
    """Changes the teacher's states, which its neighbours read too."""

    name = "edits_states"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(student=frozenset({"hidden.last"}), teacher=frozenset({"hidden.last"}), tokenizers="same")

    def finish(self, step: Step) -> Terms:
        width = step.student["hidden.last"].shape[-1]
        target = step.teacher["hidden.last"][:, :width].tanh_()
        return Terms().add("apart", (step.student["hidden.last"] - target).square().mean(-1))


# What the split of a batch changes.


class MeanOfChunk(Broken):
    """Returns the mean of a chunk where values are wanted."""

    name = "mean_of_chunk"

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        kl = ops.forward_kl(teacher.logprobs(), student.logprobs())
        return Terms().add("kl", kl.sum() / max(1, len(kl)))


class MeanOfBatch(OfStates):
    """Returns the mean of a batch where values are wanted."""

    name = "mean_of_batch"

    def of_states(self, student: View) -> Tensor:
        return super().of_states(student).sum() / max(1, len(student))


class DividesTwice(OfStates):
    """Divides by a count of the step, as the core does."""

    name = "divides_twice"

    def finish(self, step: Step) -> Terms:
        return Terms().add("square", self.of_states(step.student) / max(step.batch.counts["tokens"], 1.0))


class PerSequence(Broken):
    """Divides a sum over tokens by sequences, so that long responses count more."""

    name = "per_sequence"

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        return Terms().add("kl", ops.forward_kl(teacher.logprobs(), student.logprobs()), per="sequences")


class MeanPerToken(OfStates):
    """Divides means of sequences by tokens."""

    name = "mean_per_token"

    def of_states(self, student: View) -> Tensor:
        return super().of_states(student) / student.sample.bincount()[student.sample]


class SeesPadding(OfStates):
    """Reads every position, padding too."""

    name = "sees_padding"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(student=frozenset({"hidden.last@all"}), tokenizers="same")

    def of_states(self, student: View) -> Tensor:
        return student["hidden.last@all"].square().mean(-1)


class Normalised(OfStates):
    """Divides by the spread of the whole batch, and does not say that it couples."""

    name = "normalised"

    def of_states(self, student: View) -> Tensor:
        states = student["hidden.last"]
        return (states / (1 + states.detach().square().sum())).mean(-1)


class ByPlace(OfStates):
    """Weighs a sequence by its place in the batch."""

    name = "by_place"

    def of_states(self, student: View) -> Tensor:
        return student["hidden.last"].square().mean(-1) * (student.sample % 2)


class SaysCoupled(Broken):
    """Declares a coupling that it has not."""

    name = "says_coupled"

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", batch_coupled=True)


# What cannot be weighed.


class HandsBackASum(OfStates):
    """Adds its values up, so that no token can be weighed."""

    name = "hands_back_a_sum"

    def of_states(self, student: View) -> Tensor:
        return super().of_states(student).sum()


class PacksInSilence(OfStates):
    """Sends every second token through the head, and does not say which they are."""

    name = "packs_in_silence"

    def streams(self, step: Step):
        kept = step.student.labels % 2 == 0
        return {"some": Stream(step.student["hidden.last"][kept], "student", labels=step.student.labels[kept])}

    @visit
    def gold(self, some: Logits) -> Terms:
        return Terms().add("nll", ops.cross_entropy(some.logprobs(), some.labels))


class LeavesOutTokens(OfStates):
    """Has values of some of the tokens, and does not say of which."""

    name = "leaves_out_tokens"

    def of_states(self, student: View) -> Tensor:
        return super().of_states(student)[student.labels % 2 == 0]


# What a checkpoint keeps.


class Forgets(OfStates):
    """Keeps a running mean where no checkpoint finds it."""

    name = "forgets"

    def build(self, student, teacher, artifacts):
        self.calls = 0

    def of_states(self, student: View) -> Tensor:
        self.calls = min(self.calls + 1, 3)
        return super().of_states(student) * self.calls


class ForgetsAfterSteps(OfStates):
    """Follows its own loss with a plain attribute, which no checkpoint keeps."""

    name = "forgets_after_steps"

    def build(self, student, teacher, artifacts):
        self.mean = 0.0

    def after_step(self, terms, progress):
        self.mean = 0.9 * self.mean + 0.1 * terms["square"]


class MovesWithinSteps(OfStates):
    """Moves a buffer with every micro-batch, of which ranks and settings have different numbers."""

    name = "moves_within_steps"

    def build(self, student, teacher, artifacts):
        self.register_buffer("seen", torch.zeros(()))

    def of_states(self, student: View) -> Tensor:
        self.seen += len(student)
        return super().of_states(student)


# What only several ranks show.


class OnTheFirstRank(OfStates):
    """Works on the first rank only."""

    name = "on_the_first_rank"

    def of_states(self, student: View) -> Tensor:
        elsewhere = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        return super().of_states(student) * (0.0 if elsewhere else 1.0)


class OftenOnTheFirstRank(WithLinear):
    """Calls its module more often on the first rank."""

    name = "often_on_the_first_rank"

    def of_states(self, student: View) -> Tensor:
        elsewhere = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        projected = [self.project(student["hidden.last"]) for _ in range(2 if elsewhere else 3)]
        return projected[-1].square().mean(-1)


BROKEN = (
    NoFormula,
    Undeclared,
    Misspelt,
    MisspeltEach,
    BareParameter,
    NotCalled,
    Unread,
    UnreadStage,
    UnreadEntries,
    NotAligned,
    ColumnByColumn,
    NothingLearns,
    OnlyItsOwn,
    Unused,
    SkipsEmpty,
    WrongGradient,
    NotFinite,
    MeanOfTokens,
    NoDivergence,
    NotANumberAtEquality,
    HalfPrecision,
    EditsLogits,
    EditsLogprobs,
    EditsStates,
    MeanOfChunk,
    MeanOfBatch,
    DividesTwice,
    PerSequence,
    MeanPerToken,
    SeesPadding,
    Normalised,
    ByPlace,
    SaysCoupled,
    HandsBackASum,
    PacksInSilence,
    LeavesOutTokens,
    Forgets,
    ForgetsAfterSteps,
    MovesWithinSteps,
    OncePerSequence,
    OnTheFirstRank,
    OftenOnTheFirstRank,
)


@hookimpl
def register_plugins(register):
    for loss in BROKEN:
        if loss.declared_fault() is None:
            register(loss)
