"""Dual-space knowledge distillation, version 2: projectors that begin as the heads say, and stay with predictions.

As in version 1, both models' states meet under both models' heads. Here a projected state starts with the logits that
it had before: h P W_s' = h W_t' has the least-squares solution P = W_t' pinv(W_s'). One tokenizer: token i of the
teacher is token i of the student. Two: aligned pairs of tokens (exact token alignment, ETA). Follows songmzhang/DSKDv2
@ 5025279; deviations are parameters and named there. Its training on the student's own samples is not here.

Shapes: N student tokens, M teacher tokens, P pairs, S / D student / teacher width, V / W vocabularies, O shared
entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdzoo import Logits, Loss, Needs, Register, Step, Stream, Terms, hookimpl, ops, visit


class DSKDv2(Loss):
    """As `dskd`, from projectors that keep the logits; the student learns where the projection kept the prediction."""

    name = "dskd_v2"
    paper = (
        "Zhang et al., A Dual-Space Framework for General Knowledge Distillation of Large Language Models, 2025, "
        "arxiv.org/abs/2504.11426"
    )
    formula = (
        "L = 1/P sum_i [CE(t2s_i, argmax p_i) + A_i D(sg(t2s_i), q_i) + D(p_i, s2t_i)], A_i: t2s_i agrees with p_i"
    )
    deviations = (
        "`DualSpaceKDV2` divides by the tokens that count in a micro-batch; by default all tokens or pairs of the step "
        "are the divisor, so that no split changes anything (`mean`).",
        "It compares the number of agreeing tokens with an average over ranks, so that a long micro-batch can pass a "
        "share of 1; `threshold` is compared with the share of the micro-batch's own tokens.",
        "`DualSpaceKDV2WithETA` takes the student's unknown token, which for GPT-2 is the end, for every prediction "
        "that the student has no token for; here such a position is left out.",
        "It looks predictions up in the student's vocabulary as the teacher's spells them, marks of spaces too, and so "
        "loses most pairs between families; here tokens are the same by their text, and pairs are the aligner's.",
        "Its pseudo-inverses are of heads in float32; here of W' W in float64, without what float32 leaves out.",
        "A projector to the teacher's space that is a layer is unknown to the authors' optimizer; here "
        '`student_to_teacher` "trained" is trained.',
        "Training on the student's own samples is not offered.",
    )

    class Params(ops.DivergenceParams):
        """D is measured in both spaces."""

        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dskdv2@5025279": {"mean": "batch"}}
        preset: Literal["dskdv2@5025279"] | None = None
        """A release of the authors' code: what is not given beside it is as there."""
        temperature: float = Field(2.0, gt=0)
        """Divides all logits of the divergences (not of the cross-entropy). No factor of its square."""
        spaces: Literal["both", "student", "teacher"] = "both"
        """Which of the two halves are there."""
        mask: bool = True
        """Whether the student learns from the projected teacher only where that still predicts the teacher's token."""
        mean: Literal["rows", "batch"] = "rows"
        """What sums are divided by. "rows": the tokens of the step (with two tokenizers: the pairs), whatever counts in
        them. "batch": the authors' reading, of each micro-batch the tokens that count: those whose prediction the
        student has a token for, and for the masked divergence those that agree. How a batch is split then matters."""
        threshold: float = Field(1.0, ge=0)
        """With `mean` "batch": the share of agreeing tokens beyond which a micro-batch is not masked. At the authors'
        default, 1, none is."""
        start: Literal["pseudo_inverse", "random"] = "pseudo_inverse"
        """Where the projector to the student's space starts: at the least-squares solution for the teacher's logits,
        or at random as linear layers do."""
        student_to_teacher: Literal["pseudo_inverse", "trained"] = "pseudo_inverse"
        """The projector to the teacher's space: computed in every step, from the student's head as it is, with nothing
        to train; or a linear layer. (The authors' code leaves that out of its optimizer.)"""
        top_vocabulary: int | None = Field(None, ge=1)
        """Both heads are matched on the first so many tokens that say the same, in the student's order. Default: on
        all."""

        @property
        def halves(self) -> tuple[str, ...]:
            """The spaces that the two models meet in."""
            return ("student", "teacher") if self.spaces == "both" else (self.spaces,)

        @property
        def solves(self) -> bool:
            """Whether the projector to the teacher's space is computed."""
            return "teacher" in self.halves and self.student_to_teacher == "pseudo_inverse"

        @property
        def reads_heads(self) -> bool:
            return self.solves or ("student" in self.halves and self.start == "pseudo_inverse")

        @property
        def seen(self) -> tuple[str, ...]:
            """The streams that are compared."""
            student = ("student", "t2s") if "student" in self.halves else ()
            return ("teacher", *student, *(("s2t",) if "teacher" in self.halves else ()))

    @classmethod
    def needs(cls, params, same_tokens):
        heads, last = frozenset({"head.weight"} if params.reads_heads else ()), frozenset({"hidden.last"})
        return Needs(
            student=heads | last if "teacher" in params.halves else heads,
            teacher=heads | last if "student" in params.halves else heads,
            aligned=not same_tokens,
            vocabularies=params.reads_heads and not same_tokens,
            batch_coupled=params.mean == "batch",
        )

    def build(self, student, teacher, artifacts):
        params = self.params
        if "student" in params.halves:
            self.teacher_to_student = nn.Linear(teacher.width, student.width, bias=False)
        if "teacher" in params.halves and not params.solves:
            self.student_to_teacher = nn.Linear(student.width, teacher.width, bias=False)
        self.register_buffer("student_ids", self.pair.student_ids, persistent=False)  # [W]
        if params.reads_heads:
            end = None if self.pair.same_tokens else student.vocabulary.end  # which says nothing
            mine, theirs = ops.entries_by_student(self.student_ids, end)
            self.register_buffer("shared_student", mine[: params.top_vocabulary], persistent=False)  # [O]
            self.register_buffer("shared_teacher", theirs[: params.top_vocabulary], persistent=False)  # [O]

    def start_from_heads(self, heads):
        if "student" in self.params.halves and self.params.start == "pseudo_inverse":
            shared = self.shared_student, self.shared_teacher
            start = ops.projector_between_heads(heads["student"], heads["teacher"], *shared)  # pinv(W_s) W_t [S, D]
            self.teacher_to_student.weight.copy_(start)
        if self.params.solves:
            # No buffer: it must keep its precision, and is where the heads are.
            self.teacher_inverse = ops.gram_inverse(heads["teacher"], self.shared_teacher)  # [D, D]

    def to_teacher(self, step: Step) -> Tensor:
        """The student's states in the teacher's space [N, D]."""
        h = step.student["hidden.last"]
        if not self.params.solves:
            return self.student_to_teacher(h)
        with torch.no_grad():  # W_s' pinv(W_t') = W_s' W_t (W_t' W_t)^+, in every step
            wide, heads = ops.at_least_float32(h.dtype), (step.student["head.weight"], step.teacher["head.weight"])
            product = ops.product_of_heads(*heads, self.shared_student, self.shared_teacher, wide)
            projector = product @ self.teacher_inverse.to(wide)  # [S, D]
        return h @ projector.to(h.dtype)

    def streams(self, step: Step):
        found = {}
        if "student" in self.params.halves:
            found["t2s"] = Stream(self.teacher_to_student(step.teacher["hidden.last"]), "student", beside="teacher")
        if "teacher" in self.params.halves:
            found["s2t"] = Stream(self.to_teacher(step), "teacher", beside="student")
        return found

    @visit(kind=lambda params: "sum" if params.mean == "rows" else "tokens", streams=lambda params: params.seen)
    def spaces(self, **seen: Logits) -> Terms | Mapping[str, Tensor]:
        tau, teacher = self.params.temperature, seen["teacher"]
        target = self.student_ids[teacher.logits.argmax(-1)]
        values = {"heard": target >= 0}
        if "student" in self.params.halves:
            t2s, label = seen["t2s"], target.clamp_min(0)
            values["heard"] &= t2s.logits.gather(-1, label[:, None]).squeeze(-1) > -torch.inf
            values["agrees"] = values["heard"] & ops.is_top(t2s.logits.detach(), label)
            values["t2s_ce"] = ops.cross_entropy(t2s.logprobs(), label)
            values["t2s_kd"] = self.params.measure(t2s.logprobs(tau).detach(), seen["student"].logprobs(tau))
        if "teacher" in self.params.halves:
            values["s2t_kd"] = self.params.measure(teacher.logprobs(tau), seen["s2t"].logprobs(tau))
        return self.terms(values) if self.params.mean == "rows" else values

    def finish(self, step: Step) -> Terms:
        values = {name.removeprefix("spaces."): value for name, value in step.values.items()}
        return self.terms(values) if values else Terms()

    def terms(self, values: Mapping[str, Tensor]) -> Terms:
        """Sums over the tokens that count; with `mean` "batch" as if all tokens had their mean."""
        heard = values["heard"]
        terms = Terms().watch("heard", heard, len(heard))
        for name in ("t2s_ce", "t2s_kd", "s2t_kd"):
            if name in values:
                counts = self.learns(heard, values["agrees"]) if name == "t2s_kd" else heard
                value = torch.where(counts, values[name], 0)
                if self.params.mean == "batch":
                    value = value * len(heard) / counts.sum().clamp_min(1)
                terms.add(name, value, per="tokens" if self.pair.same_tokens else "pairs")
        return terms.watch("t2s_agreement", values["agrees"], heard.sum()) if "agrees" in values else terms

    def learns(self, heard: Tensor, agrees: Tensor) -> Tensor:
        """Where the student learns from the projected teacher [n]."""
        if not self.params.mask:
            return heard
        passes = self.params.mean == "batch" and agrees.sum() > self.params.threshold * heard.sum()
        return agrees | (heard & passes)


@hookimpl
def register_plugins(register: Register) -> None:
    register(DSKDv2)
