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
    RanksFirst,
    Side,
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
    deviations = (
        "There is no code to differ from: the authors published none. The formula was checked against an "
        'independent computation in float64; `reconstruction_weight` and `init` "pca" are not the paper\'s.',
    )

    class Params(Params):
        width: int = Field(64, ge=1)
        """A, the low width."""
        rows: Literal["sequence", "response"] = "sequence"
        """Which tokens are reconstructed: all real ones, prompts included, or those of the responses."""
        target: Literal["label", "teacher"] = "label"
        """What the reconstructed state must predict: the gold token, or the teacher's own prediction."""
        reconstruction_weight: float = Field(0.0, ge=0)
        """Weight of the mean of |P_AT P_TA h - h|^2 over the teacher's mean of |h|^2, beside the cross-entropy. The
        paper's formulas have none."""
        init: Literal["linear", "pca"] = "linear"
        """Where the projectors start: at random as linear layers do, or at the leading directions of the teacher's
        states (ours)."""

    @classmethod
    def needs(cls, params: Projectors.Params, same_tokens: bool) -> Needs:
        return Needs(
            teacher=frozenset({"hidden.last"}),
            streams=(
                OwnStream("reconstructed", "teacher", head="teacher"),
                OwnStream("pca", "teacher", head="teacher"),
            ),
            visits=(
                Visit("next_token", ("reconstructed",) if params.target == "label" else ("teacher", "reconstructed")),
                Visit("agreement", ("teacher", "reconstructed", "pca"), report_only=True),
            ),
            survey=True,
            rows=params.rows,
        )

    def __init__(
        self, params: Projectors.Params, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        super().__init__(params, models, artefacts)
        assert models.teacher is not None
        d, low = models.teacher.width, params.width
        self.teacher_to_low = nn.Linear(d, low, bias=False)
        self.low_to_teacher = nn.Linear(low, d, bias=False)
        # Principal components of the teacher's states: what the projectors must beat.
        self.register_buffer("pca_mean", torch.zeros(d), persistent=False)
        self.register_buffer("pca_directions", torch.zeros(min(low, d), d), persistent=False)
        self.register_buffer("mean_square", torch.ones(()), persistent=False)

    def survey(self, batch: Batch, teacher: View) -> dict[str, Tensor]:
        h = teacher["hidden.last"].double()
        return {"count": h.new_tensor(float(len(h))), "sum": h.sum(0), "moment": h.T @ h}

    def prepare(self, sums: Mapping[str, Tensor]) -> None:
        mean, moment = sums["sum"] / sums["count"], sums["moment"] / sums["count"]
        self.pca_mean.copy_(mean)
        self.pca_directions.copy_(self.leading(moment - torch.outer(mean, mean)))
        self.mean_square.copy_(moment.trace())
        if self.params.init == "pca":
            directions = self.leading(moment)  # not centred: the projectors have no bias
            with torch.no_grad():
                self.teacher_to_low.weight[: len(directions)] = directions.to(self.teacher_to_low.weight)
                self.low_to_teacher.weight.zero_()
                self.low_to_teacher.weight[:, : len(directions)] = directions.T.to(self.low_to_teacher.weight)

    def leading(self, moment: Tensor) -> Tensor:
        """The eigenvectors of the largest eigenvalues, largest first [min(A, D), D]."""
        return torch.linalg.eigh(moment).eigenvectors.T.flip(0)[: self.params.width]

    def reconstruct(self, hidden: Tensor) -> Tensor:
        return self.low_to_teacher(self.teacher_to_low(hidden))

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> dict[str, Own]:
        hidden = teacher["hidden.last"]
        pca = self.pca_mean + (hidden - self.pca_mean) @ self.pca_directions.T @ self.pca_directions
        return {"reconstructed": Own(self.reconstruct(hidden)), "pca": Own(pca)}

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        if visit == "agreement":
            top = chunk.logits("teacher").argmax(-1)
            agree, pca = (ops.is_top(chunk.logits(name), top) for name in ("reconstructed", "pca"))
            terms = Terms().watch("teacher_agreement", agree.sum(), len(top))
            return terms.watch("teacher_agreement_of_pca", pca.sum(), len(top))
        labels = chunk.labels("reconstructed")
        target = labels if self.params.target == "label" else chunk.logits("teacher").argmax(-1)
        nll = ops.cross_entropy(chunk.logprobs("reconstructed"), target)
        return Terms().add("cross_entropy", nll.sum(), per="teacher_rows")

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        hidden = teacher["hidden.last"]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        error = (self.reconstruct(hidden) - hidden).to(wide).square().sum()
        terms = Terms().watch("relative_error", error, hidden.to(wide).square().sum())
        if self.params.reconstruction_weight:
            # Over the mean square of the survey: this batch's own would make the loss depend on how it is split.
            relative = error / self.mean_square.to(wide).clamp_min(torch.finfo(wide).tiny)
            terms.add("reconstruction", self.params.reconstruction_weight * relative, per="teacher_rows")
        return terms


class Residual(Loss):
    """Stage 2: on rows that the teacher gets wrong, cross-entropy of h - beta u, u the teacher's state brought to S."""

    name = "residual"
    paper = PAPER
    formula = "L_res = - 1/N sum_i log softmax(W_S (h_i - beta wrong_i P_AS z_i))[y_i],  z = P_TA h_T"
    deviations = (
        "There is no code to differ from: the authors published none. The formula was checked against an "
        "independent computation in float64, and every point that the paper leaves open is a parameter.",
        "A row whose |u| is less than a millionth of its sequence's mean has no direction: it gets no residual "
        "and has no part in beta.",
    )

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
        indicator: Literal["hard", "soft", "all", "random"] = "hard"
        """How much of the residual a row gets. "hard": all of it where the teacher is wrong. "soft": one minus the
        teacher's probability of the gold token. "all": every row all of it (no mask). "random": as many rows as "hard"
        in every sequence, but others, drawn once and for all from what the sequence says (a control)."""
        temperature: float = Field(1.0, gt=0)
        """Divides the teacher's logits for the probability of the soft indicator."""
        top_k: int = Field(1, ge=1)
        """The teacher is right where the gold token is among its k likeliest."""
        pretrained: bool = True
        """Whether P_TA starts as stage 1 left it, or as a linear layer of the same width."""
        projector: Literal["frozen", "trained"] = "frozen"
        """Whether P_TA is trained on in this stage."""
        direction: Literal["learned", "random"] = "learned"
        """"random": P_AS stays as it is drawn, so that u is a fixed random projection of z, of the norm that beta gives
        it (a control)."""
        normalise: Literal["std", "l2", "none"] = "std"
        """How queries and keys are normalised over their A features (two tokenizers)."""
        attend: Literal["response", "sequence"] = "response"
        """The teacher's rows that may be attended to: the response's, or the prompt's as well (two tokenizers)."""
        wrong: Literal["by_bytes", "attention", "projected", "entropy"] = "by_bytes"
        """How a student row knows that the teacher was wrong (two tokenizers). "by_bytes": some teacher token of the
        span that covers the same text was wrong. "attention": more than half of its attention lies on wrong rows.
        "projected": the student's head does not put the gold token first, given u. "entropy": the attended entropy of
        the teacher's predictions is over half of log W. The soft indicator is then the span's, the attended one, or the
        attended entropy over log W; "projected" has no soft form and stays hard."""

        @property
        def verdict(self) -> str:
            """The fact that says where the teacher is right."""
            return "teacher.correct" if self.top_k == 1 else f"teacher.correct@{self.top_k}"

        @property
        def gold_logprob(self) -> str:
            """The fact that a soft indicator is made from."""
            return "teacher.label_logprob" if self.temperature == 1 else f"teacher.label_logprob@{self.temperature}"

        @property
        def on_wrong_rows_alone(self) -> bool:
            """Whether all other rows are the student's own, whose cross-entropy the pass has anyway."""
            return self.indicator == "hard" and self.head_gradient

    @classmethod
    def needs(cls, params: Residual.Params, same_tokens: bool) -> Needs:
        facts = [params.verdict]
        if params.indicator == "soft" and (same_tokens or params.wrong != "projected"):
            facts.append(params.gold_logprob)
        if params.wrong == "entropy" and not same_tokens:
            facts.append("teacher.entropy")
        names = ["wrong"] if params.on_wrong_rows_alone else ["wrong", "right"]
        everywhere = {"hidden.last@all"} if params.attend == "sequence" and not same_tokens else set()
        return Needs(
            student=frozenset({"hidden.last"}),
            teacher=frozenset({"hidden.last"} | everywhere),
            facts=tuple(facts),
            streams=tuple(OwnStream(n, "own", head="student", learns_head=params.head_gradient) for n in names),
            visits=(
                Visit("own", ("student",), facts=(params.verdict,)),
                *(Visit(f"residual_{name}", (name,)) for name in names),
            ),
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
        if params.pretrained:
            self.teacher_to_low.load_state_dict({"weight": projector})
        self.teacher_to_low.requires_grad_(params.projector == "trained")
        self.low_to_student = nn.Linear(self.width, s, bias=False)  # P_AS
        self.low_to_student.requires_grad_(params.direction == "learned")
        if not models.same_tokens:
            self.student_to_low = nn.Linear(s, self.width, bias=False)  # P_SA

    # The teacher's states on student rows.

    def attended(self, student: View, teacher: View, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each student row gathers from the teacher's rows of its sequence, and the entropy of its attention [N].

        Of the low states: [N, A]; or of `values` [M, c], which are 0 on a prompt.
        """
        side, hidden = teacher.side, teacher["hidden.last"]
        if self.params.attend == "sequence":
            side = teacher.side.every_token()
            hidden = teacher["hidden.last@all"][side.rows]
            if values is not None:
                everywhere = values.new_zeros(teacher.side.input_ids.numel(), values.shape[-1])
                values = everywhere.index_copy(0, teacher.side.rows, values)[side.rows]
        h, z = student["hidden.last"], self.teacher_to_low(hidden)
        query = self.normalised(self.student_to_low(h if self.params.state_gradient else h.detach()))
        return ops.attend(query, self.normalised(z), z if values is None else values, student.side, side)

    def normalised(self, x: Tensor) -> Tensor:
        """Over the A features of each row."""
        if self.params.normalise == "none":
            return x
        if self.params.normalise == "l2":
            return math.sqrt(self.width) * F.normalize(x, dim=-1)
        spread = (x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / max(self.width - 1, 1)
        return x * torch.where(spread > 0, spread, torch.ones_like(spread)).rsqrt()

    def carry_facts(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], ranks_first: RanksFirst
    ) -> Mapping[str, Tensor]:
        if self.params.wrong == "by_bytes":
            return super().carry_facts(batch, student, teacher, facts, ranks_first)
        with torch.no_grad():
            if self.params.wrong == "projected":
                z, _ = self.attended(student, teacher)
                doubt = soft = (~ranks_first(self.low_to_student(z), student.labels)).float()
            else:
                if self.params.wrong == "entropy":
                    assert self.models.teacher is not None
                    hard = graded = facts["teacher.entropy"] / math.log(self.models.teacher.vocabulary)
                else:
                    hard = (~facts[self.params.verdict]).float()
                    graded = -facts[self.params.gold_logprob].expm1() if self.params.indicator == "soft" else hard
                doubt, soft = self.attended(student, teacher, torch.stack([hard, graded], -1))[0].unbind(-1)
            carried = {self.params.verdict: doubt <= 0.5}
            if self.params.indicator == "soft":
                carried[self.params.gold_logprob] = (-soft.clamp(0, 1)).log1p()
        return carried

    # The residual state.

    def indicator(self, student: View, facts: Mapping[str, Tensor]) -> Tensor:
        """How much of the residual each row gets [N]."""
        wrong = (~facts[self.params.verdict]).to(student["hidden.last"].dtype)
        match self.params.indicator:
            case "soft":
                return -facts[self.params.gold_logprob].expm1().to(wrong.dtype)
            case "all":
                return torch.ones_like(wrong)
            case "random":
                return torch.empty_like(wrong).index_copy_(0, shuffled_rows(student.side), wrong)
        return wrong

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

    def parts(self, student: View, teacher: View) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """h [N, S], u [N, S], beta [N], which rows have a usable u [N], and attention's entropy [N] where it aligns."""
        h, entropy = student["hidden.last"], None
        h = h if self.params.state_gradient else h.detach()
        if self.models.same_tokens:
            z = self.teacher_to_low(teacher["hidden.last"])
        else:
            z, entropy = self.attended(student, teacher)
        u = self.low_to_student(z)
        if not self.params.beta_gradient:
            h_norm, u_norm = h.detach().norm(dim=-1), u.detach().norm(dim=-1)
        else:
            h_norm, u_norm = h.norm(dim=-1), u.norm(dim=-1)
        # A row whose u vanishes beside its sequence's has no direction: no residual, and no part in the mean.
        usable = u_norm.detach() > 1e-6 * ops.sequence_mean(u_norm.detach(), student.side)
        return h, u, self.beta(h_norm, u_norm, usable, student), usable, entropy

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> dict[str, Own]:
        h, u, beta, usable, _ = self.parts(student, teacher)
        share = self.indicator(student, facts)
        # Never 0 times something infinite; and a row without a residual is exactly the student's own.
        shifts = (usable & (share > 0))[:, None]
        shift = torch.where(shifts, (beta * share)[:, None] * u, torch.zeros_like(u)).to(h.dtype)
        r = torch.where(shifts, h - shift, student["hidden.last"])
        right = facts[self.params.verdict]
        found = {"wrong": Own(r[~right], student.labels[~right])}
        return found if self.params.on_wrong_rows_alone else found | {"right": Own(r[right], student.labels[right])}

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        if visit != "own":
            rows = visit.removeprefix("residual_")
            nll = ops.cross_entropy(chunk.logprobs(rows), chunk.labels(rows))
            return Terms().add(f"{rows}_rows", nll.sum()).watch(f"residual_cross_entropy_{rows}", nll.sum(), len(nll))
        nll = ops.cross_entropy(chunk.logprobs("student"), chunk.labels("student"))
        right = chunk.facts[self.params.verdict]
        on_right = torch.where(right, nll, torch.zeros_like(nll)).sum()
        on_wrong = torch.where(right, torch.zeros_like(nll), nll).sum()
        terms = Terms().watch("student_cross_entropy_right", on_right, right.sum())
        terms.watch("student_cross_entropy_wrong", on_wrong, (~right).sum())
        # Rows that the teacher gets right have no residual: their state, and so their loss, is the student's own.
        return terms.add("right_rows", on_right) if self.params.on_wrong_rows_alone else terms

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        with torch.no_grad():
            h, u, beta, usable, entropy = self.parts(student, teacher)
            n = len(h)
            terms = (
                Terms()
                .watch("wrong_share", (~facts[self.params.verdict]).sum(), n)
                .watch("residual_share", self.indicator(student, facts).sum(), n)
                .watch("beta", beta.sum(), n)
                .watch("state_norm", h.norm(dim=-1).sum(), n)
                .watch("residual_norm", (beta * u.norm(dim=-1)).sum(), n)
                .watch("state_residual_cosine", F.cosine_similarity(h, u, dim=-1).sum(), n)
                .watch("rows_without_direction", (~usable).sum(), n)
            )
        return terms if entropy is None else terms.watch("attention_entropy", entropy.sum(), n)


def shuffled_rows(side: Side) -> Tensor:
    """Each row's new place [N]: a permutation within every sequence that follows from its tokens alone."""
    # Integer hashing (xor, shift, multiply): the same on every machine, rank and split.
    key = side.labels * 0x9E3779B1 + side.inputs * 0x85EBCA77 + (ops.places_within(side) + 1) * 0xC2B2AE3D
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        key = ((key ^ (key >> 15)) & 0xFFFFFFFF) * multiplier
    order = ((key ^ (key >> 16)) & 0xFFFFFFFF).argsort(stable=True)
    return order[side.sample[order].argsort(stable=True)]


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(Projectors)
    register(Residual)
