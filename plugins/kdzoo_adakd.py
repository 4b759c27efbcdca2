"""AdaKD: the hardest tokens, as many as the history of the loss says, each at a temperature of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kdzoo import Register, TokenNeeds, TokenWeights, TokenWeightsParams, WeighedTokens, Weights, hookimpl, ops


class Adaptive(TokenWeights):
    """Token focusing: a share r of hardest tokens that shrinks while the loss falls and grows when it rises. Inverse
    difficulty temperature scaling: hard tokens are compared at low temperatures, easy ones at high."""

    name = "adaptive"
    paper = "Xie et al., LLM-Oriented Token-Adaptive Knowledge Distillation, AAAI 2026, arxiv.org/abs/2510.11615"
    formula = (
        "w_i = 1 for the r n hardest of n tokens by s_i = Hellinger(p_i, q_i); tau_i = tau exp(-c tanh(log(s_i / "
        "median s))), the loss tau_i^2 D(p_i^(1/tau_i), q_i^(1/tau_i)); r <- r (1 - a) when the loss's moving average "
        "has fallen by a part e since the last change, r (1 + a) when it has risen so"
    )
    deviations = (
        "`calculate_distillation_weight` of SassyRong/AdaKD @ 66363ca selects among the tokens of each micro-batch and "
        "rank; here among those of the whole step, so that no split changes it. Tokens as hard as the last are kept.",
        "Its moving average counts micro-batches; here optimizer steps.",
        "Its `temperature` divides the logits before s is measured, and once more as tau; here s is measured at "
        "temperature 1, and a loss with a temperature of its own divides by that beside tau_i.",
    )

    class Params(TokenWeightsParams):
        by: Literal["hellinger", "forward_kl", "reverse_kl", "js"] = "hellinger"
        """s, what makes a token hard."""
        change: float = Field(0.05, ge=0, lt=1)
        """a, by which part r changes. 0: all tokens are kept."""
        tolerance: float = Field(0.05, gt=0)
        """e, by which part the loss must have moved."""
        decay: float = Field(0.99, ge=0, lt=1)
        """Of the loss's moving average."""
        warmup: float = Field(0.05, ge=0, lt=1)
        """The share of the stage's steps after which r begins to move."""
        least: float = Field(0.1, gt=0, le=1)
        """The smallest r."""
        temperature: float = Field(1.0, gt=0)
        """tau. The loss divides by its own temperature as well."""
        temperature_scale: float = Field(0.5, ge=0)
        """c. 0: every token at tau."""
        direction: Literal["inverse", "direct"] = "inverse"
        """"inverse": low temperatures for hard tokens. "direct": high ones (the authors' ablation)."""

    @classmethod
    def needs(cls, params):
        return TokenNeeds(frozenset({f"pair.{params.by}"}))

    def build(self):
        for name, value in (("share", 1.0), ("average", float("nan")), ("reference", float("nan"))):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def score(self, tokens: WeighedTokens) -> Tensor:
        return tokens.fact(f"pair.{self.params.by}")

    def weigh(self, tokens: WeighedTokens) -> Weights:
        scores, everything = tokens.scores, tokens.scores_of_step
        share = float(self.share)
        kept = ops.among_largest(scores, everything, share, rounded=torch.floor)
        selected = everything[ops.among_largest(everything, everything, share, rounded=torch.floor)]
        if not len(selected):
            return Weights(kept, torch.ones_like(scores))
        median = selected.median()
        smallest = torch.finfo(scores.dtype).tiny
        relative = (scores / median.clamp_min(smallest)).clamp_min(1e-8)
        c = self.params.temperature_scale * (-1 if self.params.direction == "inverse" else 1)
        return Weights(kept, self.params.temperature * (c * relative.log().tanh()).exp())

    def after_step(self, terms: Mapping[str, float], progress: float) -> None:
        loss, p = sum(terms.values()), self.params
        average = loss if self.average.isnan() else p.decay * float(self.average) + (1 - p.decay) * loss
        self.average.fill_(average)
        if self.reference.isnan():
            if progress > p.warmup:
                self.reference.fill_(average)
            return
        risen = average - float(self.reference)
        if abs(risen) > p.tolerance * abs(float(self.reference)):
            factor = 1 + p.change if risen > 0 else 1 - p.change
            self.share.mul_(factor).clamp_(p.least, 1.0)
            self.reference.fill_(average)


@hookimpl
def register_plugins(register: Register) -> None:
    register(Adaptive)
