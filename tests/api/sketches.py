"""What the contract is made for beside divergences: each of these is a loss of few lines, and keeps every promise."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from kdzoo import Logits, Loss, Needs, Params, Step, Terms, ops, visit


class BetweenBlocks(Loss):
    """States of chosen blocks, through a projector where widths differ; pairs of tokens where tokenizers do."""

    name, paper, formula = "between_blocks", "Romero et al., FitNets, ICLR 2015", "L = 1/P sum_i |W h_i - t_i|^2 / D"

    class Params(Params):
        student_block: int = 0
        teacher_block: int = -1

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        student, teacher = f"hidden.{params.student_block}", f"hidden.{params.teacher_block}"
        return Needs(student=frozenset({student}), teacher=frozenset({teacher}), aligned=not same_tokens)

    def build(self, student: Any, teacher: Any, artifacts: Any) -> None:
        self.projector = nn.Linear(student.width, teacher.width)

    def finish(self, step: Step) -> Terms:
        projected = self.projector(step.student[f"hidden.{self.params.student_block}"])
        target = step.teacher[f"hidden.{self.params.teacher_block}"]
        if not self.pair.same_tokens:
            ours, theirs = step.batch.pairs.unbind(1)
            projected, target = projected[ours], target[theirs]
        error = ops.widened(projected - target).square().mean(-1)
        return Terms().add("error", error, per="tokens" if self.pair.same_tokens else "pairs")


class WeighedByDoubt(Loss):
    """A weight for every token, from a fact of the teacher: terms are values of tokens, so that they can be weighed."""

    name, paper, formula = "weighed_by_doubt", "entropy-aware selection", "L = 1/N sum_i (1 + H(p_i)) KL(p_i || q_i)"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(facts=frozenset({"teacher.entropy"}), tokenizers="same", divergence=True)

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        kl = ops.forward_kl(teacher.logprobs(), student.logprobs())
        return Terms().add("kl", (1 + student.fact("teacher.entropy")) * (kl - kl.detach().clamp_max(0)))


class Interpolating(Loss):
    """A state that moves over the steps and is in every checkpoint: a target between student and teacher."""

    name, paper, formula = "interpolating", "Shing et al., TAID, ICLR 2025", "L = 1/N sum_i KL(sg(m_i) || q_i)"

    class Params(Params):
        pace: float = Field(0.1, gt=0)

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(tokenizers="same")

    def build(self, student: Any, teacher: Any, artifacts: Any) -> None:
        self.register_buffer("share", torch.tensor(0.4))

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        between = torch.lerp(student.logits.detach(), teacher.logits, self.share.to(teacher.logits.dtype))
        return Terms().add("kl", ops.forward_kl(between.log_softmax(-1), student.logprobs()))

    def after_step(self, terms: Any) -> None:
        self.share.add_(self.params.pace * terms["kl"]).clamp_(max=1.0)


SKETCHES = (BetweenBlocks, WeighedByDoubt, Interpolating)
