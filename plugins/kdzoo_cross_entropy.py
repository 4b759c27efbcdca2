"""Cross-entropy on the gold tokens: fine-tuning on the data, and the companion of every distillation loss."""

from __future__ import annotations

from typing import Literal

import torch

from kdzoo import Chunk, Loss, Needs, Params, Terms, Visit, hookimpl, ops


class CrossEntropy(Loss):
    """The mean over response tokens of the student's negative log-probability of the gold token."""

    name = "cross_entropy"
    paper = "supervised fine-tuning; the baseline of every comparison"
    formula = "L = - 1/N sum_i log q_i(y_i)"

    class Params(Params):
        where: Literal["everywhere", "teacher_right", "teacher_wrong"] = "everywhere"
        """Which rows count: all, or those where the gold token is, or is not, the teacher's first choice. The sum is
        divided by all rows in any case, so that the two parts add up to the whole."""

    @classmethod
    def needs(cls, params: CrossEntropy.Params, same_tokens: bool) -> Needs:
        facts = () if params.where == "everywhere" else ("teacher.correct",)
        return Needs(visits=(Visit("gold", ("student",), facts=facts),), aligned=bool(facts) and not same_tokens)

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        log_q, labels = chunk.logprobs("student"), chunk.labels("student")
        nll = ops.cross_entropy(log_q, labels)
        right = ops.is_top(log_q.detach(), labels).sum()
        if self.params.where != "everywhere":
            counts = chunk.facts["teacher.correct"] == (self.params.where == "teacher_right")
            nll = torch.where(counts, nll, torch.zeros_like(nll))
        return Terms().add("cross_entropy", nll.sum()).watch("token_accuracy", right, len(labels))


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(CrossEntropy)
