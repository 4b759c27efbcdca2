"""MultiLevelOT: the vocabularies of two models, ranked once for a whole sequence, are compared rank by rank.

The i-th token of the student's answer stands beside the i-th of the teacher's, whatever the tokenizers. Defaults are
the paper's objective, of one sequence at a time. The code of 2018cx/Multi-Level-OT differs; its releases are settings:

| commit | its settings |
| --- | --- |
| all | `normalise`, `swap`, `second_softmax`, not `skip_teacher_eos`, `iterations` 10, `gamma` 0.0001, weight 1.5 |
| 712cfb4 (2026) | `matching` "rank_batch", `reduction` "padded" |
| d8d298f (April 2025) | `matching` "sort", `reduction` "padded" |
| 77e32ae (January 2025) | `matching` "sort", `reduction` "padded_last" |

In all three, the second softmax flattens what it is given (probabilities, not logits): SL is log k whatever the student
says and SD next to nothing, so that neither moves a weight and HAD alone is what was trained with.

A ranking needs the whole sequence before its first row, and SD all rows at once: both models' heads are applied twice,
the student's once more on the way back.

Shapes: B sequences, n tokens of the longest answer, K ranks, C of the student's tokens that may be given one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdzoo import Batch, Chunk, Loss, Needs, Params, Side, Terms, View, Visit, hookimpl, ops


class MultiLevelOT(Loss):
    """Optimal transport between tokens of the vocabularies (HAD, SL) and between tokens of the answers (SD)."""

    name = "multilevel_ot"
    paper = (
        "Cui et al., Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge Distillation on Language "
        "Models, AAAI 2025, arxiv.org/abs/2412.14528"
    )
    formula = "L = 1/N [sum_t sum_k |p_tk - q_tk| - beta p_tk log q_tk + gamma sum_b <P_b, W_b>], q matched to p"
    deviations = (
        "`DistillationLoss` ranks both vocabularies over the whole batch (f=1); by default rankings are of one "
        "sequence, and the student's tokens are matched to the teacher's as in the paper (`matching`).",
        'Its greedy search (f=2) takes tokens for ranks and fails on answers of more than 50; `matching` "greedy" '
        "is what the paper describes, among `candidates` tokens. Other values of f name no matching and are not "
        "offered.",
        "It takes SL and SD of a second softmax over probabilities, which makes both inert; by default they are "
        "of the models' own distributions (`second_softmax`).",
        "It calls `KL_wo` with student and teacher exchanged; by default the teacher's probabilities are the "
        "weights, as in the paper (`swap`).",
        "It divides logits by their standard deviation over the vocabulary, stops Sinkhorn after 10 iterations "
        "and multiplies SD by 0.001, none of which is in the paper (`normalise`, `iterations`, `gamma`).",
        "It averages HAD over tokens, then over sequences, and counts padding in SL and SD; by default sums over "
        "tokens are divided by the step's rows (`reduction`).",
        "It skips no end of the teacher's, whose answers have none there; here they have one, and it is skipped "
        "(`skip_teacher_eos`).",
    )

    class Params(Params):
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
        """Divide every row of logits by its standard deviation over the vocabulary first: not in the paper."""
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
        """"tokens": the paper's sums over tokens, divided like a cross-entropy by the student's rows. "padded": as the
        authors' code, HAD is a mean over tokens, then over sequences; SL the mean over a batch padded to its longest
        answer, padding included; SD a sum over the batch, with rows of padding. "padded_last": likewise, SD of the
        batch's last sequence alone."""

    @classmethod
    def needs(cls, params: MultiLevelOT.Params, same_tokens: bool) -> Needs:
        rows = (Visit("student", ("student",), kind="rows"), Visit("teacher", ("teacher",), kind="rows"))
        mass = (Visit("student_mass", ("student",), kind="scan"), Visit("teacher_mass", ("teacher",), kind="scan"))
        return Needs(
            visits=rows if params.matching == "sort" else mass + rows,
            batch_coupled=params.matching == "rank_batch" or params.reduction != "tokens",
        )

    def temperatures(self, model: str) -> list[float]:
        """The one of HAD and of rankings, then others that are needed."""
        params = self.params
        first = params.student_temperature if model == "student" else params.teacher_temperature
        more = set() if params.second_softmax else {params.sl_temperature, params.sd_temperature}
        return [first, *sorted(more - {first})]

    def skips(self, model: str) -> bool:
        return self.params.skip_student_eos if model == "student" else self.params.skip_teacher_eos

    def over_vocab(self, visit: str, chunk: Chunk) -> dict[str, Tensor]:
        model, _, mass = visit.partition("_")
        side, rows = chunk.side(model), chunk.rows(model)
        if mass:
            p = self.logprobs(chunk, model, self.temperatures(model)[0]).exp()
            return {"mass": p * ops.is_followed(side)[rows, None] if self.skips(model) else p}
        found = {}
        for tau in self.temperatures(model):
            log_p = self.logprobs(chunk, model, tau)
            if self.params.matching == "sort":
                found[f"{tau}"] = log_p.topk(min(self.params.k, log_p.shape[-1])).values
            else:
                found[f"{tau}"] = log_p.gather(-1, chunk.scanned[model][side.sample[rows]])
        return found

    def logprobs(self, chunk: Chunk, model: str, tau: float) -> Tensor:
        """[n, vocabulary]"""
        if not self.params.normalise:
            return chunk.logprobs(model, tau)
        logits = chunk.logits(model)
        excluded = logits == -math.inf
        logits = logits.masked_fill(excluded, 0)
        scaled = logits / (tau * (row_std(logits, ~excluded) + 1e-4))
        return scaled.masked_fill(excluded, -math.inf).log_softmax(-1)

    def scan(self, batch: Batch, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each sequence's likely tokens, likeliest first: the teacher's [B, K], and the student's candidates [B, C]."""
        params = self.params
        found = {}
        for model in ("student", "teacher"):
            mass = sums[f"{model}_mass.mass"]  # [B, vocabulary]
            if params.matching == "rank_batch":
                mass = mass.sum(0, keepdim=True).expand_as(mass)
            more = params.matching == "greedy" and model == "student"
            wanted = max(params.k, params.candidates) if more else params.k
            found[model] = mass.topk(min(wanted, mass.shape[-1])).indices
        return found

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        params = self.params
        log_q, in_student = self.answers("student", student.side, rows)
        log_p, in_teacher = self.answers("teacher", teacher.side, rows)
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
        sl = cross_entropy(sl_q, sl_p) if params.swap else cross_entropy(sl_p, sl_q)

        if params.reduction == "tokens":
            sd = self.sinkhorn(sd_p, sd_q, in_teacher, in_student)
            terms = Terms().add("had", had.sum()).add("sl", params.beta * (sl * paired).sum())
            return terms.add("sd", params.gamma * sd.sum())
        everywhere = torch.ones_like(paired)
        sd = self.sinkhorn(sd_p, sd_q, everywhere, everywhere)[-1 if params.reduction == "padded_last" else 0 :]
        had = had.sum(1) / paired.sum(1).clamp_min(1)
        terms = Terms().add("had", had.sum(), per="sequences")
        terms.add("sl", params.beta * sl.sum() / max(n, 1), per="sequences")
        return terms.add("sd", params.gamma * sd.sum() * len(paired), per="sequences")

    def answers(self, model: str, side: Side, rows: Mapping[str, Tensor]) -> tuple[dict[float, Tensor], Tensor]:
        """Temperature -> log-probabilities [B, n, columns], -inf where no token is, and where one is [B, n]."""
        found = {}
        for tau in self.temperatures(model):
            values, mask = ops.pad_rows(rows[f"{model}.{tau}"], side)
            if self.skips(model):
                values, mask = values[:, :-1], mask[:, 1:]
            values = values.masked_fill(~mask[:, :, None], -math.inf)
            found[tau] = values if model == "student" else values.detach()
        return found, mask

    def ranked(
        self, log_p: dict[float, Tensor], log_q: dict[float, Tensor], paired: Tensor
    ) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
        """Both [B, n, K] with the same tokens n and ranks K; what one side lacks has no probability."""
        tau_p, tau_q = self.params.teacher_temperature, self.params.student_temperature
        greedy = self.params.matching == "greedy"
        ranks, columns, n = log_p[tau_p].shape[2], log_q[tau_q].shape[2], paired.shape[1]
        width = max(ranks, columns)
        log_p = {tau: extend(x, n, ranks if greedy else width) for tau, x in log_p.items()}
        log_q = {tau: extend(x, n, width) for tau, x in log_q.items()}
        if greedy:
            chosen = match(log_p[tau_p].exp(), log_q[tau_q].exp(), paired, columns)
            log_q = {tau: x.gather(-1, chosen[:, None].expand(-1, n, -1)) for tau, x in log_q.items()}
        return log_p, log_q

    def sinkhorn(self, p: Tensor, q: Tensor, in_p: Tensor, in_q: Tensor) -> Tensor:
        """<P, W> per sequence [B]: W the L1 distances between tokens of p and of q, P their kernel, scaled.

        Rows, then columns, are scaled to sums of 1, again and again. Only their factors change, so that the way back
        keeps vectors of every iteration and no matrix.
        """
        cost = torch.cdist(p, q, p=1.0)  # [B, n, n]
        kernel = torch.exp(-cost / self.params.regularisation) * (in_p[:, :, None] & in_q[:, None, :])
        tiny = torch.finfo(kernel.dtype).tiny
        rows = of_rows = in_p[:, :, None].to(kernel.dtype)
        columns = of_columns = in_q[:, :, None].to(kernel.dtype)
        for _ in range(self.params.iterations):
            rows = of_rows / (kernel @ columns).clamp_min(tiny)
            columns = of_columns / (kernel.transpose(1, 2) @ rows).clamp_min(tiny)
        return (rows * kernel * columns.transpose(1, 2) * cost).sum((1, 2))


def row_std(logits: Tensor, kept: Tensor) -> Tensor:
    """The unbiased standard deviation of each row [n, 1], over the tokens that are `kept`; others are 0."""
    count = kept.sum(-1, keepdim=True)
    mean = logits.sum(-1, keepdim=True) / count.clamp_min(1)
    square = ((logits - mean) * kept).square().sum(-1, keepdim=True)
    return (square / (count - 1).clamp_min(1)).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()


def extend(logprobs: Tensor, n: int, columns: int) -> Tensor:
    """With tokens and columns of no probability up to [B, n, columns]."""
    return F.pad(logprobs, (0, columns - logprobs.shape[2], 0, n - logprobs.shape[1]), value=-math.inf)


@torch.no_grad()
def match(p: Tensor, q: Tensor, paired: Tensor, columns: int) -> Tensor:
    """For each column of p [B, n, K], the nearest of q [B, n, C] that no column before it has taken [B, K].

    Those of q from `columns` on are no tokens, and taken last.
    """
    p, q = (x.masked_fill(~paired[:, :, None], 0).transpose(1, 2) for x in (p, q))
    cost = torch.cdist(p, q, p=1.0)  # [B, K, C]
    cost[:, :, columns:] = torch.finfo(cost.dtype).max
    chosen = []
    for column in cost.unbind(1):
        chosen.append(column.argmin(-1, keepdim=True))
        cost.scatter_(2, chosen[-1][:, None].expand(-1, cost.shape[1], -1), math.inf)  # of the columns to come
    return torch.cat(chosen, -1)


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """- sum_k p log q [B, n]; a token that q excludes says nothing."""
    return -(log_p.exp() * log_q.masked_fill(log_q == -math.inf, 0)).sum(-1)


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(MultiLevelOT)
