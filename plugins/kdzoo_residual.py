"""Residual learning: where the teacher is wrong, the student learns the residual to it in a low-dimensional space.

Two plugins. `projectors` is the first stage (the teacher alone), `residual` the loss of the second. The paper
published no code; every point that it leaves open is a parameter.

Shapes: N student tokens, M teacher tokens, S / D student / teacher width, A the low width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdzoo import Logits, Loss, Needs, Params, Register, Side, Step, Stream, Terms, View, hookimpl, ops, visit

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
    def needs(cls, params, same_tokens):
        facts = frozenset() if params.target == "label" else frozenset({"teacher.top1"})
        return Needs(teacher=frozenset({"hidden.last"}), facts=facts, tokens=params.rows)

    def build(self, student, teacher, artifacts):
        d, low = teacher.width, self.params.width
        self.teacher_to_low = nn.Linear(d, low, bias=False)
        self.low_to_teacher = nn.Linear(low, d, bias=False)
        # Principal components of the teacher's states: what the projectors must beat.
        self.register_buffer("pca_mean", torch.zeros(d), persistent=False)
        self.register_buffer("pca_directions", torch.zeros(min(low, d), d), persistent=False)
        self.register_buffer("mean_square", torch.ones(()), persistent=False)

    def statistics(self, step: Step):
        h = step.teacher["hidden.last"].double()
        return {"count": h.new_tensor(float(len(h))), "sum": h.sum(0), "moment": h.T @ h}

    def start_from_statistics(self, sums):
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

    def streams(self, step: Step):
        hidden = step.teacher["hidden.last"]
        reconstructed = self.low_to_teacher(self.teacher_to_low(hidden))
        pca = self.pca_mean + (hidden - self.pca_mean) @ self.pca_directions.T @ self.pca_directions
        return {
            "reconstructed": Stream(reconstructed, "teacher", beside="teacher"),
            "pca": Stream(pca, "teacher", beside="teacher"),
        }

    @visit
    def next_token(self, reconstructed: Logits) -> Terms:
        target = reconstructed.labels if self.params.target == "label" else reconstructed.fact("teacher.top1")
        nll = ops.cross_entropy(reconstructed.logprobs(), target)
        return Terms().add("cross_entropy", nll, per="teacher_tokens")

    @visit(measured_only=True)
    def agreement(self, teacher: Logits, reconstructed: Logits, pca: Logits) -> Terms:
        top = teacher.logits.argmax(-1)
        terms = Terms().watch("teacher_agreement", ops.is_top(reconstructed.logits, top), len(top))
        return terms.watch("teacher_agreement_of_pca", ops.is_top(pca.logits, top), len(top))

    def finish(self, step: Step) -> Terms:
        hidden, reconstructed = step.teacher["hidden.last"], step.streams["reconstructed"].hidden
        error = ops.widened(reconstructed - hidden).square().sum()
        terms = Terms().watch("relative_error", error, ops.widened(hidden).square().sum())
        if self.params.reconstruction_weight:
            # Over the mean square of the training rows: this batch's own would depend on how it is split.
            relative = error / ops.widened(self.mean_square).clamp_min(torch.finfo(error.dtype).tiny)
            terms.add("reconstruction", self.params.reconstruction_weight * relative, per="teacher_tokens")
        return terms


class Residual(Loss):
    """Stage 2: where the teacher is wrong, cross-entropy of h - beta u, u the teacher's state brought to S."""

    name = "residual"
    paper = PAPER
    formula = "L_res = - 1/N sum_i log softmax(W_S (h_i - beta wrong_i P_AS z_i))[y_i],  z = P_TA h_T"
    deviations = (
        "There is no code to differ from: the authors published none. The formula was checked against an "
        "independent computation in float64, and every point that the paper leaves open is a parameter.",
        "A token whose |u| is less than a millionth of its sequence's mean has no direction: it gets no residual "
        "and has no part in beta.",
    )

    class Params(ops.VerdictParams):
        width: int | None = Field(None, ge=1)
        """A, the low width, for which the projectors are then trained. Default: that of the `projectors` stage."""
        beta: Literal["sequence", "row", "batch", "none"] | float = "sequence"
        """The scale sqrt(S/A) mean(|h| / |u|): one per sequence, token ("row") or batch; "none" is 1; or a number."""
        beta_gradient: bool = False
        """Whether beta is differentiated. It is a scale: no."""
        head_gradient: bool = True
        """Whether the student's head learns from L_res at all, where the teacher is right and where it is wrong."""
        state_gradient: bool = True
        """Whether the student's body learns from tokens with a residual."""
        indicator: Literal["hard", "soft", "all", "random"] = "hard"
        """How much of the residual a token gets. "hard": all of it where the teacher is wrong. "soft": one minus the
        teacher's probability of the gold token. "all": every token all of it (no mask). "random": as many as "hard"
        in every sequence, but others, drawn once and for all from what the sequence says (a control)."""
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
        """The teacher's tokens that may be attended to: the response's, or the prompt's as well (two tokenizers)."""
        wrong: Literal["by_bytes", "attention", "projected", "entropy"] = "by_bytes"
        """How a student token knows that the teacher was wrong (two tokenizers). "by_bytes": some teacher token of the
        span that covers the same text was wrong. "attention": more than half of its attention lies on wrong tokens.
        "projected": the student's head does not put the gold token first, given u. "entropy": the attended entropy of
        the teacher's predictions is over half of log W. The soft indicator is then the span's, the attended one, or the
        attended entropy over log W; "projected" has no soft form and stays hard."""

        @property
        def on_wrong_rows_alone(self) -> bool:
            """Whether all other states are the student's own, whose cross-entropy the pass has anyway."""
            return self.indicator == "hard" and self.head_gradient

    @classmethod
    def needs(cls, params, same_tokens):
        facts = {params.verdict}
        if params.indicator == "soft" and (same_tokens or params.wrong != "projected"):
            facts.add(params.gold_logprob)
        if params.wrong == "entropy" and not same_tokens:
            facts.add("teacher.entropy")
        everywhere = {"hidden.last@all"} if params.attend == "sequence" and not same_tokens else set()
        return Needs(
            student=frozenset({"hidden.last"}),
            teacher=frozenset({"hidden.last"} | everywhere),
            facts=frozenset(facts),
            aligned=not same_tokens and params.wrong == "by_bytes",
            artifacts={"projectors": {} if params.width is None else {"width": params.width}},
            batch_coupled=params.beta == "batch",
        )

    def build(self, student, teacher, artifacts):
        projector = artifacts["projectors"]["teacher_to_low.weight"]
        self.width, d = projector.shape  # A
        self.scale = math.sqrt(student.width / self.width)
        self.most_doubt = math.log(teacher.vocab_size)
        self.teacher_to_low = nn.Linear(d, self.width, bias=False)  # P_TA, from stage 1
        if self.params.pretrained:
            self.teacher_to_low.load_state_dict({"weight": projector})
        self.teacher_to_low.requires_grad_(self.params.projector == "trained")
        self.low_to_student = nn.Linear(self.width, student.width, bias=False)  # P_AS
        self.low_to_student.requires_grad_(self.params.direction == "learned")
        if not self.pair.same_tokens:
            self.student_to_low = nn.Linear(student.width, self.width, bias=False)  # P_SA

    # The teacher's states on student tokens.

    def state(self, step: Step) -> Tensor:
        """h [N, S]"""
        h = step.student["hidden.last"]
        return h if self.params.state_gradient else h.detach()

    def attended(self, step: Step, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each student token gathers from the teacher's of its sequence, and the entropy of its attention [N].

        Of the low states: [N, A]; or of `values` [M, c], which are 0 on a prompt.
        """
        side, hidden = step.teacher.side, step.teacher["hidden.last"]
        if self.params.attend == "sequence":
            side = side.every_token()
            hidden = step.teacher["hidden.last@all"][side.positions]
            if values is not None:
                everywhere = values.new_zeros(side.input_ids.numel(), values.shape[-1])
                values = everywhere.index_copy(0, step.teacher.side.positions, values)[side.positions]
        z = self.teacher_to_low(hidden)
        query = self.normalised(self.student_to_low(self.state(step)))
        return ops.attend(query, self.normalised(z), z if values is None else values, step.student.side, side)

    def normalised(self, x: Tensor) -> Tensor:
        """Over the A features of each token."""
        if self.params.normalise == "none":
            return x
        if self.params.normalise == "l2":
            return math.sqrt(self.width) * F.normalize(x, dim=-1)
        spread = (x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / max(self.width - 1, 1)
        return x * torch.where(spread > 0, spread, torch.ones_like(spread)).rsqrt()

    def carry_facts(self, step: Step) -> Mapping[str, Tensor]:
        if self.params.wrong == "by_bytes":
            return super().carry_facts(step)
        with torch.no_grad():
            doubt, soft = self.projected_doubt(step) if self.params.wrong == "projected" else self.attended_doubt(step)
            carried = {self.params.verdict: doubt <= 0.5}
            if self.params.indicator == "soft":
                carried[self.params.gold_logprob] = (-soft.clamp(0, 1)).log1p()
        return carried

    def projected_doubt(self, step: Step) -> tuple[Tensor, Tensor]:
        z, _ = self.attended(step)
        doubt = (~step.student_ranks_first(self.low_to_student(z), step.student.labels)).float()
        return doubt, doubt

    def attended_doubt(self, step: Step) -> tuple[Tensor, Tensor]:
        facts = step.facts
        if self.params.wrong == "entropy":
            hard = soft = facts["teacher.entropy"] / self.most_doubt
        else:
            hard = self.params.doubt(facts, soft=False)
            soft = self.params.doubt(facts, soft=True) if self.params.indicator == "soft" else hard
        doubt, graded = self.attended(step, torch.stack([hard, soft], -1))[0].unbind(-1)
        return doubt, graded

    # The residual state.

    def indicator(self, step: Step) -> Tensor:
        """How much of the residual each token gets [N]."""
        wrong = self.params.doubt(step.facts, soft=self.params.indicator == "soft")
        wrong = wrong.to(step.student["hidden.last"].dtype)
        match self.params.indicator:
            case "all":
                return torch.ones_like(wrong)
            case "random":
                return torch.empty_like(wrong).index_copy_(0, shuffled(step.student.side), wrong)
        return wrong

    def beta(self, h: Tensor, u: Tensor, usable: Tensor, student: View) -> Tensor:
        """sqrt(S/A) mean(|h| / |u|) [N], from the norms [N] of h and u."""
        if isinstance(self.params.beta, float | int):
            return torch.full_like(h, float(self.params.beta))
        if self.params.beta == "none":
            return torch.ones_like(h)
        ratio = torch.where(usable, h / torch.where(usable, u, torch.ones_like(u)), 0)
        if self.params.beta == "sequence":
            ratio = ops.sequence_mean(ratio, student.side, usable)
        elif self.params.beta == "batch":
            ratio = (ratio.sum() / usable.sum().clamp_min(1)).expand_as(ratio)
        return self.scale * ratio

    def streams_after_facts(self, step: Step):
        h, student, right = self.state(step), step.student, step.facts[self.params.verdict]
        if self.pair.same_tokens:
            z, entropy = self.teacher_to_low(step.teacher["hidden.last"]), None
        else:
            z, entropy = self.attended(step)
        u = self.low_to_student(z)
        h_norm, u_norm = h.norm(dim=-1), u.norm(dim=-1)
        if not self.params.beta_gradient:
            h_norm, u_norm = h_norm.detach(), u_norm.detach()
        # A token whose u vanishes beside its sequence's has no direction: no residual, and no part in the mean.
        usable = u_norm.detach() > 1e-6 * ops.sequence_mean(u_norm.detach(), student.side)
        beta, share = self.beta(h_norm, u_norm, usable, student), self.indicator(step)
        # Never 0 times something infinite; and a token without a residual is exactly the student's own.
        shifts = (usable & (share > 0))[:, None]
        shift = torch.where(shifts, (beta * share)[:, None] * u, torch.zeros_like(u)).to(h.dtype)
        r = torch.where(shifts, h - shift, student["hidden.last"])
        self.watch(step, h.detach(), u.detach(), beta, share, usable, entropy)
        kept = {"wrong": ~right} if self.params.on_wrong_rows_alone else {"wrong": ~right, "right": right}
        return {
            name: Stream(
                r[which],
                "student",
                labels=student.labels[which],
                learns_head=self.params.head_gradient,
                tokens=which.nonzero().squeeze(-1),
            )
            for name, which in kept.items()
        }

    def watch(self, step, h, u, beta, share, usable, entropy) -> None:
        n = len(h)
        step.watch("wrong_share", ~step.facts[self.params.verdict], n)
        step.watch("residual_share", share, n)
        step.watch("beta", beta, n)
        step.watch("state_norm", h.norm(dim=-1), n)
        step.watch("residual_norm", beta.detach() * u.norm(dim=-1), n)
        step.watch("state_residual_cosine", F.cosine_similarity(h, u, dim=-1), n)
        step.watch("rows_without_direction", ~usable, n)
        if entropy is not None:
            step.watch("attention_entropy", entropy, n)

    @visit
    def own(self, student: Logits) -> Terms:
        nll, right = ops.cross_entropy(student.logprobs(), student.labels), student.fact(self.params.verdict)
        on_right, on_wrong = torch.where(right, nll, 0), torch.where(right, 0, nll)
        terms = Terms().watch("student_cross_entropy_right", on_right, right)
        terms.watch("student_cross_entropy_wrong", on_wrong, ~right)
        # Tokens that the teacher gets right have no residual: their state, and so their loss, is the student's own.
        return terms.add("right_rows", on_right) if self.params.on_wrong_rows_alone else terms

    @visit(each=("wrong", "right"))
    def residual(self, seen: Logits) -> Terms:
        nll = ops.cross_entropy(seen.logprobs(), seen.labels)
        return Terms().add(f"{seen.stream}_rows", nll).watch(f"residual_cross_entropy_{seen.stream}", nll, len(seen))


def shuffled(side: Side) -> Tensor:
    """Each token's new place [N]: a permutation within every sequence that follows from its tokens alone."""
    # Integer hashing (xor, shift, multiply): the same on every machine, rank and split.
    key = side.labels * 0x9E3779B1 + side.inputs * 0x85EBCA77 + (ops.places_within(side) + 1) * 0xC2B2AE3D
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        key = ((key ^ (key >> 15)) & 0xFFFFFFFF) * multiplier
    order = ((key ^ (key >> 16)) & 0xFFFFFFFF).argsort(stable=True)
    return order[side.sample[order].argsort(stable=True)]


@hookimpl
def register_plugins(register: Register) -> None:
    register(Projectors)
    register(Residual)
