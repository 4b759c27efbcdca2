"""A small float64 batch for two models, and losses that only tests have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo import (
    Batch,
    Head,
    Logits,
    Loss,
    ModelInfo,
    ModelPair,
    Needs,
    NoParams,
    Side,
    Step,
    Stream,
    Terms,
    ops,
    visit,
)
from kdzoo.step.distiller import Distiller
from kdzoo.step.inputs import PassInputs
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Report

S, D = 5, 6  # widths of student and teacher
V, W = 9, 11  # their vocabularies with two tokenizers; with one, both have V
SAME = ([4, 1, 6], [4, 1, 6])  # tokens of each sequence, student and teacher
TWO = ([4, 1, 6], [5, 1, 3])


def make_side(tokens: Sequence[int], vocabulary: int, span: Tensor | None = None, prompt: int = 2) -> Side:
    """Sequences of a `prompt` and so many scored tokens, with random tokens."""
    length = prompt + max(tokens, default=0)
    ids = torch.randint(vocabulary, (len(tokens), length))
    place = torch.cat([b * length + prompt - 1 + torch.arange(n) for b, n in enumerate(tokens)]).long()
    return Side(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        positions=place,
        labels=torch.randint(vocabulary, (len(place),)),
        inputs=ids.flatten()[place],
        sample=place // length,
        span=torch.full_like(place, -1) if span is None else span,
    )


Losses = Mapping[str, tuple[Loss, float]]
"""LossTerm -> a loss and its weight."""


@dataclass
class Outcome:
    loss: Tensor
    gradients: dict[str, Tensor]
    report: Report = field(default_factory=Report)
    facts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def terms(self) -> dict[str, Tensor]:
        return self.report.terms

    def assert_close(self, other: Outcome, tolerance: float = 1e-12) -> None:
        """A gradient that one side does not have must be zero on the other."""
        torch.testing.assert_close(self.loss, other.loss, rtol=tolerance, atol=tolerance)
        for name in self.gradients.keys() | other.gradients.keys():
            given = self.gradients.get(name), other.gradients.get(name)
            zero = torch.zeros_like(next(g for g in given if g is not None))
            mine, yours = (zero if g is None else g for g in given)
            torch.testing.assert_close(mine, yours, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@dataclass
class Setting:
    """Leaves and a batch; `run` sends losses through the pass, `naive` differentiates a formula of the leaves."""

    batch: Batch
    hidden: Tensor  # [N, S]
    teacher_hidden: Tensor  # [M, D]
    head: Head
    teacher_head: Head
    embed: Tensor  # [V, S]
    teacher_embed: Tensor  # [W, D]

    @property
    def pair(self) -> ModelPair:
        return ModelPair(
            student=ModelInfo(self.hidden.shape[1], len(self.head.weight), 1, "test"),
            teacher=ModelInfo(self.teacher_hidden.shape[1], len(self.teacher_head.weight), 1, "test"),
            same_tokens=self.batch.same_tokens,
        )

    def make(
        self, loss: type[Loss], artifacts: Mapping[str, Mapping[str, Tensor]] | None = None, **params: Any
    ) -> Loss:
        """The loss, with weights in the precision of the states."""
        made = loss(loss.Params.model_validate(params), self.pair, artifacts or {})
        return made.to(self.hidden.dtype)

    def logits(self) -> Tensor:
        """The student's, all tokens at once."""
        return self.head.finish(self.hidden @ self.head.weight.T, self.head.bias)

    def teacher_logits(self) -> Tensor:
        return self.teacher_head.finish(self.teacher_hidden @ self.teacher_head.weight.T, self.teacher_head.bias)

    def inputs(self, losses: Losses) -> PassInputs:
        def sites(side: Side, hidden: Tensor, embed: Tensor) -> dict[str, Tensor]:
            return {
                "hidden.last": hidden,
                "embed.input": embed[side.inputs],
                "embed.target": embed[side.labels],
            }

        assert self.batch.student is not None and self.batch.teacher is not None
        return PassInputs(
            self.batch,
            sites(self.batch.student, self.hidden, self.embed),
            sites(self.batch.teacher, self.teacher_hidden, self.teacher_embed),
            {"student": self.head, "teacher": self.teacher_head},
            {name: weight for name, (_, weight) in losses.items()},
            Report(),
        )

    def score(self, losses: Losses, chunk_tokens: int | None = None) -> tuple[Tensor, PassInputs]:
        """The loss, not yet differentiated."""
        inputs = self.inputs(losses)
        return distiller(losses, chunk_tokens).score(inputs), inputs

    def run(self, losses: Losses, chunk_tokens: int | None = None) -> Outcome:
        self.forget(losses)
        loss, inputs = self.score(losses, chunk_tokens)
        loss.backward()
        facts = {name: step.facts for name, step in inputs.steps.items()}
        return Outcome(loss.detach(), self.gradients(losses), inputs.report, facts)

    def part(self, sequences: Sequence[int]) -> Setting:
        """These sequences as a micro-batch, with the denominators of the whole."""
        batch = self.batch
        assert batch.student is not None and batch.teacher is not None
        student, kept = _sequences(batch.student, sequences)
        teacher, teacher_kept = _sequences(batch.teacher, sequences)
        new_row, new_teacher_row = kept.cumsum(0) - 1, teacher_kept.cumsum(0) - 1
        pairs = batch.pairs[kept[batch.pairs[:, 0]]]
        pairs = torch.stack([new_row[pairs[:, 0]], new_teacher_row[pairs[:, 1]]], dim=1)
        return replace(
            self,
            batch=replace(batch, student=student, teacher=teacher, pairs=pairs),
            hidden=self.hidden[kept],
            teacher_hidden=self.teacher_hidden[teacher_kept],
        )

    def naive(self, formula: Callable[[], Tensor], losses: Losses | None = None) -> Outcome:
        self.forget(losses or {})
        loss = formula()
        loss.backward()
        return Outcome(loss.detach(), self.gradients(losses or {}))

    def _leaves(self, losses: Losses) -> dict[str, Tensor]:
        leaves = {"hidden": self.hidden, "head.weight": self.head.weight}
        if self.head.bias is not None:
            leaves["head.bias"] = self.head.bias
        for slot, (loss, _) in losses.items():
            leaves |= {f"{slot}.{name}": parameter for name, parameter in loss.named_parameters()}
        return leaves

    def forget(self, losses: Losses) -> None:
        for leaf in self._leaves(losses).values():
            leaf.grad = None

    def gradients(self, losses: Losses) -> dict[str, Tensor]:
        return {n: leaf.grad.clone() for n, leaf in self._leaves(losses).items() if leaf.grad is not None}


def distiller(losses: Losses, chunk_tokens: int | None = None) -> Distiller:
    """Losses alone, in chunks of so many tokens of both models."""
    size = {} if chunk_tokens is None else {"chunk_bytes": 4 * chunk_tokens * (V + W)}
    terms = [LossTerm.of(name, loss) for name, (loss, _) in losses.items()]
    return Distiller(None, None, None, terms, **size)


def _sequences(side: Side, sequences: Sequence[int]) -> tuple[Side, Tensor]:
    """The side of these sequences alone (in ascending order), and which tokens they hold."""
    chosen = torch.tensor(sequences)
    kept = torch.isin(side.sample, chosen)
    sample = torch.searchsorted(chosen, side.sample[kept])
    length = side.input_ids.shape[1]
    part = Side(
        side.input_ids[chosen],
        side.attention_mask[chosen],
        side.positions[kept] % length + sample * length,
        side.labels[kept],
        side.inputs[kept],
        sample,
        side.span[kept],
    )
    return part, kept


def make_setting(
    same_tokens: bool = True,
    tokens: tuple[Sequence[int], Sequence[int]] | None = None,
    *,
    bias: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Setting:
    """Two models' tokens; with two tokenizers, some tokens are pairs and most lie in spans."""
    torch.manual_seed(seed)
    student_tokens, teacher_tokens = tokens or (SAME if same_tokens else TWO)
    student = make_side(student_tokens, V)
    if same_tokens:
        teacher = replace(student)
        n = len(student)
        pairs = torch.arange(n)[:, None].expand(n, 2)
    else:
        teacher = make_side(teacher_tokens, W)
        pairs = torch.empty(0, 2, dtype=torch.long)
    width = V if same_tokens else W

    def weight(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, dtype=torch.float64).to(dtype))

    head = Head(weight(V, S), weight(V) if bias else None, scale, soft_cap)
    teacher_head = Head(weight(width, D).requires_grad_(False))
    batch = Batch(student, teacher, pairs, same_tokens, {})
    batch = replace(batch, counts=batch.local_counts())
    hidden = torch.randn(len(student), S, dtype=torch.float64).to(dtype).requires_grad_()
    return Setting(
        batch,
        hidden,
        torch.randn(len(teacher), D, dtype=torch.float64).to(dtype),
        head,
        teacher_head,
        torch.randn(V, S, dtype=torch.float64).to(dtype),
        torch.randn(width, D, dtype=torch.float64).to(dtype),
    )


def make_paired_setting(seed: int = 0) -> Setting:
    """Two tokenizers by hand: sequence 0 has 4 / 5 tokens, 1 has 1 / 1, 2 has 6 / 3."""
    setting = make_setting(same_tokens=False, seed=seed)
    batch = setting.batch
    assert batch.student is not None and batch.teacher is not None
    # Sequence 0: tokens 0 | 0, then 1 2 | 1, then 3 | 2 3; teacher token 4 alone.
    # Sequence 1: 4 | 5. Sequence 2: 5 6 7 | 6, then 8 | 7; 9, 10 and teacher token 8 alone.
    student = replace(batch.student, span=torch.tensor([0, 1, 1, 2, 3, 4, 4, 4, 5, -1, -1]))
    teacher = replace(batch.teacher, span=torch.tensor([0, 1, 2, 2, -1, 3, 4, 5, -1]))
    pairs = torch.tensor([[0, 0], [4, 5], [8, 7]])
    batch = replace(batch, student=student, teacher=teacher, pairs=pairs)
    return replace(setting, batch=replace(batch, counts=batch.local_counts()))


class TestLoss(Loss):
    """What the losses below have in common: no paper, no parameters."""

    __test__ = False
    paper = "none"
    formula = "none"


class Gold(TestLoss):
    """Cross-entropy as a plain sum."""

    name = "gold"

    @visit
    def gold(self, student: Logits) -> Terms:
        return Terms().add("nll", ops.cross_entropy(student.logprobs(), student.labels))


class GoldTokens(TestLoss):
    """Cross-entropy as values of tokens, added up afterwards."""

    name = "gold_tokens"

    @visit(kind="tokens")
    def gold(self, student: Logits) -> Mapping[str, Tensor]:
        return {"nll": ops.cross_entropy(student.logprobs(), student.labels)}

    def finish(self, step: Step) -> Terms:
        return Terms().add("nll", step.values["gold.nll"])


class Worst(GoldTokens):
    """log mean exp of each sequence's cross-entropies: no sum over tokens."""

    name = "worst"

    def finish(self, step: Step) -> Terms:
        return Terms().add("worst", log_mean_exp(step.values["gold.nll"], step.student.side), per="sequences")


def log_mean_exp(values: Tensor, side: Side) -> Tensor:
    """[sequences]"""
    return torch.stack([values[side.sample == b].exp().mean().log() for b in side.sample.unique()])


class Truncated(TestLoss):
    """KL over the first entries of both vocabularies, on pairs."""

    name = "truncated"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(aligned=True)

    @visit
    def pairs(self, student: Logits, teacher: Logits) -> Terms:
        return Terms().add("kl", truncated_kl(student.logits, teacher.logits), per="pairs")


class TruncatedTokens(TestLoss):
    """The same as values: their order is that of the pairs."""

    name = "truncated_tokens"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(aligned=True)

    @visit(kind="tokens")
    def pairs(self, student: Logits, teacher: Logits) -> Mapping[str, Tensor]:
        return {"kl": truncated_kl(student.logits, teacher.logits)}

    def finish(self, step: Step) -> Terms:
        return Terms().add("kl", step.values["pairs.kl"], per="pairs")


def truncated_kl(student: Tensor, teacher: Tensor) -> Tensor:
    entries = min(student.shape[-1], teacher.shape[-1]) - 1
    log_q, log_p = student[:, :entries].log_softmax(-1), teacher[:, :entries].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class OnWrong(TestLoss):
    """Cross-entropy where the teacher is wrong, and of a shifted student state there: waits for facts."""

    name = "on_wrong"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"hidden.last"}), facts=frozenset({"teacher.correct"}))

    def build(self, student: ModelInfo, teacher: ModelInfo, artifacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.shift = nn.Linear(student.width, student.width)

    def streams_after_facts(self, step: Step) -> Mapping[str, Stream]:
        wrong = ~step.facts["teacher.correct"]
        shifted, labels = self.shift(step.student["hidden.last"])[wrong], step.student.labels[wrong]
        return {"shifted": Stream(shifted, head="student", labels=labels, learns_head=True)}

    @visit
    def seen(self, student: Logits) -> Terms:
        nll = ops.cross_entropy(student.logprobs(), student.labels)
        return Terms().add("seen", torch.where(student.fact("teacher.correct"), 0.0, nll))

    @visit
    def wrong(self, shifted: Logits) -> Terms:
        return Terms().add("shifted", ops.cross_entropy(shifted.logprobs(), shifted.labels))


class Crossed(TestLoss):
    """Own streams beside both models' tokens, each seen beside the model and beside the other's tokens."""

    name = "crossed"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"hidden.last"}), teacher=frozenset({"hidden.last"}), aligned=True)

    def build(self, student: ModelInfo, teacher: ModelInfo, artifacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.of_student = nn.Linear(student.width, student.width)
        self.of_teacher = nn.Linear(teacher.width, teacher.width)

    def streams(self, step: Step) -> Mapping[str, Stream]:
        mine, theirs = self.of_student(step.student["hidden.last"]), self.of_teacher(step.teacher["hidden.last"])
        return {
            "mine": Stream(mine, head="student", beside="student", learns_head=True),
            "theirs": Stream(theirs, head="teacher", beside="teacher"),
        }

    @visit
    def students(self, student: Logits, mine: Logits) -> Terms:
        return Terms().add("students", ops.forward_kl(mine.logprobs(), student.logprobs(2.0)))

    @visit
    def teachers(self, teacher: Logits, theirs: Logits) -> Terms:
        return Terms().add("teachers", ops.reverse_kl(teacher.logprobs(), theirs.logprobs()), per="teacher_tokens")

    @visit
    def both(self, student: Logits, theirs: Logits) -> Terms:
        return Terms().add("both", truncated_kl(student.logits, theirs.logits), per="pairs")

    def naive(self, setting: Setting) -> Tensor:
        batch, head, teacher_head = setting.batch, setting.head, setting.teacher_head
        mine = self.of_student(setting.hidden) @ head.weight.T
        theirs = self.of_teacher(setting.teacher_hidden) @ teacher_head.weight.T
        q = (setting.logits() / 2.0).log_softmax(-1)
        log_m, log_t, log_p = (x.log_softmax(-1) for x in (mine, theirs, setting.teacher_logits()))
        students = (log_m.exp() * (log_m - q)).sum() / batch.counts["tokens"]
        teachers = (log_t.exp() * (log_t - log_p)).sum() / batch.counts["teacher_tokens"]
        pairs = truncated_kl(setting.logits()[batch.pairs[:, 0]], theirs[batch.pairs[:, 1]])
        return students + teachers + pairs.sum() / batch.counts["pairs"]
