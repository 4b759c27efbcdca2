"""A small float64 batch for two models, and losses that only tests have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo import (
    Batch,
    Chunk,
    Head,
    Loss,
    ModelFacts,
    Models,
    Needs,
    NoParams,
    Own,
    OwnStream,
    Side,
    Terms,
    View,
    Visit,
    ops,
)
from kdzoo.step.distiller import Distiller
from kdzoo.step.report import Report
from kdzoo.step.vocabulary import Call, Slot

S, D = 5, 6  # widths of student and teacher
V, W = 9, 11  # their vocabularies with two tokenizers; with one, both have V
SAME = ([4, 1, 6], [4, 1, 6])  # rows of each sequence, student and teacher
TWO = ([4, 1, 6], [5, 1, 3])


def make_side(rows: Sequence[int], vocabulary: int, span: Tensor | None = None, prompt: int = 2) -> Side:
    """Sequences of a `prompt` and so many scored rows, with random tokens."""
    length = prompt + max(rows, default=0)
    ids = torch.randint(vocabulary, (len(rows), length))
    place = torch.cat([b * length + prompt - 1 + torch.arange(n) for b, n in enumerate(rows)]).long()
    return Side(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        rows=place,
        labels=torch.randint(vocabulary, (len(place),)),
        inputs=ids.flatten()[place],
        sample=place // length,
        span=torch.full_like(place, -1) if span is None else span,
    )


Losses = Mapping[str, tuple[Loss, float]]
"""Slot -> a loss and its weight."""


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
    def models(self) -> Models:
        return Models(
            teacher=ModelFacts(self.teacher_hidden.shape[1], len(self.teacher_head.weight), 1, "test"),
            student=ModelFacts(self.hidden.shape[1], len(self.head.weight), 1, "test"),
            same_tokens=self.batch.same_tokens,
        )

    def make(
        self, loss: type[Loss], artefacts: Mapping[str, Mapping[str, Tensor]] | None = None, **params: Any
    ) -> Loss:
        """The loss, with weights in the precision of the states."""
        made = loss(loss.Params.model_validate(params), self.models, artefacts or {})
        return made.to(self.hidden.dtype)

    def logits(self) -> Tensor:
        """The student's, all rows at once."""
        return self.head.finish(self.hidden @ self.head.weight.T, self.head.bias)

    def teacher_logits(self) -> Tensor:
        return self.teacher_head.finish(self.teacher_hidden @ self.teacher_head.weight.T, self.teacher_head.bias)

    def call(self, losses: Losses) -> Call:
        def sites(side: Side, hidden: Tensor, embed: Tensor) -> dict[str, Tensor]:
            return {
                "hidden.last": hidden,
                "embed.input": embed[side.inputs],
                "embed.target": embed[side.labels],
            }

        assert self.batch.student is not None and self.batch.teacher is not None
        return Call(
            self.batch,
            sites(self.batch.student, self.hidden, self.embed),
            sites(self.batch.teacher, self.teacher_hidden, self.teacher_embed),
            {"student": self.head, "teacher": self.teacher_head},
            {name: weight for name, (_, weight) in losses.items()},
            Report(),
        )

    def score(self, losses: Losses, chunk_rows: int | None = None) -> tuple[Tensor, Call]:
        """The loss, not yet differentiated."""
        same = self.batch.same_tokens
        slots = [Slot(name, loss, loss.needs(loss.params, same)) for name, (loss, _) in losses.items()]
        size = {} if chunk_rows is None else {"chunk_bytes": 4 * chunk_rows * (V + W)}
        call = self.call(losses)
        return Distiller(None, None, slots, **size).score(call), call

    def run(self, losses: Losses, chunk_rows: int | None = None) -> Outcome:
        self.forget(losses)
        loss, call = self.score(losses, chunk_rows)
        loss.backward()
        return Outcome(loss.detach(), self.gradients(losses), call.report, call.facts)

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


def _sequences(side: Side, sequences: Sequence[int]) -> tuple[Side, Tensor]:
    """The side of these sequences alone (in ascending order), and which rows they hold."""
    chosen = torch.tensor(sequences)
    kept = torch.isin(side.sample, chosen)
    sample = torch.searchsorted(chosen, side.sample[kept])
    length = side.input_ids.shape[1]
    part = Side(
        side.input_ids[chosen],
        side.attention_mask[chosen],
        side.rows[kept] % length + sample * length,
        side.labels[kept],
        side.inputs[kept],
        sample,
        side.span[kept],
    )
    return part, kept


def make_setting(
    same_tokens: bool = True,
    rows: tuple[Sequence[int], Sequence[int]] | None = None,
    *,
    bias: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Setting:
    """Two models' rows; with two tokenizers, some rows are pairs and most lie in spans."""
    torch.manual_seed(seed)
    student_rows, teacher_rows = rows or (SAME if same_tokens else TWO)
    student = make_side(student_rows, V)
    if same_tokens:
        teacher = replace(student)
        n = len(student)
        pairs = torch.arange(n)[:, None].expand(n, 2)
    else:
        teacher = make_side(teacher_rows, W)
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
    """Two tokenizers by hand: sequence 0 has 4 / 5 rows, 1 has 1 / 1, 2 has 6 / 3."""
    setting = make_setting(same_tokens=False, seed=seed)
    batch = setting.batch
    assert batch.student is not None and batch.teacher is not None
    # Sequence 0: rows 0 | 0, then 1 2 | 1, then 3 | 2 3; teacher row 4 alone.
    # Sequence 1: 4 | 5. Sequence 2: 5 6 7 | 6, then 8 | 7; 9, 10 and teacher row 8 alone.
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

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("gold", ("student",)),))

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        return Terms().add("nll", ops.cross_entropy(chunk.logprobs("student"), chunk.labels("student")).sum())


class GoldRows(TestLoss):
    """Cross-entropy as values of rows, added up afterwards."""

    name = "gold_rows"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("gold", ("student",), kind="rows"),))

    def over_vocab(self, visit: str, chunk: Chunk) -> Mapping[str, Tensor]:
        return {"nll": ops.cross_entropy(chunk.logprobs("student"), chunk.labels("student"))}

    def combine(
        self,
        batch: Batch,
        student: View,
        teacher: View,
        facts: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
    ) -> Terms:
        return Terms().add("nll", rows["gold.nll"].sum())


class Worst(GoldRows):
    """log mean exp of each sequence's cross-entropies: no sum over rows."""

    name = "worst"

    def combine(
        self,
        batch: Batch,
        student: View,
        teacher: View,
        facts: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
    ) -> Terms:
        return Terms().add("worst", log_mean_exp(rows["gold.nll"], student.side).sum(), per="sequences")


def log_mean_exp(values: Tensor, side: Side) -> Tensor:
    """[sequences]"""
    return torch.stack([values[side.sample == b].exp().mean().log() for b in side.sample.unique()])


class Truncated(TestLoss):
    """KL over the first tokens of both vocabularies, on pairs."""

    name = "truncated"
    kind = "sum"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("pairs", ("student", "teacher"), kind=cls.kind),), aligned=True)

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms | Mapping[str, Tensor]:
        return Terms().add("kl", truncated_kl(chunk.logits("student"), chunk.logits("teacher")).sum(), per="pairs")


class TruncatedRows(Truncated):
    """The same by rows: their order is that of the pairs."""

    name = "truncated_rows"
    kind = "rows"

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms | Mapping[str, Tensor]:
        return {"kl": truncated_kl(chunk.logits("student"), chunk.logits("teacher"))}

    def combine(
        self,
        batch: Batch,
        student: View,
        teacher: View,
        facts: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
    ) -> Terms:
        return Terms().add("kl", rows["pairs.kl"].sum(), per="pairs")


def truncated_kl(student: Tensor, teacher: Tensor) -> Tensor:
    tokens = min(student.shape[-1], teacher.shape[-1]) - 1
    log_q, log_p = student[:, :tokens].log_softmax(-1), teacher[:, :tokens].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class OnWrong(TestLoss):
    """Cross-entropy where the teacher is wrong, and of a projected teacher state there: waits for facts."""

    name = "on_wrong"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(
            student=frozenset({"hidden.last"}),
            facts=("teacher.correct",),
            streams=(OwnStream("shifted", "own", head="student", learns_head=True),),
            visits=(Visit("seen", ("student",), facts=("teacher.correct",)), Visit("wrong", ("shifted",))),
        )

    def __init__(self, params: NoParams, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(params, models, artefacts)
        assert models.student is not None
        self.shift = nn.Linear(models.student.width, models.student.width)

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> Mapping[str, Own]:
        wrong = ~facts["teacher.correct"]
        return {"shifted": Own(self.shift(student["hidden.last"])[wrong], student.labels[wrong])}

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        if visit == "wrong":
            return Terms().add("shifted", ops.cross_entropy(chunk.logprobs("shifted"), chunk.labels("shifted")).sum())
        nll = ops.cross_entropy(chunk.logprobs("student"), chunk.labels("student"))
        return Terms().add("seen", torch.where(chunk.facts["teacher.correct"], 0.0, nll).sum())


class Crossed(TestLoss):
    """Own streams beside both models' rows, each seen beside the model and beside the other's rows."""

    name = "crossed"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(
            student=frozenset({"hidden.last"}),
            teacher=frozenset({"hidden.last"}),
            streams=(
                OwnStream("mine", "student", head="student", learns_head=True),
                OwnStream("theirs", "teacher", head="teacher"),
            ),
            visits=(
                Visit("students", ("student", "mine")),
                Visit("teachers", ("teacher", "theirs")),
                Visit("both", ("student", "theirs")),
            ),
            aligned=True,
        )

    def __init__(self, params: NoParams, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(params, models, artefacts)
        assert models.student is not None and models.teacher is not None
        self.mine = nn.Linear(models.student.width, models.student.width)
        self.theirs = nn.Linear(models.teacher.width, models.teacher.width)

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> Mapping[str, Own]:
        return {
            "mine": Own(self.mine(student["hidden.last"])),
            "theirs": Own(self.theirs(teacher["hidden.last"])),
        }

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        if visit == "students":
            kl = ops.forward_kl(chunk.logprobs("mine"), chunk.logprobs("student", 2.0))
            return Terms().add("students", kl.sum())
        if visit == "teachers":
            kl = ops.reverse_kl(chunk.logprobs("teacher"), chunk.logprobs("theirs"))
            return Terms().add("teachers", kl.sum(), per="teacher_rows")
        return Terms().add("both", truncated_kl(chunk.logits("student"), chunk.logits("theirs")).sum(), per="pairs")

    def naive(self, setting: Setting) -> Tensor:
        batch, head, teacher_head = setting.batch, setting.head, setting.teacher_head
        mine = self.mine(setting.hidden) @ head.weight.T
        theirs = self.theirs(setting.teacher_hidden) @ teacher_head.weight.T
        q = (setting.logits() / 2.0).log_softmax(-1)
        log_m, log_t, log_p = (
            mine.log_softmax(-1),
            theirs.log_softmax(-1),
            setting.teacher_logits().log_softmax(-1),
        )
        students = (log_m.exp() * (log_m - q)).sum() / batch.counts["rows"]
        teachers = (log_t.exp() * (log_t - log_p)).sum() / batch.counts["teacher_rows"]
        pairs = truncated_kl(setting.logits()[batch.pairs[:, 0]], theirs[batch.pairs[:, 1]])
        return students + teachers + pairs.sum() / batch.counts["pairs"]
