"""The hardest tokens alone: p is the teacher's prediction of a token i, q the student's, H the entropy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from kdzoo import Register, TokenNeeds, TokenWeights, TokenWeightsParams, WeighedTokens, Weights, hookimpl, ops


class TopShare(TokenWeights):
    """The hardest tokens alone: by the student's uncertainty, by either model's cross-entropy, or by how far the models
    are apart."""

    name = "top_share"
    paper = "Tavor et al., Rethinking Selective Knowledge Distillation, 2026, arxiv.org/abs/2602.01395"
    formula = "w_i = 1 for the ceil(s n) tokens of most H(q_i) among n, else 0"
    deviations = (
        "`forward_batch_runner.py` of almogtavor/SE-KD3x @ 08b2763 divides by the kept tokens of each micro-batch; "
        "here by those of the whole step. Of tokens of a sequence with the same score the first are kept; among those "
        "of the step, all that score as much as the last one.",
    )

    class Params(TokenWeightsParams):
        share: float = Field(0.2, gt=0, le=1)
        """s, the share of tokens that is kept."""
        by: Literal[
            "student_entropy",
            "teacher_entropy",
            "cross_entropy",
            "teacher_cross_entropy",
            "forward_kl",
            "reverse_kl",
            "js",
            "hellinger",
            "total_variation",
        ] = "student_entropy"
        """What makes a token hard. "cross_entropy": of the student. With two tokenizers, the teacher's is that of the
        whole span of text, and 0 outside every span."""
        among: Literal["sequence", "step"] = "sequence"
        """The tokens of each sequence, or all of the optimizer step."""

    @classmethod
    def needs(cls, params):
        return TokenNeeds(frozenset({fact_of(params.by)}))

    def hardness(self, tokens: WeighedTokens) -> Tensor:
        value = tokens.fact(fact_of(self.params.by))
        return -value if self.params.by.endswith("cross_entropy") else value

    def score(self, tokens: WeighedTokens) -> Tensor | None:
        return self.hardness(tokens) if self.params.among == "step" else None

    def weigh(self, tokens: WeighedTokens) -> Weights:
        if self.params.among == "step":
            return Weights(ops.among_largest(tokens.scores, tokens.scores_of_step, self.params.share))
        lengths = tokens.side.sample.bincount(minlength=tokens.side.sequences)
        wanted = (lengths.double() * self.params.share).ceil()
        return Weights(ops.ranks_within(self.hardness(tokens), tokens.side) < wanted[tokens.side.sample])


FACT_OF = {
    "student_entropy": "student.entropy",
    "teacher_entropy": "teacher.entropy",
    "cross_entropy": "student.label_logprob",
    "teacher_cross_entropy": "teacher.label_logprob",
}


def fact_of(by: str) -> str:
    """The fact that makes a token hard: of one model, or a divergence between the two."""
    return FACT_OF.get(by, f"pair.{by}")


@hookimpl
def register_plugins(register: Register) -> None:
    register(TopShare)
