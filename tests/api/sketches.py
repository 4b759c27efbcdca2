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


SKETCHES = (WeighedByDoubt,)
