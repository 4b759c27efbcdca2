"""Divergences between the next-token distributions of a teacher and a student that share one tokenizer.

p is the teacher's distribution, q the student's, i a token of the response, v one of the vocabulary. All are summed
over the vocabulary and averaged over tokens. What several libraries call by one name differs in temperatures, weights
and constants; each parameter says whose reading it is: songmzhang/DSKD @ 077337a, jongwooko/distillm @ d47e77f (whose
functions ghwang-s/abkd @ df81318 copies), huggingface/trl @ f2cd577, arcee-ai/DistillKit @ a61c2e7, songmzhang/KDFlow
@ 3a7a21a, bminixhofer/tokenkit @ bcacdef. DistiLLM's `symmetric_kl` is two losses in one recipe, `forward_kl` and
`reverse_kl`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdzoo import Logits, Loss, Needs, Params, Register, Terms, hookimpl, ops, visit


class DivergenceParams(Params):
    """Temperatures, and how much of the vocabulary is compared."""

    temperature: float = Field(1.0, gt=0)
    """Both logits are divided by it."""
    teacher_temperature: float = Field(1.0, gt=0)
    """The teacher's logits are divided by it once more."""
    square_temperature: bool = False
    """Multiply by the temperature squared, so that the gradient's size does not depend on it. DistillKit does; DSKD,
    TRL and KDFlow do not, and DistiLLM has no temperature."""
    top_k: int | None = Field(None, ge=1)
    """Compare the teacher's likeliest tokens only, as where a teacher was stored (DistillKit's sparse losses). Default:
    the whole vocabulary."""
    rest: Literal["one_token", "dropped"] = "one_token"
    """Of `top_k`: what the teacher's other tokens are. "one_token": both models' others are one token more
    (DistillKit's "symmetric_uniform", at temperature 1). "dropped": of probability 0 to the teacher, whose likeliest
    are divided by their sum (its "zero")."""

    @property
    def is_divergence(self) -> bool:
        """Whether it is never negative, and 0 where both models have the same logits."""
        return self.teacher_temperature == 1.0 and (self.top_k is None or self.rest == "one_token")


class ForwardParams(DivergenceParams):
    """Of a divergence from p, which is a cross-entropy less the entropy of p."""

    subtract_entropy: bool = True
    """False: the entropy of p stays in (DistiLLM). The gradient is the same, the value never 0."""

    @property
    def is_divergence(self) -> bool:
        return self.subtract_entropy and super().is_divergence


class Divergence(Loss):
    """What all of them do: `divergence` of two log-softmaxes, summed over tokens."""

    Params = DivergenceParams

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", divergence=params.is_divergence)

    @abstractmethod
    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Of the teacher's and the student's log-probabilities [n, V], per token [n]."""

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        params = self.params
        log_p = teacher.logprobs(params.temperature * params.teacher_temperature)
        log_q = student.logprobs(params.temperature)
        if params.top_k is not None:
            log_p, log_q = ops.top_k_and_rest(log_p, log_q, params.top_k, params.rest)
        value = self.divergence(log_p, log_q)
        # Below 0 is rounding: taken off the value, not off the gradient.
        value = value - value.detach().clamp_max(0)
        return Terms().add(self.name, value * params.temperature**2 if params.square_temperature else value)


class ForwardKL(Divergence):
    """KL(p || q): the student q is pulled to cover all that the teacher p finds likely."""

    name = "forward_kl"
    paper = "Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arxiv.org/abs/1503.02531"
    formula = "L = 1/N sum_i KL(p_i || q_i) = 1/N sum_i sum_v p_i(v) (log p_i(v) - log q_i(v)), p teacher, q student"
    deviations = (
        "A token that the student alone excludes, by a logit of -inf, counts as 100 nats: "
        "`compute_forward_kl_divergence` of DSKD and `forward_kl` of DistiLLM leave it out, which can make a "
        "divergence negative, and DSKD's is not a number where the teacher alone excludes one.",
        "`forward_kl` of DistiLLM and ABKD and `KLDLoss` of DistillKit divide by the tokens of each micro-batch; "
        "here the sum is divided by those of the whole step, so that no split changes it.",
        '`sparse_kl_div` of DistillKit with "symmetric_uniform" and a temperature other than 1 tempers the '
        "teacher's other tokens as if they were one and the student's each, so that two equal models differ; that "
        "reading is not offered.",
        "DistillKit's trainer takes the mask of labels for the logits of the same positions, one too late; here a "
        "position is the one that predicts a token of the response.",
    )

    class Params(ForwardParams):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "distillm@d47e77f": {"subtract_entropy": False},
            "distillkit@a61c2e7": {"square_temperature": True},
        }
        preset: Literal["distillm@d47e77f", "distillkit@a61c2e7"] | None = None
        """Whose code: what is not given beside it is as there."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        kl = ops.forward_kl(log_p, log_q)
        return kl if self.params.subtract_entropy else kl + entropy(log_p)


class ReverseKL(Divergence):
    """KL(q || p): the student q is pushed off what the teacher p finds unlikely."""

    name = "reverse_kl"
    paper = "Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024, arxiv.org/abs/2306.08543"
    formula = "L = 1/N sum_i KL(q_i || p_i) = 1/N sum_i sum_v q_i(v) (log q_i(v) - log p_i(v)), p teacher, q student"
    deviations = (
        "MiniLLM reaches this divergence by reinforcement on the student's own samples (`MiniLLMTrainer` of TRL); "
        "here it is computed token by token on the data.",
        "A token that the teacher alone excludes, by a logit of -inf, counts as 100 nats: `reverse_kl` of "
        "DistiLLM leaves it out, which can make a divergence negative.",
        "`reverse_kl` of DistiLLM and ABKD divides by the tokens of each micro-batch; here the sum is divided by "
        "those of the whole step.",
    )

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ops.reverse_kl(log_p, log_q)


class JS(Divergence):
    """The generalised Jensen-Shannon divergence: of both models to a mixture of both."""

    name = "js"
    paper = (
        "Agarwal et al., On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes, ICLR 2024, "
        "arxiv.org/abs/2306.13649"
    )
    formula = "L = 1/N sum_i [w KL(p_i || m_i) + (1 - w) KL(q_i || m_i)], m = w p + (1 - w) q, p teacher, q student"
    deviations = (
        "GKD trains on the student's own samples as well; here the answers are those of the data.",
        "`compute_js_divergence` of DSKD takes logarithms of probabilities plus 1e-9; here nothing is added, and "
        "nothing is infinite.",
        "`js_distance` of DistiLLM and ABKD and `JSDLoss` of DistillKit divide by the tokens of each micro-batch; "
        "here the sum is divided by those of the whole step.",
    )

    class Params(DivergenceParams):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "distillm@d47e77f": {"teacher_weight": 0.1},
            "abkd@df81318": {"teacher_weight": 0.9},
            "distillkit@a61c2e7": {"square_temperature": True},
        }
        preset: Literal["distillm@d47e77f", "abkd@df81318", "distillkit@a61c2e7"] | None = None
        """Whose code: what is not given beside it is as there."""
        teacher_weight: float = Field(0.5, ge=0, le=1)
        """w, of the teacher in the mixture and of its divergence in the sum. It is `beta` of TRL, 1 - `jsd_beta` of
        KDFlow, and 1 - `lam` of DistiLLM and of ABKD's copy; DSKD's is 0.5. At 0 and 1 the divergence would be 0
        whatever the student does: there it is its limit per w and per 1 - w, KL(p || q) at 0 and KL(q || p) at 1, as in
        TRL."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        ends = {0.0: ops.forward_kl, 1.0: ops.reverse_kl}
        w = self.params.teacher_weight
        return ends[w](log_p, log_q) if w in ends else ops.js(log_p, log_q, w)


class SkewForwardKL(Divergence):
    """The forward KL to a mixture with the teacher's own distribution, so that log q is never far off."""

    name = "skew_forward_kl"
    paper = (
        "Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models, ICML 2024, "
        "arxiv.org/abs/2402.03898"
    )
    formula = "L = 1/N sum_i KL(p_i || s p_i + (1 - s) q_i), p teacher, q student"
    deviations = (
        "DistiLLM trains on the student's own samples as well; here the answers are those of the data.",
        "`skewed_forward_kl` of DistiLLM and ABKD keeps the entropy of p in (`subtract_entropy` false); by "
        "default it is taken off, so that the least value is 0.",
        "It divides by the tokens of each micro-batch; here the sum is divided by those of the whole step.",
    )

    class Params(ForwardParams):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "distillm@d47e77f": {"subtract_entropy": False},
        }
        preset: Literal["distillm@d47e77f"] | None = None
        """Whose code: what is not given beside it is as there."""
        skew: float = Field(0.1, ge=0, lt=1)
        """s, the teacher's share of the mixture; 0 is the forward KL."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        kl = ops.skew_forward_kl(log_p, log_q, self.params.skew)
        return kl if self.params.subtract_entropy else kl + entropy(log_p)


class SkewReverseKL(Divergence):
    """The reverse KL to a mixture with the student's own distribution, so that log p is never far off."""

    name = "skew_reverse_kl"
    paper = SkewForwardKL.paper
    formula = "L = 1/N sum_i KL(q_i || (1 - s) p_i + s q_i), p teacher, q student"
    deviations = (
        "DistiLLM trains on the student's own samples as well; here the answers are those of the data.",
        "`skewed_reverse_kl` of DistiLLM and ABKD divides by the tokens of each micro-batch; here the sum is "
        "divided by those of the whole step.",
    )

    class Params(DivergenceParams):
        skew: float = Field(0.1, ge=0, lt=1)
        """s, the student's share of the mixture; 0 is the reverse KL."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ops.skew_reverse_kl(log_p, log_q, self.params.skew)


class AdaptiveKL(Divergence):
    """Both KLs, weighted by how far the student is off on the teacher's likely tokens and on the others."""

    name = "adaptive_kl"
    paper = (
        "Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models, "
        "COLING 2025, arxiv.org/abs/2404.02657"
    )
    formula = (
        "L = 1/N sum_i (g_head KL(p_i || q_i) + g_tail KL(q_i || p_i)) / (g_head + g_tail), g = sum |p_i(v) - q_i(v)| "
        "over the head (tail) of p_i, without gradient, p teacher, q student"
    )
    deviations = (
        "`compute_adaptive_kl_divergence` of DSKD is 0/0 where both models say the same; here the weights are "
        "then equal and the divergence is 0.",
        "`AKL` of ABKD leaves its weights a gradient where the student is passed as its teacher, as in the call "
        "that its trainer keeps as a comment; here weights never have one.",
        "`AKL` of ABKD divides by the tokens of each micro-batch; here the sum is divided by those of the whole step.",
    )

    class Params(DivergenceParams):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "abkd@df81318": {"crossing": "tail"},
        }
        preset: Literal["abkd@df81318"] | None = None
        """Whose code: what is not given beside it is as there."""
        head_mass: float = Field(0.5, gt=0, lt=1)
        """The cumulated probability that parts the teacher's likely tokens (head) from the others (tail)."""
        crossing: Literal["head", "tail"] = "head"
        """Where the token goes at which it is passed. "head": the tail is what is least likely and sums up to at most
        `head_mass` (DSKD; tokenkit says less than, which differs where a sum of probabilities is that very number).
        "tail": the head is what is likeliest and sums up to at most that, but for the first token, which always is in
        the head (ABKD's copy)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ops.adaptive_kl(log_p, log_q, self.params.head_mass, self.params.crossing)


class TotalVariation(Divergence):
    """Half the distance of p and q: bounded, with the same pull on every token that is too likely."""

    name = "total_variation"
    paper = (
        "Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, ACL 2023, "
        "arxiv.org/abs/2307.15190"
    )
    formula = "L = 1/N sum_i 1/2 sum_v |p_i(v) - q_i(v)|, p teacher, q student"
    deviations = (
        "`tv_distance` of DistiLLM and `TVDLoss` of DistillKit divide by the tokens of each micro-batch; here the "
        "sum is divided by those of the whole step.",
    )

    class Params(DivergenceParams):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "distillkit@a61c2e7": {"square_temperature": True},
        }
        preset: Literal["distillkit@a61c2e7"] | None = None
        """Whose code: what is not given beside it is as there."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ops.total_variation(log_p, log_q)


def entropy(log_p: Tensor) -> Tensor:
    """- sum_v p log p, per token [n]."""
    return torch.special.entr(log_p.exp()).sum(-1)


@hookimpl
def register_plugins(register: Register) -> None:
    for loss in (ForwardKL, ReverseKL, JS, SkewForwardKL, SkewReverseKL, AdaptiveKL, TotalVariation):
        register(loss)
