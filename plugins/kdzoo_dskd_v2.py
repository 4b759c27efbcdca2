"""Dual-space knowledge distillation, version 2: projectors that begin as the heads say, and stay with predictions.

As in version 1, both models' states meet under both models' heads. Here a projected state starts with the logits that
it had before: h P W_s' = h W_t' has the least-squares solution P = W_t' pinv(W_s'). One tokenizer: row i of the teacher
is row i of the student. Two: rows of aligned pairs (exact token alignment, ETA). Follows songmzhang/DSKDv2 @ 5025279;
deviations are parameters and named there. Its training on the student's own samples is not here.

Shapes: N student rows, M teacher rows, P pairs, S / D student / teacher width, V / W vocabularies, O shared entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
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

ENTRIES = 8192
"""How many entries of a head are copied at a time: a head in a higher precision would be many times the model."""


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
        "`DualSpaceKDV2` divides by the rows that count in a micro-batch; by default all rows or pairs of the "
        "step are the divisor, so that no split changes anything (`mean`).",
        "It compares the number of agreeing rows with an average over all ranks, so that a long micro-batch can "
        "pass a share of 1; `threshold` is compared with the share of the micro-batch's own rows.",
        "`DualSpaceKDV2WithETA` takes the student's unknown token, which for GPT-2 is the end, for every "
        "prediction that the student has no token for; here such a row is left out.",
        "It looks predictions up in the student's vocabulary as the teacher's spells them, marks of spaces "
        "included, and so loses most pairs between families; here tokens are the same by their text, and pairs "
        "are the recipe's aligner's.",
        "Pseudo-inverses are of the heads in float32 there; here they come from W' W in float64, without the "
        "directions that float32 leaves out.",
        "Where the projector to the teacher's space is a layer, the authors' optimizer does not know it; here "
        '`student_to_teacher` "trained" is trained.',
        "Training on the student's own samples is not offered.",
    )

    class Params(Params):
        divergence: Literal[
            "forward_kl", "reverse_kl", "js", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "total_variation"
        ] = "forward_kl"
        """D, in both spaces."""
        temperature: float = Field(2.0, gt=0)
        """Divides all logits of the divergences (not of the cross-entropy). No factor of its square."""
        skew: float = Field(0.1, ge=0, le=1)
        """The mixture of the skewed divergences."""
        head_mass: float = Field(0.5, gt=0, lt=1)
        """Where adaptive_kl splits the teacher's distribution into head and tail."""
        spaces: Literal["both", "student", "teacher"] = "both"
        """Which of the two halves are there."""
        mask: bool = True
        """Whether the student learns from the projected teacher only where that still predicts the teacher's token."""
        mean: Literal["rows", "batch"] = "rows"
        """What sums are divided by. "rows": the rows of the step (with two tokenizers: the pairs), whatever counts in
        them. "batch": the authors' reading, of each micro-batch the rows that count: those whose prediction the student
        has a token for, and for the masked divergence those that agree. How a batch is split then matters."""
        threshold: float = Field(1.0, ge=0)
        """With `mean` "batch": the share of agreeing rows beyond which a micro-batch is not masked. At the authors'
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
        def in_student(self) -> bool:
            """Whether teacher states are projected."""
            return self.spaces != "teacher"

        @property
        def in_teacher(self) -> bool:
            """Whether student states are projected."""
            return self.spaces != "student"

        @property
        def solves(self) -> bool:
            """Whether the projector to the teacher's space is computed."""
            return self.in_teacher and self.student_to_teacher == "pseudo_inverse"

        @property
        def reads_heads(self) -> bool:
            return self.solves or (self.in_student and self.start == "pseudo_inverse")

    student_ids: Tensor
    shared_student: Tensor
    shared_teacher: Tensor

    @classmethod
    def needs(cls, params: DSKDv2.Params, same_tokens: bool) -> Needs:
        heads = frozenset({"head.weight"} if params.reads_heads else ())
        student, teacher, streams, beside = heads, heads, [], ["teacher"]
        if params.in_student:
            teacher = heads | {"hidden.last"}
            streams.append(OwnStream("t2s", "teacher", head="student"))
            beside += ["student", "t2s"]
        if params.in_teacher:
            student = heads | {"hidden.last"}
            streams.append(OwnStream("s2t", "student", head="teacher"))
            beside.append("s2t")
        return Needs(
            student=student,
            teacher=teacher,
            streams=tuple(streams),
            visits=(Visit("spaces", tuple(beside), kind="sum" if params.mean == "rows" else "rows"),),
            aligned=not same_tokens,
            lexicons=params.reads_heads and not same_tokens,
            batch_coupled=params.mean == "batch",
        )

    def __init__(self, params: DSKDv2.Params, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(params, models, artefacts)
        assert models.student is not None and models.teacher is not None and models.student_ids is not None
        s, d = models.student.width, models.teacher.width
        if params.in_student:
            self.teacher_to_student = nn.Linear(d, s, bias=False)
        if params.in_teacher and not params.solves:
            self.student_to_teacher = nn.Linear(s, d, bias=False)
        self.register_buffer("student_ids", models.student_ids, persistent=False)  # [W]
        if params.reads_heads:
            mine, yours = self.shared(models)
            self.register_buffer("shared_student", mine[: params.top_vocabulary], persistent=False)  # [O]
            self.register_buffer("shared_teacher", yours[: params.top_vocabulary], persistent=False)  # [O]

    @staticmethod
    def shared(models: Models) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's entries that say the same, in the student's order. Ends say nothing."""
        assert models.student is not None and models.student_ids is not None
        says_the_same = models.student_ids >= 0
        if not models.same_tokens:
            assert models.student.lexicon is not None
            says_the_same &= models.student_ids != models.student.lexicon.end
        entries = says_the_same.nonzero().squeeze(-1)
        mine, order = models.student_ids[entries].sort()
        return mine, entries[order]

    # P = W_t' pinv(W_s') = W_t' W_s pinv(W_s' W_s), over the shared entries; the other way round likewise.

    def product(self, of: str, by: str, heads: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """W_of' W_by [width of one, width of the other] over the shared entries, a part of them at a time."""
        ids = {"student": self.shared_student, "teacher": self.shared_teacher}
        total = heads[of].new_zeros(heads[of].shape[1], heads[by].shape[1], dtype=dtype)
        here = (ids[name].to(total.device).split(ENTRIES) for name in (of, by))
        for rows, columns in zip(*here, strict=True):
            total.addmm_(heads[of][rows].to(dtype).T, heads[by][columns].to(dtype))
        return total

    def inverse(self, of: str, heads: Mapping[str, Tensor]) -> Tensor:
        """(W' W)^+ of one head, without the directions that a pseudo-inverse of W in float32 leaves out."""
        entries = max(len(self.shared_student), heads[of].shape[1])
        smallest = entries * torch.finfo(torch.float32).eps
        return torch.linalg.pinv(self.product(of, of, heads, torch.float64), rtol=smallest**2, hermitian=True)

    def setup(self, heads: Mapping[str, Tensor]) -> None:
        if self.params.in_student and self.params.start == "pseudo_inverse":
            start = self.inverse("student", heads) @ self.product("student", "teacher", heads, torch.float64)
            self.teacher_to_student.weight.copy_(start)
        if self.params.solves:
            # No buffer: it must keep its precision, and is where the heads are.
            self.teacher_inverse = self.inverse("teacher", heads)  # [D, D]

    def to_teacher(self, student: View, teacher: View) -> Tensor:
        """[N, D]"""
        h = student["hidden.last"]
        if not self.params.solves:
            return self.student_to_teacher(h)
        with torch.no_grad():
            heads: dict[str, Tensor] = {"student": student["head.weight"], "teacher": teacher["head.weight"]}
            wide = torch.promote_types(h.dtype, torch.float32)
            projector = self.product("student", "teacher", heads, wide) @ self.teacher_inverse.to(wide)  # [S, D]
        return h @ projector.to(h.dtype)

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> dict[str, Own]:
        found = {}
        if self.params.in_student:
            found["t2s"] = Own(self.teacher_to_student(teacher["hidden.last"]))
        if self.params.in_teacher:
            found["s2t"] = Own(self.to_teacher(student, teacher))
        return found

    # The loss, row by row and then in sum.

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        options = {
            "skew_forward_kl": {"skew": self.params.skew},
            "skew_reverse_kl": {"skew": self.params.skew},
            "adaptive_kl": {"head_mass": self.params.head_mass},
        }
        return ops.DIVERGENCES[self.params.divergence](log_p, log_q, **options.get(self.params.divergence, {}))

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms | Mapping[str, Tensor]:
        tau = self.params.temperature
        target = self.student_ids[chunk.logits("teacher").argmax(-1)]
        rows = {"heard": target >= 0}
        if self.params.in_student:
            label = target.clamp_min(0)
            rows["heard"] &= chunk.logits("t2s").gather(-1, label[:, None]).squeeze(-1) > -torch.inf
            rows["agrees"] = rows["heard"] & ops.is_top(chunk.logits("t2s").detach(), label)
            rows["t2s_ce"] = ops.cross_entropy(chunk.logprobs("t2s"), label)
            rows["t2s_kd"] = self.divergence(chunk.logprobs("t2s", tau).detach(), chunk.logprobs("student", tau))
        if self.params.in_teacher:
            rows["s2t_kd"] = self.divergence(chunk.logprobs("teacher", tau), chunk.logprobs("s2t", tau))
        return self.terms(rows) if self.params.mean == "rows" else rows

    def terms(self, rows: Mapping[str, Tensor]) -> Terms:
        """Sums over the rows that count; with `mean` "batch" as if all rows had their mean."""
        heard = rows["heard"]
        terms = Terms().watch("heard", heard.sum(), len(heard))
        for name in ("t2s_ce", "t2s_kd", "s2t_kd"):
            if name in rows:
                counts = self.learns(rows) if name == "t2s_kd" else heard
                total = torch.where(counts, rows[name], torch.zeros_like(rows[name])).sum()
                if self.params.mean == "batch":
                    total = total * len(heard) / counts.sum().clamp_min(1)
                terms.add(name, total, per="rows" if self.models.same_tokens else "pairs")
        if "agrees" in rows:
            terms.watch("t2s_agreement", rows["agrees"].sum(), heard.sum())
        return terms

    def learns(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Where the student learns from the projected teacher [n]."""
        heard, agrees = rows["heard"], rows["agrees"]
        if not self.params.mask:
            return heard
        if self.params.mean == "rows":
            return agrees
        return agrees | (heard & (agrees.sum() > self.params.threshold * heard.sum()))

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        if self.params.mean == "rows":
            return Terms()
        return self.terms({name.removeprefix("spaces."): value for name, value in rows.items()})


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(DSKDv2)
