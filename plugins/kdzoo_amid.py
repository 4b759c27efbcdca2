"""AMiD: a divergence between one model and an α-mixture of both, the assistant.

p is the teacher's distribution, q the student's, for models that share one tokenizer. Follows aailab-kaist/AMiD @
a963105, distillm/losses.py: amid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdzoo import Logits, Loss, Needs, Register, Terms, hookimpl, ops, visit


class AMiD(Loss):
    """A divergence from the teacher, or from the student, to a mixture of both; the mixture learns too.

    At α = -1 the mixture is the arithmetic one of `skew_forward_kl` (side "teacher") and `skew_reverse_kl` (side
    "student"), at α = 1 the geometric one of `taid`, and at α = 3 the harmonic one.
    """

    name = "amid"
    paper = (
        "Shin et al., AMiD: Knowledge Distillation for LLMs with α-mixture Assistant Distribution, ICLR 2026, "
        "arxiv.org/abs/2510.15982"
    )
    formula = (
        "L = 1/N sum_i D(p_i || r_i) or D(q_i || r_i), r_i(v) = {λ p_i(v)^e + (1 - λ) q_i(v)^e}^(1/e) / Z_i, "
        "e = (1 - α) / 2, and p^λ q^(1-λ) / Z at α = 1, p teacher, q student"
    )
    deviations = (
        "`amid` takes the geometric mixture at every α above 1; here the formula goes on, to the smaller of p and q.",
        "At α of 1 and more an entry that one model alone excludes, by a logit of -inf, is 100 nats less likely to it: "
        "`amid` leaves it out, which can make the divergence negative.",
        "`amid` divides by the tokens of each micro-batch; here the sum is divided by those of the whole step.",
        "The authors' recipes train on the student's own samples as well; here the answers are those of the data.",
    )

    class Params(ops.DivergenceParams):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "amid@a963105": {"divergence": "alpha_beta"},
        }
        preset: Literal["amid@a963105"] | None = None
        """The authors' scripts: what is not given beside it is as there."""
        divergence: Literal[ops.DivergenceName, "alpha_beta"] = "forward_kl"
        """D, of the side's distribution and r: "forward_kl" is KL(p || r) or KL(q || r), "reverse_kl" KL(r || p) or
        KL(r || q). "alpha_beta" is that of `abkd`."""
        divergence_alpha: float = 0.2
        """α of "alpha_beta". Default: the authors'."""
        divergence_beta: float = 0.7
        """β of "alpha_beta". Default: the authors'."""
        side: Literal["teacher", "student"] = "teacher"
        """Which model r is compared with: the first letter of the authors' "pr" and "qr"."""
        alpha: float = 0.5
        """α: the shape of the mixture. The smaller, the more does the likelier model count for each entry."""
        teacher_weight: float = Field(0.5, ge=0, le=1)
        """λ, of the teacher in the mixture. At 0 the mixture is q, at 1 it is p."""
        temperature: float = Field(1.0, gt=0)
        """Both logits are divided by it. The authors have none."""

        @model_validator(mode="after")
        def differs_from_its_side(self) -> Any:
            if self.teacher_weight == {"teacher": 1.0, "student": 0.0}[self.side]:
                what = f"with teacher_weight {self.teacher_weight} the mixture is the {self.side} itself"
                raise ValueError(f"{what}; take another weight or side")
            return self

        def measure(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            if self.divergence == "alpha_beta":
                return ops.alpha_beta(log_p, log_q, self.divergence_alpha, self.divergence_beta)
            return super().measure(log_p, log_q)

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", divergence=True)

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        log_p, log_q = teacher.logprobs(self.params.temperature), student.logprobs(self.params.temperature)
        side = log_p if self.params.side == "teacher" else log_q
        value = self.params.measure(side, alpha_mixture(log_p, log_q, self.params.teacher_weight, self.params.alpha))
        # Below 0 is rounding: taken off the value, not off the gradient.
        return Terms().add("amid", value - value.detach().clamp_max(0))


def alpha_mixture(log_p: Tensor, log_q: Tensor, teacher_weight: float, alpha: float) -> Tensor:
    """log r [n, V], in logarithms throughout, so that no α overflows."""
    if teacher_weight in (0.0, 1.0):
        return log_p if teacher_weight else log_q
    of_p, of_q, power = teacher_weight, 1 - teacher_weight, (1 - alpha) / 2
    excluded = log_p.isneginf() & log_q.isneginf()
    log_p, log_q = log_p.masked_fill(excluded, 0), log_q.masked_fill(excluded, 0)
    if power < NEAR_0:  # where one probability of 0 makes the mixture 0, or almost
        log_p, log_q = (
            torch.where(log_p.isneginf(), log_q - ops.INFINITE_RATIO, log_p),
            torch.where(log_q.isneginf(), log_p - ops.INFINITE_RATIO, log_q),
        )
    if abs(power) >= NEAR_0:
        mixed = torch.logaddexp(math.log(of_p) + power * log_p, math.log(of_q) + power * log_q) / power
    else:  # the geometric mixture, and what is more: no difference of almost equal numbers is divided by the power
        mixed = of_p * log_p + of_q * log_q
        if abs(power) > 1e-9:
            ratio = power * (log_p - log_q)
            mixed = mixed + (of_p * (of_q * ratio).expm1() + of_q * (-of_p * ratio).expm1()).log1p() / power
    return mixed.masked_fill(excluded, -torch.inf).log_softmax(-1)


NEAR_0 = 0.01
"""Powers below which a sum of them is almost 1, and its logarithm rounding."""


@hookimpl
def register_plugins(register: Register) -> None:
    register(AMiD)
