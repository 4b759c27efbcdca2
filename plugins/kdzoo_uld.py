"""Universal logit distillation: sorted probabilities side by side, for any two tokenizers.

The k-th token of the student's answer stands beside the k-th of the teacher's; or tokens that cover the same text stand
beside each other, merged into one distribution. Published code reads it in three ways, and each is a setting:

| code | its settings |
| --- | --- |
| Nicolas-BZRD/llm-recipes @ ab6e798 | `skip_teacher_eos` false; slot weight 1.5 beside a cross-entropy of 1 |
| songmzhang/DSKD @ 077337a | `mean` "rows", no end skipped (it has no temperature); 0.5 beside 0.5 |
| huggingface/trl @ f2cd577, GOLD "bayesian" | `align` "text"; 1 and no cross-entropy |
| the same, "observed" (its default) | `align` "text", `window` "late", `base` "first" |

Shapes: N student rows, M teacher rows, G groups of rows, V / W student / teacher vocabulary, K entries of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kdzoo import (
    Batch,
    Chunk,
    KdzooError,
    Loss,
    Models,
    Needs,
    Own,
    OwnStream,
    Params,
    Side,
    Terms,
    View,
    Visit,
    hookimpl,
    ops,
)

FLOOR = math.log(1e-8)
"""What TRL takes less for: of a token that a merged group goes through, and of an entry that is compared directly."""


class ULD(Loss):
    """The distance between two distributions whose entries are matched by rank: optimal transport at equal costs."""

    name = "uld"
    paper = (
        "Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs, "
        "TMLR 2025, arxiv.org/abs/2402.12030; groups and hybrid: Patino et al., Unlocking On-Policy Distillation for "
        "Any Model Family, 2025, huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation"
    )
    formula = "L = 1/B sum_b 1/n_b sum_k sum_r |p_k(r) - q_k(r)|, p_k(r) of rank r; 0 beyond the smaller vocabulary"
    deviations = (
        "`DistillationLoss` of the paper's code skips no end of the teacher's, whose answers have none there; "
        "here they have one, and by default it is skipped (`skip_teacher_eos`).",
        "It averages over the sequences of each micro-batch, and a sequence without an answer makes that not a "
        "number; here the mean is over the sequences of the whole step, and such a sequence adds 0.",
        "`UniversalLogitDistillation` of DSKD ignores the temperature that its scripts pass; here both "
        "temperatures count.",
        '`ULDLoss` of TRL reads every distribution one position late by default; here that is `window` "late".',
        "`ULDLoss` also merges what is left behind the last common end of both answers; here those tokens are in "
        "no group.",
        "`ULDLoss` takes entries of vocabularies for the same by their spelling in `hybrid`; here they are by "
        "their text, which finds more.",
        "`compute_baseline_uld_loss` of tokenkit, which compares padded sequences position by position with their "
        "prompts, is not offered.",
    )

    class Params(Params):
        student_temperature: float = Field(1.0, gt=0)
        """Divides the student's logits."""
        teacher_temperature: float = Field(1.0, gt=0)
        """Divides the teacher's logits."""
        skip_student_eos: bool = True
        """Leave out the last token of the student's answer: its end, or where it was cut."""
        skip_teacher_eos: bool = True
        """Leave out the last token of the teacher's answer. The paper's code does not, since its teachers' answers have
        no end-of-sequence token; here both have one."""
        mean: Literal["sequences", "rows"] = "sequences"
        """"sequences": of each the mean over its tokens (or groups), then over sequences, as in the paper's code.
        "rows": the sum over all tokens, divided by the student's rows like a cross-entropy, as in DSKD's."""
        align: Literal["position", "text"] = "position"
        """"position": the k-th tokens of both answers, as far as both go. "text": the aligner's groups of tokens that
        cover the same text, each merged into one distribution. (TRL merges what is left behind the last common end,
        too: here it is in no group. With one tokenizer, every token is its own group.)"""
        base: Literal["last", "first"] = "last"
        """Which token's distribution stands for a group, times the probabilities of the group's other tokens: the
        last's, by the chain rule, or the first's, as TRL's "observed"."""
        window: Literal["answer", "late"] = "answer"
        """"answer": a token's distribution is the one that predicts it. "late": the one at its own position, which
        predicts the next token, as TRL's "observed"; it reads beyond the rows where an end is not skipped."""
        hybrid: bool = False
        """Compare entries that both vocabularies have directly, by a Jensen-Shannon divergence, and only the others by
        rank. Entries are the same by their text. (TRL goes by their spelling, and so finds fewer.)"""
        beta: float = Field(0.5, ge=0, le=1)
        """The teacher's weight in that divergence. 0 is the forward KL, 1 the reverse KL; neither has to be positive
        here, since parts of distributions do not sum to 1."""
        matched_weight: float | None = Field(None, ge=0)
        """Weight of the entries that both have; by default their share of the teacher's vocabulary."""
        unmatched_weight: float | None = Field(None, ge=0)
        """Weight of the others; by default what the weight above leaves of 1."""

    @classmethod
    def needs(cls, params: ULD.Params, same_tokens: bool) -> Needs:
        states = frozenset({"hidden.last" if params.window == "answer" else "hidden.last@all"})
        return Needs(
            student=states,
            teacher=states,
            streams=(
                OwnStream("student_answer", "own", head="student", learns_head=True),
                OwnStream("teacher_answer", "own", head="teacher"),
            ),
            visits=(Visit("answers", ("student_answer", "teacher_answer")),),
            aligned=params.align == "text" and not same_tokens,
        )

    def __init__(self, params: ULD.Params, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(params, models, artefacts)
        self.merges = params.align == "text" and not models.same_tokens
        if params.hybrid:
            assert models.student is not None and models.teacher is not None and models.student_ids is not None
            v, w = models.student.vocabulary, models.teacher.vocabulary
            for name, entries in shared_entries(models.student_ids, v, w).items():
                self.register_buffer(name, entries, persistent=False)
            share = len(self.teacher_shared) / w if params.matched_weight is None else params.matched_weight
            rest = max(0.0, 1 - share) if params.unmatched_weight is None else params.unmatched_weight
            self.weights = share, rest

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> dict[str, Own]:
        skips = self.params.skip_student_eos, self.params.skip_teacher_eos
        groups = (by_text if self.merges else by_position)(student.side, teacher.side, skips)
        (mine, in_mine), (theirs, in_theirs) = ((group[group >= 0], group >= 0) for group in groups)
        h, sample = self.states(student)[in_mine], student.sample[in_mine]
        weight = torch.ones_like(mine, dtype=torch.promote_types(h.dtype, torch.float32))
        if self.params.mean == "sequences":
            begins = torch.ones_like(weight)
            begins[1:] = (mine[1:] != mine[:-1]).to(weight.dtype)
            weight = 1 / weight.new_zeros(student.side.sequences).index_add(0, sample, begins)[sample]
        return {
            "student_answer": Own(h, student.labels[in_mine], mine, {"weight": weight}),
            "teacher_answer": Own(self.states(teacher)[in_theirs], teacher.labels[in_theirs], theirs),
        }

    def states(self, view: View) -> Tensor:
        """The state whose prediction stands for each row's token [rows, width]."""
        return view["hidden.last"] if self.params.window == "answer" else view["hidden.last@all"][view.side.rows + 1]

    def base(self, chunk: Chunk, stream: str) -> Tensor | slice:
        """The row of each group whose distribution stands for it [G]."""
        if not self.merges:
            return slice(None)
        group = chunk.group(stream)
        number = torch.arange(chunk.groups, device=group.device)
        last = self.params.base == "last"
        return torch.searchsorted(group, number, right=last) - int(last)

    def logprobs(self, chunk: Chunk, stream: str, temperature: float) -> Tensor:
        """[G, vocabulary]; those of several tokens are not normalised."""
        logprobs = chunk.logprobs(stream, temperature)
        if not self.merges:
            return logprobs
        base = self.base(chunk, stream)
        gold = -ops.cross_entropy(logprobs, chunk.labels(stream))
        others = gold.clamp_min(FLOOR).index_fill(0, base, 0.0)
        return logprobs[base] + others.new_zeros(chunk.groups).index_add(0, chunk.group(stream), others)[:, None]

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        log_p = self.logprobs(chunk, "teacher_answer", self.params.teacher_temperature)
        log_q = self.logprobs(chunk, "student_answer", self.params.student_temperature)
        weight = chunk.values("student_answer")["weight"][self.base(chunk, "student_answer")]
        if not self.params.hybrid:
            distance = by_rank(log_p.exp(), log_q.exp())
            return Terms().add("uld", (weight * distance).sum(), self.params.mean)
        matched = jensen_shannon(log_p[:, self.teacher_shared], log_q[:, self.student_shared], self.params.beta)
        unmatched = by_rank(log_p[:, self.teacher_rest].exp(), log_q[:, self.student_rest].exp())
        if not (len(self.teacher_rest) and len(self.student_rest)):
            unmatched = torch.zeros_like(unmatched)  # nothing that it could be moved to, and TRL counts none
        terms = Terms().add("matched", self.weights[0] * (weight * matched).sum(), self.params.mean)
        return terms.add("unmatched", self.weights[1] * (weight * unmatched).sum(), self.params.mean)


Skips = tuple[bool, bool]
"""Whether the last row of every sequence is left out, of the student's and of the teacher's."""


def by_position(student: Side, teacher: Side, skips: Skips) -> tuple[Tensor, Tensor]:
    """The group of each row [N] and [M], -1 for none: place k of a sequence, as far as both sides go."""
    sides = (student, teacher)
    lengths = [s.sample.bincount(minlength=s.sequences) - int(skip) for s, skip in zip(sides, skips, strict=True)]
    n = torch.minimum(*lengths).clamp_min(0)  # [B]
    before = n.cumsum(0) - n
    places = [ops.places_within(side) for side in sides]
    mine, theirs = (
        torch.where(place < n[side.sample], before[side.sample] + place, -1)
        for side, place in zip(sides, places, strict=True)
    )
    return mine, theirs


def by_text(student: Side, teacher: Side, skips: Skips) -> tuple[Tensor, Tensor]:
    """The group of each row [N] and [M], -1 for none: aligned spans with rows on both sides, none of them left out."""
    none = student.span.new_full((1,), -1)
    spans = 1 + int(torch.cat([student.span, teacher.span, none]).max())
    whole = torch.ones(spans + 1, dtype=torch.bool, device=none.device)
    for side, skip in zip((student, teacher), skips, strict=True):
        whole &= torch.zeros_like(whole).index_fill(0, side.span, True)
        if skip:
            whole[side.span[~ops.is_followed(side)]] = False
    whole[-1] = False  # the place of rows without a span
    group = torch.where(whole, whole.cumsum(0) - 1, -1)
    return group[student.span], group[teacher.span]


def by_rank(p: Tensor, q: Tensor) -> Tensor:
    """sum_r |p(r) - q(r)| per row [n], of [n, W] and [n, V] from the likeliest on, 0 behind the end of either."""
    p, q = (x.sort(-1, descending=True).values for x in (p, q))
    both = min(p.shape[-1], q.shape[-1])
    return (p[:, :both] - q[:, :both]).abs().sum(-1) + p[:, both:].sum(-1) + q[:, both:].sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalised, per row [n]; of beta 0 and 1 not the limits, which are 0, but the two KL."""
    log_p, log_q = log_p.clamp_min(FLOOR), log_q.clamp_min(FLOOR)
    if beta in (0, 1):
        return ops.reverse_kl(log_p, log_q) if beta else ops.forward_kl(log_p, log_q)
    return ops.js(log_p, log_q, beta)


def shared_entries(student_ids: Tensor, v: int, w: int) -> dict[str, Tensor]:
    """The entries of both vocabularies, in the order of the teacher's [K], and what either has beside them."""
    theirs = (student_ids >= 0).nonzero().squeeze(-1)
    mine = student_ids[theirs]
    if not len(mine):
        raise KdzooError("uld: 'hybrid' compares entries of both vocabularies, and these have none; leave it out")
    rest = {
        f"{model}_rest": torch.ones(size, dtype=torch.bool).index_fill(0, entries, False).nonzero().squeeze(-1)
        for model, size, entries in (("student", v, mine), ("teacher", w, theirs))
    }
    return {"student_shared": mine, "teacher_shared": theirs, **rest}


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(ULD)
