"""Dual-space knowledge distillation, version 1: both models' states meet under both models' heads.

One tokenizer: token i of the teacher is token i of the student. Two: cross-model attention (CMA) from the embeddings of
each side's tokens. Follows songmzhang/DSKD @ 077337a; deviations are parameters and named there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdzoo import Logits, Loss, Needs, Register, Step, Stream, Terms, View, hookimpl, ops, visit


class DSKD(Loss):
    """Projected teacher states go through the student's head (t2s), projected student states through the teacher's."""

    name = "dskd"
    paper = (
        "Zhang et al., Dual-Space Knowledge Distillation for Large Language Models, EMNLP 2024, "
        "arxiv.org/abs/2406.17328"
    )
    formula = "L = 1/N sum_i [CE(t2s_i, y_i) + C_i D(sg(t2s_i), q_i)] + 1/N sum_j KL(p_j || s2t_j)"
    deviations = (
        "`DualSpaceKDWithCMA` normalises keys and values by standard deviations over the whole padded batch, prompts "
        "included; by default they are those of one response, so that neighbours and padding do not count (`std`).",
        "Projected teacher states are multiplied with `lm_head.weight` alone there; here they pass the student's "
        "whole head, with a bias, a scale or a soft cap where its family has them.",
        "`DualSpaceKDWithCMA` fails for teachers of GPT-2's kind, whose embedding it looks for under another name; "
        "here every family with a model adapter works.",
        "The query's projector is always built there; here it exists only where attention aligns.",
    )

    class Params(ops.DivergenceParams):
        """D is measured in the student's space; the teacher's takes the forward KL, as the authors' code does."""

        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dskd@077337a": {"std": "batch"}}
        preset: Literal["dskd@077337a"] | None = None
        """A release of the authors' code: what is not given beside it is as there."""
        temperature: float = Field(2.0, gt=0)
        """Divides all logits of the two divergences (not of the cross-entropy). No factor of its square."""
        teacher_temperature: float = Field(1.0, gt=0)
        """Divides the projected teacher's logits once more, where attention aligns."""
        alignment: Literal["auto", "identity", "attention"] = "auto"
        """"auto": identity for one tokenizer, cross-model attention for two."""
        std: Literal["sequence", "batch"] = "sequence"
        """Over what attention's keys and values are normalised. "sequence": the response tokens of one sequence.
        "batch": the authors' reading, the whole padded batch with its prompts and padding, so that a sequence's loss
        depends on its neighbours."""

        def attends(self, same_tokens: bool) -> bool:
            return self.alignment == "attention" or (self.alignment == "auto" and not same_tokens)

    @classmethod
    def needs(cls, params, same_tokens):
        embeddings = {"embed.input", "embed.target"} if params.attends(same_tokens) else set()
        whole = {"hidden.last@all", "embed.zero"} if embeddings and params.std == "batch" else set()
        return Needs(
            student=frozenset({"hidden.last"} | embeddings),
            teacher=frozenset({"hidden.last"} | embeddings | whole),
            tokenizers="same" if params.alignment == "identity" else "any",
            batch_coupled=bool(whole),
        )

    def build(self, student, teacher, artifacts):
        self.attention = self.params.attends(self.pair.same_tokens)
        self.teacher_to_student = nn.Linear(teacher.width, student.width)
        self.student_to_teacher = nn.Linear(student.width, teacher.width)
        if self.attention:
            self.query = nn.Linear(2 * student.width, 2 * teacher.width)

    def streams(self, step: Step):
        t2s, s2t = self.attended(step) if self.attention else self.projected(step)
        return {
            "t2s": Stream(t2s, head="student", beside="student"),
            "s2t": Stream(s2t, head="teacher", beside="teacher"),
        }

    def projected(self, step: Step) -> tuple[Tensor, Tensor]:
        return self.teacher_to_student(step.teacher["hidden.last"]), self.student_to_teacher(
            step.student["hidden.last"]
        )

    def attended(self, step: Step) -> tuple[Tensor, Tensor]:
        student, teacher = step.student, step.teacher
        f_out, h_t = teacher["embed.target"], teacher["hidden.last"]
        keys = torch.cat([teacher["embed.input"], f_out], -1)
        key_std, out_std, hidden_std = self.std(teacher, keys, f_out, h_t)
        query = self.query(torch.cat([student["embed.input"], student["embed.target"]], -1).detach())
        from_teacher = self.teacher_to_student(h_t / hidden_std + f_out / out_std)
        from_student = self.student_to_teacher(student["hidden.last"])
        keys = keys / key_std
        t2s, _ = ops.attend(query, keys, from_teacher, student.side, teacher.side)
        s2t, _ = ops.attend(keys, query, from_student, teacher.side, student.side)
        return t2s, s2t

    def std(self, teacher: View, keys: Tensor, f_out: Tensor, h_t: Tensor) -> list[Tensor]:
        if self.params.std == "sequence":
            return [ops.sequence_std(x, teacher.side) for x in (keys, f_out, h_t)]
        # The authors replace every token outside the response by token 0, so its embedding fills those places.
        zero = teacher["embed.zero"]
        elsewhere = teacher.side.input_ids.numel() - len(teacher)
        key_std = torch.cat([keys, torch.cat([zero, zero], -1).expand(elsewhere, -1)]).std()
        return [key_std, torch.cat([f_out, zero.expand(elsewhere, -1)]).std(), teacher["hidden.last@all"].std()]

    @visit
    def student_space(self, student: Logits, t2s: Logits) -> Terms:
        tau = self.params.temperature
        right = ops.is_top(t2s.logits.detach(), t2s.labels)
        target_tau = tau * self.params.teacher_temperature if self.attention else tau
        kd = self.params.measure(t2s.logprobs(target_tau).detach(), student.logprobs(tau))
        kd = torch.where(right, kd, 0) if self.attention else kd
        terms = Terms().add("t2s_ce", ops.cross_entropy(t2s.logprobs(), t2s.labels)).add("t2s_kd", kd)
        return terms.watch("t2s_accuracy", right, len(t2s))

    @visit
    def teacher_space(self, teacher: Logits, s2t: Logits) -> Terms:
        tau = self.params.temperature
        return Terms().add("s2t_kd", ops.forward_kl(teacher.logprobs(tau), s2t.logprobs(tau)))


@hookimpl
def register_plugins(register: Register) -> None:
    register(DSKD)
