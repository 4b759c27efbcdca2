"""What the teacher finds likeliest, and in which order: losses on the first few tokens of the vocabulary.

p is the teacher's distribution, q the student's, i a token of the response; both models share one tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdzoo import Logits, Loss, Needs, Params, Register, Terms, hookimpl, ops, visit

PAPER = (
    "Zhang et al., Towards Understanding and Improving Knowledge Distillation for Neural Machine Translation, "
    "ACL 2023, arxiv.org/abs/2305.08096"
)


class Top1CE(Loss):
    """The term of the forward cross-entropy that belongs to the teacher's likeliest token, and no other."""

    name = "top1_ce"
    paper = (
        "Zhang et al., KDFlow: A User-Friendly and Efficient Knowledge Distillation Framework for Large Language "
        "Models, 2026, arxiv.org/abs/2603.01875"
    )
    formula = "L = 1/N sum_i - p_i(t) log q_i(t), t = argmax p_i, p teacher, q student"
    deviations = (
        "KDFlow's paper does not describe `compute_top1_ce` (songmzhang/KDFlow @ 3a7a21a), which is computed here.",
        "A token that the student excludes by a logit of -inf counts as 100 nats; there it is infinite.",
    )

    class Params(Params):
        temperature: float = Field(1.0, gt=0)
        """Divides the logits of both models."""

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same")

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        tau = self.params.temperature
        log_p, top = teacher.logprobs(tau).max(-1)
        nll = ops.cross_entropy(student.logprobs(tau), top).clamp_max(ops.INFINITE_RATIO)
        return Terms().add("top1_ce", log_p.exp() * nll)


class Ranking(Loss):
    """The hierarchical ranking loss: the teacher's first token before its next, and these before the student's own."""

    name = "ranking"
    paper = PAPER
    formula = (
        "L = 1/N sum_i [sum_a max(0, q_i(t_a) - q_i(t_1)) + sum_ab max(0, q_i(s_b) - q_i(t_a)) [p_i(t_a) > p_i(s_b)]], "
        "t_a the a-th likeliest token of the teacher and s_b the b-th of the student, a and b up to k"
    )
    deviations = (
        "`compute_hierarchical_ranking_loss` of KDFlow asks whether q(s_a) > p(s_b), of two models, where the authors' "
        'first code (songmzhang/NMT-KD @ e01c09c) asks whether p(t_a) > p(s_b); that is `asks` "both".',
        "KDFlow's `--hrl_topk` does not reach the function, which always takes 5; its temperature is not read.",
        "NMT-KD adds a KL divergence, here `forward_kl` in another slot, and repeats both on the student's own "
        "predictions, which is not offered.",
    )

    class Params(Params):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "nmt-kd@e01c09c": {"k": 10},
            "kdflow@3a7a21a": {"asks": "both"},
        }
        preset: Literal["nmt-kd@e01c09c", "kdflow@3a7a21a"] | None = None
        """Whose code: what is not given beside it is as there."""
        k: int = Field(5, ge=1)
        """How many of the likeliest tokens of either model are ranked."""
        asks: Literal["teacher", "both"] = "teacher"
        """Whose probabilities say that a token of the teacher's goes before one of the student's: the teacher's for
        both; or the student's for its own token of the same rank, and the teacher's for the other."""

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", divergence=True)

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        p, q = teacher.logprobs().exp(), student.logprobs().exp()
        k = min(self.params.k, q.shape[-1])
        (p_of_t, t), (q_of_s, s) = p.topk(k), q.topk(k)
        q_of_t, p_of_s = q.gather(-1, t), p.gather(-1, s)
        first = (q_of_t - q_of_t[:, :1]).clamp_min(0).sum(-1)
        before = p_of_t if self.params.asks == "teacher" else q_of_s
        counts = before[:, :, None] > p_of_s[:, None, :]  # [n, a, b]
        others = ((q_of_s[:, None, :] - q_of_t[:, :, None]).clamp_min(0) * counts).sum((1, 2))
        return Terms().add("first", first).add("others", others)


@hookimpl
def register_plugins(register: Register) -> None:
    register(Top1CE)
    register(Ranking)
