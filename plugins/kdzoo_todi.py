"""ToDi: each entry of the vocabulary has its own weights of the forward and the reverse KL.

p is the teacher's distribution, q the student's, for models that share one tokenizer. Follows jungseongryong/ToDi @
45f1f8b, code/criterions/various_divergence.py: compute_ToDi.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kdzoo import Logits, Loss, Needs, Params, Register, Terms, hookimpl, ops, visit


class ToDi(Loss):
    """The forward KL where the student finds an entry too unlikely, the reverse KL where it finds it too likely.

    Every entry's part is (1 - a) q r (e^((1+β) r) - 1) with r = log p - log q, which is never negative.
    """

    name = "todi"
    paper = (
        "Jung et al., ToDi: Token-wise Distillation via Fine-Grained Divergence Control, EMNLP 2025, "
        "arxiv.org/abs/2505.16297"
    )
    formula = (
        "L = 1/N sum_i sum_v [a p_i(v) log(p_i(v) / q_i(v)) + (1 - a) q_i(v) log(q_i(v) / p_i(v))], "
        "a = sigmoid(β log(p_i(v) / q_i(v))) without gradient, p teacher, q student"
    )
    deviations = (
        "An entry that one model alone excludes, by a logit of -inf, counts as 100 nats off: `compute_ToDi` leaves it "
        "out.",
        "`compute_ToDi` has no β, which is 1; at 0 both KLs have the weight 1/2.",
        "Its trainer divides by the tokens of each micro-batch; here the sum is divided by those of the whole step.",
    )

    class Params(Params):
        temperature: float = Field(1.0, gt=0)
        """Both logits are divided by it, also in the weights."""
        teacher_temperature: float = Field(1.0, gt=0)
        """The teacher's logits are divided by it once more, as where the authors' function is called so."""
        beta: float = Field(1.0, ge=0)
        """β: how sharply the weights follow the log-ratio. 0: half of either KL. Default: the authors'."""

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", divergence=params.teacher_temperature == 1.0)

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        tau = self.params.temperature
        log_p, log_q = teacher.logprobs(tau * self.params.teacher_temperature), student.logprobs(tau)
        a = (self.params.beta * ops.log_ratio(log_p.detach(), log_q.detach())).sigmoid()

        def divergence(log_p: Tensor, log_q: Tensor) -> ops.Closed:
            ratio = ops.log_ratio(log_p, log_q)
            forward, reverse = a * log_p.exp(), (1 - a) * log_q.exp()
            return (
                ((forward - reverse) * ratio).clamp_min_(0).sum(-1),  # what is below 0 is rounding
                lambda g: (ratio + 1).mul_(forward).sub_(reverse).mul_(g),
                lambda g: (1 - ratio).mul_(reverse).sub_(forward).mul_(g),
            )

        return Terms().add("todi", ops.closed_form(divergence, log_p, log_q))


@hookimpl
def register_plugins(register: Register) -> None:
    register(ToDi)
