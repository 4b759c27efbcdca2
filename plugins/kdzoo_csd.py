"""CSD: all differences between two logits of the student are those of the teacher.

y are the teacher's logits, z the student's, for models that share one tokenizer. Follows aailab-kaist/CSD @ c77a3a7,
task_agnostic_distillation/csd/losses.py: csd and csd_weighting_function, and @ 5688c51,
task_specific_distillation/train/ddp_csd.py: CSD_TS and CSD_TS_mix.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kdzoo import Logits, Loss, Needs, Params, Register, Terms, hookimpl, ops, visit

Weight = Literal["student", "teacher", "uniform", "mixture"]


class CSD(Loss):
    """Squared errors of differences of logits, which a softmax does not smooth and a constant does not change.

    With one weight for both, it is the variance of z - y under that distribution.
    """

    name = "csd"
    paper = (
        "Kim et al., Distillation of Large Language Models via Concrete Score Matching, ICLR 2026, "
        "arxiv.org/abs/2509.25837"
    )
    formula = (
        "L = 1/N sum_i 1/2 sum_v sum_w a_i(v) b_i(w) ((z_i(v) - z_i(w)) - (y_i(v) - y_i(w)))^2, "
        "weights a and b without gradient, y teacher, z student"
    )
    deviations = (
        "`csd`, `csd_weighting_function`, `CSD_TS` and `CSD_TS_mix` return a number whose gradient is half of the "
        "formula's, and whose value says nothing: half a slot's weight is theirs.",
        "An entry that one model alone excludes, by a logit of -inf, is 100 nats off, and one that both exclude has no "
        "weight: theirs are not numbers there.",
        "They divide by the tokens of each micro-batch; here the sum is divided by those of the whole step.",
        "`dld_ablation`, which compares logits themselves under several normalisations, is their baseline and not "
        "offered.",
    )

    class Params(Params):
        first_weight: Weight = "student"
        """a: the student's distribution, the teacher's, a uniform one, or a mixture of the first two."""
        second_weight: Weight = "student"
        """b. The authors' (S, S) is "student" twice, (U, S) "uniform" and "student", (T, S) "teacher" and "student"."""
        teacher_share: float = Field(0.5, ge=0, le=1)
        """Of the teacher in "mixture": `alpha` of `CSD_TS_mix`."""
        temperature: float = Field(1.0, gt=0)
        """Divides the logits in the weights, not those that are compared. The authors find 1.5 best for GPT-2."""

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", divergence=True)

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        tau, names = self.params.temperature, (self.params.first_weight, self.params.second_weight)
        log_p, log_q = (model.logprobs(tau).detach() for model in (teacher, student))
        a, b = (self.weight(name, log_p, log_q) for name in names)

        def squares(log_p: Tensor, log_q: Tensor) -> ops.Closed:
            """With the error d centred so that its mean under a is 0, no product of means is left to cancel."""
            error = ops.log_ratio(log_q, log_p)
            of_a = error - (a * error).sum(-1, keepdim=True)
            of_b = error - (b * error).sum(-1, keepdim=True)
            by_z = a * of_b + b * of_a
            return 0.5 * ((a + b) * of_a.square()).sum(-1), lambda g: by_z * -g, lambda g: by_z * g

        # Log-probabilities are logits up to a constant for each token, which differences do not have.
        return Terms().add("csd", ops.closed_form(squares, teacher.logprobs(), student.logprobs()))

    def weight(self, name: Weight, log_p: Tensor, log_q: Tensor) -> Tensor:
        """A distribution [n, V]."""
        if name == "uniform":
            kept = (log_p.isfinite() | log_q.isfinite()).to(log_p.dtype)
            return kept / kept.sum(-1, keepdim=True)
        share = {"student": 0.0, "teacher": 1.0, "mixture": self.params.teacher_share}[name]
        return torch.lerp(log_q.exp(), log_p.exp(), share)


@hookimpl
def register_plugins(register: Register) -> None:
    register(CSD)
