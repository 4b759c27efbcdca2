"""MultiLevelOT: the vocabularies of two models, ranked once for a whole sequence, are compared rank by rank.

The i-th token of the student's answer stands beside the i-th of the teacher's, whatever the tokenizers. Defaults are
the paper's objective, of one sequence at a time. The code of 2018cx/Multi-Level-OT differs (`preset`): its second
softmax flattens what it is given (probabilities, not logits), so that SL is log k whatever the student says and SD next
to nothing; neither moves a weight, and HAD alone is what was trained with.

A ranking needs the whole sequence before its first token, and SD all tokens at once: both models' heads are applied
twice, the student's once more on the way back.

Shapes: B sequences, n tokens of the longest answer, K ranks, C of the student's tokens that may be given one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdzoo import Logits, Loss, Needs, Params, Register, Side, Step, Terms, hookimpl, ops, visit

ByTemperature = dict[float, Tensor]
"""Temperature -> log-probabilities [B, n, columns], -inf where no token is."""


class MultiLevelOT(Loss):
    """Optimal transport between tokens of the vocabularies (HAD, SL) and between tokens of the answers (SD)."""

    name = "multilevel_ot"
    paper = (
        "Cui et al., Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge Distillation on Language "
        "Models, AAAI 2025, arxiv.org/abs/2412.14528"
    )
    formula = "L = 1/N [sum_t sum_k |p_tk - q_tk| - beta p_tk log q_tk + gamma sum_b <P_b, W_b>], q matched to p"
    deviations = (
        "`DistillationLoss` ranks both vocabularies over the whole batch (f=1); by default rankings are of a sequence, "
        "and the student's tokens are matched to the teacher's as in the paper (`matching`).",
        'Its greedy search (f=2) takes tokens for ranks and fails on answers of over 50; `matching` "greedy" is the '
        "paper's, among `candidates` tokens. Other values of f name no matching and are not offered.",
        "It takes SL and SD of a second softmax, over probabilities, which makes both inert; by default they are of "
        "the models' own distributions (`second_softmax`).",
        "It calls `KL_wo` with student and teacher exchanged; by default the teacher weighs, as in the paper (`swap`).",
        "It divides logits by their standard deviation over the vocabulary, stops Sinkhorn after 10 iterations and "
        "multiplies SD by 0.001, none of which is in the paper (`normalise`, `iterations`, `gamma`).",
        "It averages HAD over tokens, then sequences, and counts padding in SL and SD; by default sums over tokens are "
        "divided by the step's tokens (`reduction`).",
        "It skips no end of the teacher's, whose answers have none there; ours have one, skipped (`skip_teacher_eos`).",
    )

    class Params(Params):
        every_release: ClassVar[dict[str, Any]] = {
            "normalise": True,
            "swap": True,
            "second_softmax": True,
            "skip_teacher_eos": False,
            "iterations": 10,
            "gamma": 0.0001,
        }
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "2018cx@712cfb4": every_release | {"matching": "rank_batch", "reduction": "padded"},
            "2018cx@d8d298f": every_release | {"matching": "sort", "reduction": "padded"},
            "2018cx@77e32ae": every_release | {"matching": "sort", "reduction": "padded_last"},
        }
        preset: Literal["2018cx@712cfb4", "2018cx@d8d298f", "2018cx@77e32ae"] | None = None
        """A release of the authors' code (of 2026, of April and of January 2025): what is not given beside it is as
        there. (The slot's weight was 1.5.)"""
        beta: float = Field(0.1, ge=0)
        """Weight of SL, the cross-entropy between ranks. (The paper's alpha is the slot's weight: 0.15.)"""
        gamma: float = Field(0.1, ge=0)
        """Weight of SD, the Sinkhorn distance between answers. The authors' code multiplies by another 0.001."""
        k: int = Field(50, ge=1)
        """How many tokens of the teacher's vocabulary are compared: those with most probability over the sequence."""
        matching: Literal["greedy", "rank", "rank_batch", "sort"] = "greedy"
        """Which tokens of the student's vocabulary stand beside them. "greedy": from the first rank to the last, the
        token whose probabilities over the sequence are nearest (the paper's permutation Q*, in the search that the
        authors' code attempts as f=2). "rank": the student's own ranking over the sequence. "rank_batch": both
        rankings over the whole batch, as the authors' f=1 does, so that a sequence depends on its neighbours. "sort":
        no ranking; every token's distribution is sorted by itself, as the authors' code did until 2026."""
        candidates: int = Field(512, ge=1)
        """Which tokens the greedy matching tries: so many with most probability over the sequence, and `k` at least.
        The whole vocabulary would have to be kept for every token."""
        student_temperature: float = Field(1.0, gt=0)
        """Divides the student's logits, for HAD and for every ranking."""
        teacher_temperature: float = Field(1.0, gt=0)
        """Divides the teacher's logits, for HAD and for every ranking."""
        sl_temperature: float = Field(1.0, gt=0)
        """The paper's tau_SL. Divides both models' logits for SL (with `second_softmax`, their probabilities)."""
        sd_temperature: float = Field(2.0, gt=0)
        """The paper's tau_SD. Divides both models' logits for SD (with `second_softmax`, their probabilities)."""
        regularisation: float = Field(0.1, ge=0.05)
        """The Sinkhorn distance's lambda, by which costs (2 at most) are divided. Less would underflow."""
        iterations: int = Field(20, ge=1)
        """Of Sinkhorn's scaling of rows, then columns. The authors' code stops after 10."""
        normalise: bool = False
        """Divide the logits of every token by their standard deviation over the vocabulary first: not in the paper."""
        swap: bool = False
        """SL with the student's probabilities as weights and the teacher's inside the logarithm: the authors' code."""
        second_softmax: bool = False
        """SL and SD of a second softmax, over the K probabilities: the authors' code. Both terms are then inert: their
        gradients are a thousandth of HAD's and less."""
        skip_student_eos: bool = True
        """Leave out the last token of the student's answer: its end, which stands beside the middle of a longer one."""
        skip_teacher_eos: bool = True
        """Leave out the last token of the teacher's answer. The authors' code does not, but its teachers' answers have
        no end; here both have one."""
        reduction: Literal["tokens", "padded", "padded_last"] = "tokens"
        """"tokens": the paper's sums over tokens, divided like a cross-entropy by the student's tokens. "padded": as
        the authors' code, HAD is a mean over tokens, then over sequences; SL the mean over a batch padded to its
        longest answer, padding included; SD a sum over the batch, padding included. "padded_last": likewise, SD of the
        batch's last sequence alone."""

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(batch_coupled=params.matching == "rank_batch" or params.reduction != "tokens")

    def temperatures(self, model: str) -> list[float]:
        """The one of HAD and of rankings, then others that are needed."""
        params = self.params
        first = params.student_temperature if model == "student" else params.teacher_temperature
        more = set() if params.second_softmax else {params.sl_temperature, params.sd_temperature}
        return [first, *sorted(more - {first})]

    def skips(self, model: str) -> bool:
        return self.params.skip_student_eos if model == "student" else self.params.skip_teacher_eos

    @visit(kind="scan", each=("student", "teacher"), when=lambda params: params.matching != "sort")
    def ranking(self, seen: Logits) -> dict[str, Tensor]:
        p = self.logprobs(seen, self.temperatures(seen.stream)[0]).exp()
        return {"mass": p * ops.is_followed(seen.side)[seen.at, None] if self.skips(seen.stream) else p}

    @visit(kind="tokens", each=("student", "teacher"))
    def ranks(self, seen: Logits) -> dict[str, Tensor]:
        found = {}
        for tau in self.temperatures(seen.stream):
            log_p = self.logprobs(seen, tau)
            if self.params.matching == "sort":
                found[f"{tau}"] = log_p.topk(min(self.params.k, log_p.shape[-1])).values
            else:
                found[f"{tau}"] = log_p.gather(-1, seen.scanned[seen.stream][seen.sequence])
        return found

    def logprobs(self, seen: Logits, tau: float) -> Tensor:
        """[n, vocabulary]"""
        return ops.standardised(seen.logits, tau).log_softmax(-1) if self.params.normalise else seen.logprobs(tau)

    def scan(self, step: Step) -> dict[str, Tensor]:
        """Each sequence's likely tokens, likeliest first: the teacher's [B, K], and the student's candidates [B, C]."""
        k, matching, found = self.params.k, self.params.matching, {}
        candidates = max(k, self.params.candidates) if matching == "greedy" else k
        for model, wanted in (("student", candidates), ("teacher", k)):
            mass = step.sums[f"ranking.{model}.mass"]  # [B, vocabulary]
            if matching == "rank_batch":
                mass = mass.sum(0, keepdim=True).expand_as(mass)
            found[model] = mass.topk(min(wanted, mass.shape[-1])).indices
        return found

    def finish(self, step: Step) -> Terms:
        params = self.params
        log_q, in_student = self.answers("student", step.student.side, step.values)
        log_p, in_teacher = self.answers("teacher", step.teacher.side, step.values)
        n = max(in_student.shape[1], in_teacher.shape[1])
        in_student, in_teacher = (F.pad(mask, (0, n - mask.shape[1])) for mask in (in_student, in_teacher))
        paired = in_student & in_teacher  # [B, n]
        log_p, log_q = self.ranked(log_p, log_q, paired)

        p, q = log_p[params.teacher_temperature].exp(), log_q[params.student_temperature].exp()  # [B, n, K]
        had = (p - q).abs().sum(-1) * paired
        if params.second_softmax:
            sl_p, sl_q = ((x / params.sl_temperature).log_softmax(-1) for x in (p, q))
            sd_p, sd_q = ((x / params.sd_temperature).softmax(-1) for x in (p, q))
        else:
            sl_p, sl_q = (x[params.sl_temperature] for x in (log_p, log_q))
            sd_p, sd_q = (x[params.sd_temperature].exp() for x in (log_p, log_q))
        weights, inside = (sl_q, sl_p) if params.swap else (sl_p, sl_q)
        # A token that is excluded inside the logarithm says nothing.
        sl = -(weights.exp() * inside.masked_fill(inside == -math.inf, 0)).sum(-1)  # [B, n]

        sides = (in_teacher, in_student) if params.reduction == "tokens" else (torch.ones_like(paired),) * 2
        sd = ops.sinkhorn(sd_p, sd_q, *sides, params.regularisation, params.iterations)  # [B]
        if params.reduction == "tokens":
            within = ops.places_within(step.student.side)  # a token that is skipped may have no place
            places = torch.where(within < n, step.student.sample * n + within, -1)  # in the grid [B, n]
            terms = Terms().add("had", had, of=places).add("sl", params.beta * (sl * paired), of=places)
            return terms.add("sd", params.gamma * sd, of="sequences")
        if params.reduction == "padded_last":
            sd = torch.where(torch.arange(len(sd), device=sd.device) == len(sd) - 1, sd, 0)
        terms = Terms().add("had", had.sum(1) / paired.sum(1).clamp_min(1), per="sequences")
        terms.add("sl", params.beta * sl.sum(1) / max(n, 1), per="sequences")
        return terms.add("sd", params.gamma * sd * len(paired), per="sequences")

    def answers(self, model: str, side: Side, values: Mapping[str, Tensor]) -> tuple[ByTemperature, Tensor]:
        """The log-probabilities, and where a token is [B, n]."""
        found = {}
        for tau in self.temperatures(model):
            logprobs, mask = ops.pad_tokens(values[f"ranks.{model}.{tau}"], side)
            if self.skips(model):
                logprobs, mask = logprobs[:, :-1], mask[:, 1:]
            logprobs = logprobs.masked_fill(~mask[:, :, None], -math.inf)
            found[tau] = logprobs if model == "student" else logprobs.detach()
        return found, mask

    def ranked(self, log_p: ByTemperature, log_q: ByTemperature, paired: Tensor) -> list[ByTemperature]:
        """Both [B, n, K] with the same tokens n and ranks K; what one side lacks has no probability."""
        tau_p, tau_q, n = self.params.teacher_temperature, self.params.student_temperature, paired.shape[1]
        ranks, columns = log_p[tau_p].shape[2], log_q[tau_q].shape[2]
        greedy, width = self.params.matching == "greedy", max(ranks, columns)
        log_p = {tau: extend(x, n, ranks if greedy else width) for tau, x in log_p.items()}
        log_q = {tau: extend(x, n, width) for tau, x in log_q.items()}
        if greedy:
            chosen = ops.greedy_match(log_p[tau_p].exp(), log_q[tau_q].exp(), paired, columns)
            log_q = {tau: x.gather(-1, chosen[:, None].expand(-1, n, -1)) for tau, x in log_q.items()}
        return [log_p, log_q]


def extend(logprobs: Tensor, n: int, columns: int) -> Tensor:
    """With tokens and columns of no probability up to [B, n, columns]."""
    return F.pad(logprobs, (0, columns - logprobs.shape[2], 0, n - logprobs.shape[1]), value=-math.inf)


@hookimpl
def register_plugins(register: Register) -> None:
    register(MultiLevelOT)
