"""f-divergences, sum_v q f(p / q), by the name of their generator f, for models that share one tokenizer.

p is the teacher's distribution, q the student's. Other plugins have what is not here: both KLs, `js` and
`total_variation`; and `abkd` with α + β = 1 is Amari's α-divergence. There "hellinger" is a quarter of α = β = 1/2,
and, where no ratio passes `max_ratio`, "pearson" is twice α = 2, β = -1 and "neyman" twice α = -1, β = 2. "jeffreys" is
`forward_kl` plus `reverse_kl`. "le_cam" is to Pearson's what `js` is to the KL: twice that from p to (p + q) / 2. It is
at most twice the `total_variation`, and at least twice its square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kdzoo import Logits, Loss, Needs, Params, Register, Terms, hookimpl, ops, visit

Tangent = tuple[Tensor, Tensor]
"""Of f at u: its slope f'(u), and what it has at 0, f(u) - u f'(u). Then q f(p / q) is p times the one plus q times the
other, and these two summands are its derivatives by log p and by log q."""

GENERATORS: dict[str, Callable[[Tensor], Tangent]] = {
    "hellinger": lambda r: ((-r / 2).expm1() / -2, (r / 2).expm1() / -2),
    "jeffreys": lambda r: (r - (-r).expm1(), -r - r.expm1()),
    "le_cam": lambda r: ((x := (r / 2).tanh()) * (2 - x), -x * (2 + x)),
    "neyman": lambda r: (-(-2 * r).expm1(), 2 * (-r).expm1()),
    "pearson": lambda r: (2 * r.expm1(), -(2 * r).expm1()),
}
"""f is (√u - 1)^2 / 2, (u - 1) log u, (u - 1)^2 / (u + 1), (u - 1)^2 / u, and (u - 1)^2. Its tangent at u = e^r."""

LARGEST_LOG = 80.0
"""Of a ratio that is finite in float32; where nothing else ends it, what lies beyond is as without an end."""


class FDivergence(Loss):
    """A divergence by its generator: how much an entry counts whose probabilities have the ratio u."""

    name = "f_divergence"
    paper = (
        "Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, ACL 2023, "
        "arxiv.org/abs/2307.15190"
    )
    formula = (
        "L = 1/N sum_i sum_v q_i(v) f(p_i(v) / q_i(v)); Rényi's: log(sum_v p_i(v)^a q_i(v)^(1-a)) / (a - 1), "
        "p teacher, q student"
    )
    deviations = (
        "The paper has both KLs, Jensen-Shannon's and the total variation, which are plugins of their own here; it "
        "samples sequences, and here every token of the data has its divergence.",
        "`jeffrey` of aailab-kaist/CSD @ c77a3a7 leaves out an entry that one model excludes, by a logit of -inf; it "
        "counts as 100 nats here. It divides by the tokens of each micro-batch, and not of the whole step.",
        "The generators of Pearson and Neyman have no bound: beyond `max_ratio` they go on as a KL, whose gradient is "
        "bounded and points the right way. `f_divergence` of aailab-kaist/AMiD @ a963105 clips a power of the ratio.",
    )

    class Params(Params):
        generator: Literal["hellinger", "jeffreys", "le_cam", "neyman", "pearson", "renyi"] = "hellinger"
        """f. "hellinger": the squared distance, 1/2 sum (√p - √q)^2. "jeffreys": sum (p - q) log(p / q). "le_cam", also
        called triangular: sum (p - q)^2 / (p + q). "neyman": sum (p - q)^2 / p. "pearson": sum (p - q)^2 / q. "renyi":
        the logarithm of such a sum, of an order below 1."""
        max_ratio: float = Field(30.0, gt=1, le=1e6)
        """Where f goes on as a KL: of "pearson" the largest p / q, of "neyman" the largest q / p."""
        order: float = Field(0.5, gt=0, lt=1)
        """a, of "renyi": it goes to KL(p || q) at 1. At most 100 / (1 - a), where nothing is likely to both models."""
        temperature: float = Field(1.0, gt=0)
        """Both logits are divided by it."""

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", divergence=True)

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        log_p, log_q = teacher.logprobs(self.params.temperature), student.logprobs(self.params.temperature)
        divergence = self.renyi if self.params.generator == "renyi" else self.divergence
        return Terms().add("f_divergence", ops.closed_form(divergence, log_p, log_q))

    def divergence(self, log_p: Tensor, log_q: Tensor) -> ops.Closed:
        """By the tangents at ratios up to an end; beyond, f'' is that of the KL from the model that finds more."""
        ends = {self.params.generator: math.log(self.params.max_ratio)}
        high, low = ends.get("pearson", LARGEST_LOG), -ends.get("neyman", LARGEST_LOG)
        p, q, ratio = log_p.exp(), log_q.exp(), ops.log_ratio(log_p, log_q)
        slope, at_0 = GENERATORS[self.params.generator](ratio.clamp(low, high))
        slope = slope * torch.where(ratio < low, q * math.exp(low), p)
        at_0 = at_0 * torch.where(ratio > high, p * math.exp(-high), q)
        by_p = slope - at_0 * (ratio - high).clamp_min(0)
        by_q = at_0 - slope * (low - ratio).clamp_min(0)
        return (by_p + by_q).clamp_min(0).sum(-1), lambda g: by_p * g, lambda g: by_q * g

    def renyi(self, log_p: Tensor, log_q: Tensor) -> ops.Closed:
        order = self.params.order
        both = order * log_p + (1 - order) * log_q
        total = both.logsumexp(-1, keepdim=True).clamp_min(-ops.INFINITE_RATIO)
        share = (both - total).exp()
        value = (total.squeeze(-1) / (order - 1)).clamp_min(0)
        return value, lambda g: share * (g * order / (order - 1)), lambda g: share * -g


@hookimpl
def register_plugins(register: Register) -> None:
    register(FDivergence)
