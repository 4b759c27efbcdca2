"""Residual learning: where the teacher is wrong, the student learns the residual to it in a low-dimensional space.

Two plugins. `projectors` is the first stage (the teacher alone), `residual` the loss of the second. The paper
published no code; every point that it leaves open is a parameter.

Shapes: N student rows, M teacher rows, S / D student / teacher width, A the low width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdzoo import (
    Batch,
    Chunk,
    Loss,
    Models,
    Needs,
    Own,
    OwnStream,
    Params,
    Terms,
    View,
    Visit,
    hookimpl,
    ops,
)

PAPER = (
    "Knowledge Distillation for Large Language Models through Residual Learning, ICLR 2026, "
    "openreview.net/forum?id=Dh6KxUxG20"
)


class Projectors(Loss):
    """Stage 1: P_TA and P_AT, so that the teacher's head still predicts the next token from P_AT P_TA h."""

    name = "projectors"
    paper = PAPER
    formula = "L_1 = - 1/M sum_j log softmax(W_T P_AT P_TA h_j)[y_j]"

    class Params(Params):
        width: int = Field(64, ge=1)
        """A, the low width."""
        rows: Literal["sequence", "response"] = "sequence"
        """Which tokens are reconstructed: all real ones, prompts included, or those of the responses."""
        target: Literal["label", "teacher"] = "label"
        """What the reconstructed state must predict: the gold token, or the teacher's own prediction."""
        reconstruction_weight: float = Field(0.0, ge=0)
        """Weight of |P_AT P_TA h - h|^2 / |h|^2 beside the cross-entropy. The paper's formulas have none."""

    @classmethod
    def needs(cls, params: Projectors.Params, same_tokens: bool) -> Needs:
        return Needs(
            teacher=frozenset({"hidden.last"}),
            streams=(OwnStream("reconstructed", "teacher", head="teacher"),),
            visits=(
                Visit("next_token", ("reconstructed",) if params.target == "label" else ("teacher", "reconstructed")),
                Visit("agreement", ("teacher", "reconstructed"), report_only=True),
            ),
            rows=params.rows,
        )

    def __init__(
        self, params: Projectors.Params, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        super().__init__(params, models, artefacts)
        assert models.teacher is not None
        self.teacher_to_low = nn.Linear(models.teacher.width, params.width, bias=False)
        self.low_to_teacher = nn.Linear(params.width, models.teacher.width, bias=False)

    def reconstruct(self, hidden: Tensor) -> Tensor:
        return self.low_to_teacher(self.teacher_to_low(hidden))

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> dict[str, Own]:
        return {"reconstructed": Own(self.reconstruct(teacher["hidden.last"]))}

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        if visit == "agreement":
            agree = ops.is_top(chunk.logits("reconstructed"), chunk.logits("teacher").argmax(-1))
            return Terms().watch("teacher_agreement", agree.sum(), len(agree))
        labels = chunk.labels("reconstructed")
        target = labels if self.params.target == "label" else chunk.logits("teacher").argmax(-1)
        nll = ops.cross_entropy(chunk.logprobs("reconstructed"), target)
        return Terms().add("cross_entropy", nll.sum(), per="teacher_rows")

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        hidden = teacher["hidden.last"]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        error = (self.reconstruct(hidden) - hidden).to(wide).square().sum(-1)
        square = hidden.to(wide).square().sum(-1)
        terms = Terms().watch("relative_error", error.sum(), square.sum())
        if self.params.reconstruction_weight:
            relative = (error / square.clamp_min(torch.finfo(square.dtype).tiny)).sum()
            terms.add("reconstruction", self.params.reconstruction_weight * relative, per="teacher_rows")
        return terms


class Residual(Loss):
    """Stage 2: on rows that the teacher gets wrong, cross-entropy of h - beta u, u the teacher's state brought to S."""

    name = "residual"
    paper = PAPER
    formula = "L_res = - 1/N sum_i log softmax(W_S (h_i - beta wrong_i P_AS z_i))[y_i],  z = P_TA h_T"

    class Params(Params):
        width: int | None = Field(None, ge=1)
        """A, the low width, for which the projectors are then trained. Default: that of the `projectors` stage."""
        beta: Literal["sequence", "row", "batch", "none"] | float = "sequence"
        """The scale sqrt(S/A) mean(|h| / |u|): one per sequence, per row, per batch; "none" is 1; or a number."""
        beta_gradient: bool = False
        """Whether beta is differentiated. It is a scale: no."""
        head_gradient: bool = True
        """Whether the student's head learns from L_res at all, on right rows and on wrong ones."""
        state_gradient: bool = True
        """Whether the student's body learns from rows with a residual."""
        normalise: Literal["std", "l2", "none"] = "std"
        """How queries and keys are normalised over their A features (two tokenizers)."""
        wrong: Literal["by_bytes", "attention"] = "by_bytes"
        """How a student row knows that the teacher was wrong (two tokenizers). "by_bytes": some teacher token of the
        span that covers the same text was wrong. "attention": more than half of its attention lies on wrong rows."""

    @classmethod
    def needs(cls, params: Residual.Params, same_tokens: bool) -> Needs:
        return Needs(
            student=frozenset({"hidden.last"}),
            teacher=frozenset({"hidden.last"}),
            facts=("teacher.correct",),
            streams=(OwnStream("residual", "own", head="student", learns_head=params.head_gradient),),
            visits=(Visit("right", ("student",), facts=("teacher.correct",)), Visit("wrong", ("residual",))),
            aligned=not same_tokens and params.wrong == "by_bytes",
            artefacts={"projectors": {} if params.width is None else {"width": params.width}},
            batch_coupled=params.beta == "batch",
        )

    def __init__(self, params: Residual.Params, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(params, models, artefacts)
        assert models.student is not None and models.teacher is not None
        s, projector = models.student.width, artefacts["projectors"]["teacher_to_low.weight"]
        self.width, d = projector.shape  # A
        self.teacher_to_low = nn.Linear(d, self.width, bias=False)  # P_TA, from stage 1
        self.teacher_to_low.load_state_dict({"weight": projector})
        self.teacher_to_low.requires_grad_(False)
        self.low_to_student = nn.Linear(self.width, s, bias=False)  # P_AS
        if not models.same_tokens:
            self.student_to_low = nn.Linear(s, self.width, bias=False)  # P_SA

    # The teacher's states on student rows.

    def attention(self, student: View, teacher: View) -> tuple[Tensor, Tensor]:
        """Weights [B, n, m] of each student row over the teacher rows of its sequence, and the low states [B, m, A]."""
        z = self.teacher_to_low(teacher["hidden.last"])
        query = self.normalised(self.student_to_low(student["hidden.last"]))
        scores = ops.attention_scores(query, self.normalised(z), student.side, teacher.side)
        return scores.softmax(-1), ops.pad_rows(z, teacher.side)[0]

    def normalised(self, x: Tensor) -> Tensor:
        """Over the A features of each row."""
        if self.params.normalise == "none":
            return x
        if self.params.normalise == "l2":
            return math.sqrt(self.width) * F.normalize(x, dim=-1)
        spread = (x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / max(self.width - 1, 1)
        return x * torch.where(spread > 0, spread, torch.ones_like(spread)).rsqrt()

    def low_states(self, student: View, teacher: View) -> Tensor:
        """z [N, A]"""
        if self.models.same_tokens:
            return self.teacher_to_low(teacher["hidden.last"])
        weights, z = self.attention(student, teacher)
        return ops.unpad_rows(weights.to(z.dtype) @ z, student.side)

    def carry_facts(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        if self.params.wrong == "by_bytes":
            return super().carry_facts(batch, student, teacher, facts)
        with torch.no_grad():
            weights, _ = self.attention(student, teacher)
            wrong, _ = ops.pad_rows((~facts["teacher.correct"]).to(weights.dtype)[:, None], teacher.side)
            return {"teacher.correct": ops.unpad_rows(weights @ wrong, student.side).squeeze(-1) <= 0.5}

    # The residual state.

    def beta(self, h_norm: Tensor, u_norm: Tensor, usable: Tensor, student: View) -> Tensor:
        """[N]"""
        if isinstance(self.params.beta, float | int):
            return torch.full_like(h_norm, float(self.params.beta))
        if self.params.beta == "none":
            return torch.ones_like(h_norm)
        ratio = torch.where(usable, h_norm / torch.where(usable, u_norm, torch.ones_like(u_norm)), 0)
        if self.params.beta == "sequence":
            mean = ops.sequence_mean(ratio, student.side, usable)
        elif self.params.beta == "batch":
            mean = (ratio.sum() / usable.sum().clamp_min(1)).expand_as(ratio)
        else:
            mean = ratio
        assert self.models.student is not None
        return math.sqrt(self.models.student.width / self.width) * mean

    def state(self, student: View, teacher: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h [N, S], u [N, S], beta [N], and which rows have a usable u [N]."""
        h = student["hidden.last"]
        u = self.low_to_student(self.low_states(student, teacher))
        if not self.params.beta_gradient:
            h_norm, u_norm = h.detach().norm(dim=-1), u.detach().norm(dim=-1)
        else:
            h_norm, u_norm = h.norm(dim=-1), u.norm(dim=-1)
        # A row whose u vanishes beside its sequence's has no direction: no residual, and no part in the mean.
        usable = u_norm.detach() > 1e-6 * ops.sequence_mean(u_norm.detach(), student.side)
        return h, u, self.beta(h_norm, u_norm, usable, student), usable

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> dict[str, Own]:
        h, u, beta, usable = self.state(student, teacher)
        base = h if self.params.state_gradient else h.detach()
        shift = torch.where(usable[:, None], beta[:, None] * u, torch.zeros_like(u))
        wrong = ~facts["teacher.correct"]
        if not self.params.head_gradient:  # right rows too go through a head that does not learn: all rows are ours
            return {"residual": Own(torch.where(wrong[:, None], base - shift.to(base.dtype), h), student.labels)}
        return {"residual": Own((base - shift.to(base.dtype))[wrong], student.labels[wrong])}

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        if visit == "wrong":
            nll = ops.cross_entropy(chunk.logprobs("residual"), chunk.labels("residual"))
            return Terms().add("wrong_rows" if self.params.head_gradient else "all_rows", nll.sum())
        # Rows that the teacher gets right have no residual: their state, and so their loss, is the student's own.
        nll = ops.cross_entropy(chunk.logprobs("student"), chunk.labels("student"))
        right = chunk.facts["teacher.correct"]
        on_right = torch.where(right, nll, torch.zeros_like(nll)).sum()
        terms = Terms().add("right_rows", on_right) if self.params.head_gradient else Terms()
        return terms.watch("student_cross_entropy_right", on_right, right.sum()).watch(
            "student_cross_entropy_wrong", torch.where(right, torch.zeros_like(nll), nll).sum(), (~right).sum()
        )

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        with torch.no_grad():
            h, u, beta, usable = self.state(student, teacher)
            wrong = ~facts["teacher.correct"]
            n = len(wrong)
            terms = (
                Terms()
                .watch("wrong_share", wrong.sum(), n)
                .watch("beta", beta.sum(), n)
                .watch("state_norm", h.norm(dim=-1).sum(), n)
                .watch("residual_norm", (beta * u.norm(dim=-1)).sum(), n)
                .watch("state_residual_cosine", F.cosine_similarity(h, u, dim=-1).sum(), n)
                .watch("rows_without_direction", (~usable).sum(), n)
            )
            if not self.models.same_tokens:
                weights, _ = self.attention(student, teacher)
                entropy = -(weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(-1)
                terms.watch("attention_entropy", ops.unpad_rows(entropy[..., None], student.side).sum(), n)
        return terms


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(Projectors)
    register(Residual)
