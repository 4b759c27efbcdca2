"""Cross-entropy on the gold tokens: fine-tuning on the data, and the companion of every distillation loss."""

from __future__ import annotations

from typing import Literal

import torch

from kdzoo import Logits, Loss, Needs, Params, Register, Terms, hookimpl, ops, visit


class CrossEntropy(Loss):
    """The mean over response tokens of the student's negative log-probability of the gold token."""

    name = "cross_entropy"
    paper = "supervised fine-tuning; the baseline of every comparison"
    formula = "L = - 1/N sum_i log q_i(y_i)"

    class Params(Params):
        where: Literal["everywhere", "teacher_right", "teacher_wrong"] = "everywhere"
        """Which tokens count: all, or those where the gold token is, or is not, the teacher's first choice. The sum is
        divided by all tokens in any case, so that the two parts add up to the whole."""

    @classmethod
    def needs(cls, params, same_tokens):
        if params.where == "everywhere":
            return Needs()
        return Needs(facts=frozenset({"teacher.correct"}), aligned=not same_tokens)

    @visit
    def gold(self, student: Logits) -> Terms:
        log_q = student.logprobs()
        nll = ops.cross_entropy(log_q, student.labels)
        right = ops.is_top(log_q.detach(), student.labels)
        if self.params.where != "everywhere":
            nll = torch.where(student.fact("teacher.correct") == (self.params.where == "teacher_right"), nll, 0)
        return Terms().add("cross_entropy", nll).watch("token_accuracy", right, len(student))


@hookimpl
def register_plugins(register: Register) -> None:
    register(CrossEntropy)
