"""Cross-entropy on the gold tokens: fine-tuning on the data, and the companion of every distillation loss."""

from __future__ import annotations

from kdzoo import Chunk, Loss, Needs, NoParams, Terms, Visit, hookimpl, ops


class CrossEntropy(Loss):
    """The mean over response tokens of the student's negative log-probability of the gold token."""

    name = "cross_entropy"
    paper = "supervised fine-tuning; the baseline of every comparison"
    formula = "L = - 1/N sum_i log q_i(y_i)"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("gold", ("student",)),))

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        log_q, labels = chunk.logprobs("student"), chunk.labels("student")
        nll = ops.cross_entropy(log_q, labels)
        right = ops.is_top(log_q.detach(), labels).sum()
        return Terms().add("cross_entropy", nll.sum()).watch("token_accuracy", right, len(labels))


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(CrossEntropy)
