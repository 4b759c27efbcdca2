"""ABKD: the alpha-beta divergence, which has the forward and the reverse KL at two of its corners.

p is the teacher's distribution, q the student's, for models that share one tokenizer. Follows ghwang-s/abkd @ df81318,
distillation_llm/distillm/losses.py: ab_div; the one deviation, in the constants of the limits, is a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdzoo import Logits, Loss, Needs, Params, Register, Terms, hookimpl, ops, visit


class ABKD(Loss):
    """The alpha-beta divergence, whose derivative by log q is q^β (q^α - p^α) / α.

    Alpha shapes the error: the smaller, the more do tokens count that are off by a large factor. Beta weighs it with
    the student's own confidence.
    """

    name = "abkd"
    paper = (
        "Wang et al., ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via "
        "α-β-Divergence, ICML 2025, arxiv.org/abs/2505.04560"
    )
    formula = (
        "L = 1/N sum_i D(p_i || q_i), D = - 1/(αβ) sum_v [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)], "
        "p teacher, q student; KL(p || q) at α = 1, β = 0, and KL(q || p) at α = 0, β = 1"
    )
    deviations = (
        "`ab_div` has 1/α or 1/β where the formula goes to 1/α² or 1/β²; by default the constants are the limits, "
        "so that neighbouring parameters have neighbouring values (`constants`).",
        "`ab_div` is not a number at both KLs and where α + β is 0 if the teacher excludes a token by a logit of "
        "-inf; here its log-ratio counts as 100, and negative powers of probabilities are bounded.",
        "`ab_div` loses digits in float32 where αβ is small; here differences are taken without cancellation, and "
        "in float64 where α, β and their sum are below 0.01.",
        "The authors' trainer divides by the tokens of each micro-batch, and the paper averages over every sequence "
        "first; here the sum is divided by the tokens of the whole step.",
        "`alphanet`, the larger of two such divergences by the mean of the micro-batch, is not offered: a "
        "sample's loss would depend on its neighbours.",
    )

    class Params(Params):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "abkd@df81318": {"alpha": 0.2, "beta": 0.7, "constants": "authors"},
        }
        preset: Literal["abkd@df81318"] | None = None
        """A release of the authors' code: what is not given beside it is as there."""
        alpha: float = 0.2
        """α. Default: the authors' for GPT-2 of 0.3B and 0.7B (OpenLLaMA: 0.1)."""
        beta: float = 0.7
        """β. Default: the authors' for GPT-2 of 0.3B and 0.7B (OpenLLaMA: 0.8)."""
        temperature: float = Field(1.0, gt=0)
        """Both logits are divided by it. The paper has none for language models, one for images."""
        constants: Literal["limit", "authors"] = "limit"
        """Where α, β or α + β is 0. "limit": what the formula goes to, which has 1/α² or 1/β². "authors": 1/α or 1/β,
        as in their code: another scale than the neighbours', and a negative one where that number is negative. Both
        KLs are the same in either."""

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", divergence=params.constants == "limit")

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        log_p, log_q = teacher.logprobs(self.params.temperature), student.logprobs(self.params.temperature)
        value = ops.alpha_beta(log_p, log_q, self.params.alpha, self.params.beta)
        return Terms().add("abkd", value * self.authors_factor() if self.params.constants == "authors" else value)

    def authors_factor(self) -> float:
        alpha, beta = self.params.alpha, self.params.beta
        if alpha == 0:
            return beta or 1.0
        return alpha if beta == 0 or alpha + beta == 0 else 1.0


@hookimpl
def register_plugins(register: Register) -> None:
    register(ABKD)
