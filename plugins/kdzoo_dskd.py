"""Dual-space knowledge distillation, version 1: both models' states meet under both models' heads.

One tokenizer: row i of the teacher is row i of the student. Two: cross-model attention (CMA) from the embeddings of
each side's tokens. Follows songmzhang/DSKD @ 077337a; deviations are parameters and named there.
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


class DSKD(Loss):
    """Projected teacher states go through the student's head (t2s), projected student states through the teacher's."""

    name = "dskd"
    paper = (
        "Zhang et al., Dual-Space Knowledge Distillation for Large Language Models, EMNLP 2024, "
        "arxiv.org/abs/2406.17328"
    )
    formula = "L = 1/N sum_i [CE(t2s_i, y_i) + C_i D(sg(t2s_i), q_i)] + 1/N sum_j KL(p_j || s2t_j)"
    deviations = (
        "`DualSpaceKDWithCMA` normalises keys and values by standard deviations over the whole padded batch, "
        "prompts included; by default they are those of one sequence's response, so that neighbours and padding "
        "do not count (`std`).",
        "Projected teacher states are multiplied with `lm_head.weight` alone there; here they pass the student's "
        "whole head, with a bias, a scale or a soft cap where its family has them.",
        "`DualSpaceKDWithCMA` fails for teachers of GPT-2's kind, whose embedding it looks for under another "
        "name; here every family with an anatomy works.",
        "The query's projector is always built there; here it exists only where attention aligns.",
    )

    class Params(Params):
        divergence: Literal[
            "forward_kl", "reverse_kl", "js", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "total_variation"
        ] = "forward_kl"
        """D, in the student's space. The teacher's space always takes the forward KL, as the authors' code does."""
        temperature: float = Field(2.0, gt=0)
        """Divides all logits of the two divergences (not of the cross-entropy). No factor of its square."""
        teacher_temperature: float = Field(1.0, gt=0)
        """Divides the projected teacher's logits once more, where attention aligns."""
        skew: float = Field(0.1, ge=0, le=1)
        """The mixture of the skewed divergences."""
        head_mass: float = Field(0.5, gt=0, lt=1)
        """Where adaptive_kl splits the teacher's distribution into head and tail."""
        alignment: Literal["auto", "identity", "attention"] = "auto"
        """"auto": identity for one tokenizer, cross-model attention for two."""
        std: Literal["sequence", "batch"] = "sequence"
        """Over what attention's keys and values are normalised. "sequence": the response rows of one sequence.
        "batch": the authors' reading, the whole padded batch with its prompts and padding, so that a sequence's loss
        depends on its neighbours."""

    @staticmethod
    def attends(params: DSKD.Params, same_tokens: bool) -> bool:
        return params.alignment == "attention" or (params.alignment == "auto" and not same_tokens)

    @classmethod
    def needs(cls, params: DSKD.Params, same_tokens: bool) -> Needs:
        attends = cls.attends(params, same_tokens)
        embeddings = {"embed.input", "embed.target"} if attends else set()
        whole = {"hidden.last@all", "embed.zero"} if attends and params.std == "batch" else set()
        return Needs(
            student=frozenset({"hidden.last"} | embeddings),
            teacher=frozenset({"hidden.last"} | embeddings | whole),
            streams=(OwnStream("t2s", "student", head="student"), OwnStream("s2t", "teacher", head="teacher")),
            visits=(Visit("student_space", ("student", "t2s")), Visit("teacher_space", ("teacher", "s2t"))),
            tokenizers="same" if params.alignment == "identity" else "any",
            batch_coupled=bool(whole),
        )

    def __init__(self, params: DSKD.Params, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(params, models, artefacts)
        assert models.student is not None and models.teacher is not None
        s, d = models.student.width, models.teacher.width
        self.attention = self.attends(params, models.same_tokens)
        self.teacher_to_student = nn.Linear(d, s)
        self.student_to_teacher = nn.Linear(s, d)
        if self.attention:
            self.query = nn.Linear(2 * s, 2 * d)

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> dict[str, Own]:
        if not self.attention:
            return {
                "t2s": Own(self.teacher_to_student(teacher["hidden.last"])),
                "s2t": Own(self.student_to_teacher(student["hidden.last"])),
            }
        f_in, f_out, h_t = teacher["embed.input"], teacher["embed.target"], teacher["hidden.last"]
        keys = torch.cat([f_in, f_out], -1)
        if self.params.std == "sequence":
            key_std, out_std, hidden_std = (ops.sequence_std(x, teacher.side) for x in (keys, f_out, h_t))
        else:
            # The authors replace every token outside the response by token 0, so its embedding fills those places.
            zero = teacher["embed.zero"]
            elsewhere = teacher.side.input_ids.numel() - len(teacher)
            key_std = torch.cat([keys, torch.cat([zero, zero], -1).expand(elsewhere, -1)]).std()
            out_std = torch.cat([f_out, zero.expand(elsewhere, -1)]).std()
            hidden_std = teacher["hidden.last@all"].std()
        query = self.query(torch.cat([student["embed.input"], student["embed.target"]], -1).detach())
        from_teacher = self.teacher_to_student(h_t / hidden_std + f_out / out_std)
        from_student = self.student_to_teacher(student["hidden.last"])

        keys = keys / key_std
        t2s, _ = ops.attend(query, keys, from_teacher, student.side, teacher.side)
        s2t, _ = ops.attend(keys, query, from_student, teacher.side, student.side)
        return {"t2s": Own(t2s), "s2t": Own(s2t)}

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        options = {
            "skew_forward_kl": {"skew": self.params.skew},
            "skew_reverse_kl": {"skew": self.params.skew},
            "adaptive_kl": {"head_mass": self.params.head_mass},
        }
        return ops.DIVERGENCES[self.params.divergence](log_p, log_q, **options.get(self.params.divergence, {}))

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        tau = self.params.temperature
        if visit == "teacher_space":
            return Terms().add(
                "s2t_kd", ops.forward_kl(chunk.logprobs("teacher", tau), chunk.logprobs("s2t", tau)).sum()
            )
        labels = chunk.labels("t2s")
        right = ops.is_top(chunk.logits("t2s").detach(), labels)
        target_tau = tau * self.params.teacher_temperature if self.attention else tau
        kd = self.divergence(chunk.logprobs("t2s", target_tau).detach(), chunk.logprobs("student", tau))
        if self.attention:
            kd = torch.where(right, kd, torch.zeros_like(kd))
        return (
            Terms()
            .add("t2s_ce", ops.cross_entropy(chunk.logprobs("t2s"), labels).sum())
            .add("t2s_kd", kd.sum())
            .watch("t2s_accuracy", right.sum(), len(labels))
        )


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(DSKD)
