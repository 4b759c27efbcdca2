"""What the contract is made for beside divergences: each of these is a loss of few lines, and keeps every promise."""

from __future__ import annotations

from typing import Any

from kdzoo import Logits, Loss, Needs, Terms, ops, visit


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


class OnSharedEntries(Loss):
    """A map between two vocabularies: the teacher's distribution on the entries that the student has too."""

    name, paper, formula = "on_shared_entries", "shared sub-vocabulary", "L = 1/P sum_i KL(p_i(shared) || q_i(shared))"

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(aligned=not same_tokens)

    def build(self, student: Any, teacher: Any, artifacts: Any) -> None:
        entries = ops.shared_entries(self.pair.student_ids, student.vocab_size, teacher.vocab_size)
        self.register_buffer("ours", entries["student_shared"], persistent=False)
        self.register_buffer("theirs", entries["teacher_shared"], persistent=False)

    @visit
    def shared(self, student: Logits, teacher: Logits) -> Terms:
        log_p, log_q = teacher.logits[:, self.theirs].log_softmax(-1), student.logits[:, self.ours].log_softmax(-1)
        return Terms().add("kl", ops.forward_kl(log_p, log_q), per="tokens" if self.pair.same_tokens else "pairs")


SKETCHES = (WeighedByDoubt, OnSharedEntries)
