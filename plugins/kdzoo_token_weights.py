"""How much each token of a response counts in a loss: by entropies, by a column of the data, by the teacher's verdict.

p is the teacher's prediction of a token i, q the student's, H the entropy, y_i the gold token.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdzoo import Register, TokenNeeds, TokenWeights, TokenWeightsParams, WeighedTokens, Weights, hookimpl, ops


class Entropy(TokenWeights):
    """Tokens count by how uncertain the student is, or the teacher, or by how far the two are apart in that."""

    name = "entropy"
    paper = (
        "Jin et al., Entropy-Aware On-Policy Distillation of Language Models, ICML 2026, arxiv.org/abs/2603.07079; "
        "Tavor et al., Rethinking Selective Knowledge Distillation, 2026, arxiv.org/abs/2602.01395"
    )
    formula = "w_i = H_i^k, or 1 where H_i > h, else 0; H_i = H(q_i), H(p_i) or |H(p_i) - H(q_i)|"
    deviations = (
        "The first paper adds a forward KL where the teacher's entropy is above a threshold and divides by all tokens: "
        'that is a second loss with `of` "teacher", `above`, and `divide_by` "tokens". The second keeps the most '
        "uncertain tokens of each sequence: that is `top_share`.",
    )

    class Params(TokenWeightsParams):
        of: Literal["student", "teacher", "gap"] = "student"
        """Whose entropy. "gap": the absolute difference of both, of models with one
        tokenizer. With two, a token that no span aligns gets the teacher's entropy 0."""
        power: float = Field(1.0, gt=0)
        """k, of the entropy as a weight. In nats."""
        above: float | None = Field(None, ge=0)
        """h: tokens with more than so many nats count 1, the others 0. Default: by the entropy itself."""

    @classmethod
    def needs(cls, params):
        models = ("student", "teacher") if params.of == "gap" else (params.of,)
        facts = frozenset(f"{model}.entropy" for model in models)
        return TokenNeeds(facts, tokenizers="same" if params.of == "gap" else "any")

    def weigh(self, tokens: WeighedTokens) -> Weights:
        if self.params.of == "gap":
            entropy = (tokens.fact("teacher.entropy") - tokens.fact("student.entropy")).abs()
        else:
            entropy = tokens.fact(f"{self.params.of}.entropy").clamp_min(0)
        return Weights(entropy**self.params.power if self.params.above is None else entropy > self.params.above)


class Column(TokenWeights):
    """A weight from the data: a number of the row, or a list with one for each of the student's tokens."""

    name = "column"
    paper = "weights of the data set's own"
    formula = "w_i = the row's number, or its i-th"

    class Params(TokenWeightsParams):
        column: str = "weight"
        """The column of the training rows."""

    @classmethod
    def needs(cls, params):
        return TokenNeeds(columns=frozenset({params.column}))

    def weigh(self, tokens: WeighedTokens) -> Weights:
        return Weights(tokens.column(self.params.column))


class Verdict(TokenWeights):
    """Tokens that the teacher gets right, or those that it gets wrong: the mask of residual learning."""

    name = "verdict"
    paper = (
        "Knowledge Distillation for Large Language Models through Residual Learning, ICLR 2026, "
        "openreview.net/forum?id=Dh6KxUxG20"
    )
    formula = "w_i = wrong_i, or 1 - wrong_i; wrong_i = [argmax p_i != y_i], or 1 - p_i(y_i)"

    class Params(ops.VerdictParams, TokenWeightsParams):
        keep: Literal["right", "wrong"] = "right"
        """Which tokens count."""
        indicator: Literal["hard", "soft"] = "hard"
        """"hard": whole tokens. "soft": each by the teacher's probability of the gold token, or by what that lacks."""

    @classmethod
    def needs(cls, params):
        return TokenNeeds(frozenset({params.verdict if params.indicator == "hard" else params.gold_logprob}))

    def weigh(self, tokens: WeighedTokens) -> Weights:
        wrong = self.params.doubt(tokens.facts, soft=self.params.indicator == "soft")
        return Weights(wrong if self.params.keep == "wrong" else 1 - wrong)


@hookimpl
def register_plugins(register: Register) -> None:
    for weights in (Entropy, Column, Verdict):
        register(weights)
