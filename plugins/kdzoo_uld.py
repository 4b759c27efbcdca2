"""Universal logit distillation: sorted probabilities side by side, for any two tokenizers.

The k-th token of the student's answer stands beside the k-th of the teacher's; or tokens that cover the same text stand
beside each other, merged into one distribution. Published code reads it in several ways (`preset`).

Shapes: N student tokens, M teacher tokens, G groups of tokens, V / W student / teacher vocabulary, K entries of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdzoo import (
    Logits,
    Loss,
    Needs,
    Params,
    Reduction,
    Register,
    Step,
    Stream,
    Terms,
    View,
    hookimpl,
    ops,
    visit,
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
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "llm-recipes@ab6e798": {"skip_teacher_eos": False},
            "dskd@077337a": {"mean": "rows", "skip_student_eos": False, "skip_teacher_eos": False},
            "trl@f2cd577": {"align": "text", "window": "late", "base": "first"},
            "trl@f2cd577, bayesian": {"align": "text"},
        }
        preset: Literal["llm-recipes@ab6e798", "dskd@077337a", "trl@f2cd577", "trl@f2cd577, bayesian"] | None = None
        """Whose code: what is not given beside it is as there. Nicolas-BZRD/llm-recipes is the paper's (weights: 1.5,
        and 1 for the cross-entropy); of songmzhang/DSKD 0.5 beside 0.5, and it has no temperature; of GOLD in
        huggingface/trl 1 and no cross-entropy, merged as "observed" by default or as "bayesian"."""
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
        "rows": the sum over all tokens, divided by the student's tokens like a cross-entropy, as in DSKD's."""
        align: Literal["position", "text"] = "position"
        """"position": the k-th tokens of both answers, as far as both go. "text": the aligner's groups of tokens that
        cover the same text, each merged into one distribution. (TRL merges what is left behind the last common end,
        too: here it is in no group. With one tokenizer, every token is its own group.)"""
        base: Literal["last", "first"] = "last"
        """Which token's distribution stands for a group, times the probabilities of the group's other tokens: the
        last's, by the chain rule, or the first's, as TRL's "observed"."""
        window: Literal["answer", "late"] = "answer"
        """"answer": a token's distribution is the one that predicts it. "late": the one at its own position, which
        predicts the next token, as TRL's "observed"; it reads beyond the response where an end is not skipped."""
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
    def needs(cls, params, same_tokens):
        states = frozenset({"hidden.last" if params.window == "answer" else "hidden.last@all"})
        return Needs(student=states, teacher=states, aligned=params.align == "text" and not same_tokens)

    def build(self, student, teacher, artifacts):
        self.merges = self.params.align == "text" and not self.pair.same_tokens
        if self.params.hybrid:
            entries = ops.shared_entries(self.pair.student_ids, student.vocab_size, teacher.vocab_size)
            for name, ids in entries.items():
                self.register_buffer(name, ids, persistent=False)
            matched, unmatched = self.params.matched_weight, self.params.unmatched_weight
            share = len(self.teacher_shared) / teacher.vocab_size if matched is None else matched
            self.weights = share, max(0.0, 1 - share) if unmatched is None else unmatched

    def streams(self, step: Step):
        student, teacher = step.student, step.teacher
        skips = self.params.skip_student_eos, self.params.skip_teacher_eos
        group = ops.groups_by_text if self.merges else ops.groups_by_position
        (mine, in_mine), (theirs, in_theirs) = (
            (of[of >= 0], of >= 0) for of in group(student.side, teacher.side, skips)
        )
        h, sample = self.states(student)[in_mine], student.sample[in_mine]
        weight = torch.ones_like(mine, dtype=ops.at_least_float32(h.dtype))
        if self.params.mean == "sequences":
            begins = torch.ones_like(weight)
            begins[1:] = (mine[1:] != mine[:-1]).to(weight.dtype)
            weight = 1 / weight.new_zeros(student.side.sequences).index_add(0, sample, begins)[sample]
        tokens = in_mine.nonzero().squeeze(-1)
        ours = Stream(h, "student", None, student.labels[in_mine], True, mine, {"weight": weight}, tokens)
        of_teacher = Stream(self.states(teacher)[in_theirs], "teacher", None, teacher.labels[in_theirs], group=theirs)
        return {"student_answer": ours, "teacher_answer": of_teacher}

    def states(self, view: View) -> Tensor:
        """The state whose prediction stands for each token [n, width]."""
        if self.params.window == "answer":
            return view["hidden.last"]
        return view["hidden.last@all"][view.side.positions + 1]

    def base(self, answer: Logits) -> Tensor | slice:
        """The token of each group whose distribution stands for it [G]."""
        if not self.merges:
            return slice(None)
        number = torch.arange(answer.groups, device=answer.group.device)
        last = self.params.base == "last"
        return torch.searchsorted(answer.group, number, right=last) - int(last)

    def logprobs(self, answer: Logits, temperature: float) -> Tensor:
        """[G, vocabulary]; those of several tokens are not normalised."""
        logprobs = answer.logprobs(temperature)
        if not self.merges:
            return logprobs
        base = self.base(answer)
        gold = -ops.cross_entropy(logprobs, answer.labels)
        others = gold.clamp_min(FLOOR).index_fill(0, base, 0.0)
        return logprobs[base] + others.new_zeros(answer.groups).index_add(0, answer.group, others)[:, None]

    @visit
    def answers(self, student_answer: Logits, teacher_answer: Logits) -> Terms:
        log_p = self.logprobs(teacher_answer, self.params.teacher_temperature)
        log_q = self.logprobs(student_answer, self.params.student_temperature)
        weight, per = student_answer.values["weight"][self.base(student_answer)], REDUCTIONS[self.params.mean]
        if not self.params.hybrid:
            return Terms().add("uld", weight * by_rank(log_p.exp(), log_q.exp()), per)
        matched = jensen_shannon(log_p[:, self.teacher_shared], log_q[:, self.student_shared], self.params.beta)
        unmatched = by_rank(log_p[:, self.teacher_rest].exp(), log_q[:, self.student_rest].exp())
        if not (len(self.teacher_rest) and len(self.student_rest)):
            unmatched = torch.zeros_like(unmatched)  # nothing that it could be moved to, and TRL counts none
        terms = Terms().add("matched", self.weights[0] * (weight * matched), per)
        return terms.add("unmatched", self.weights[1] * (weight * unmatched), per)


REDUCTIONS: dict[str, Reduction] = {"sequences": "sequences", "rows": "tokens"}
"""By the parameter `mean`."""


def by_rank(p: Tensor, q: Tensor) -> Tensor:
    """sum_r |p(r) - q(r)| per token [n], of [n, W] and [n, V] from the likeliest on, 0 behind the end of either."""
    p, q = (x.sort(-1, descending=True).values for x in (p, q))
    both = min(p.shape[-1], q.shape[-1])
    return (p[:, :both] - q[:, :both]).abs().sum(-1) + p[:, both:].sum(-1) + q[:, both:].sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalised, per token [n]; of beta 0 and 1 not the limits, which are 0, but the two KL."""
    log_p, log_q = log_p.clamp_min(FLOOR), log_q.clamp_min(FLOOR)
    if beta in (0, 1):
        return ops.reverse_kl(log_p, log_q) if beta else ops.forward_kl(log_p, log_q)
    return ops.js(log_p, log_q, beta)


@hookimpl
def register_plugins(register: Register) -> None:
    register(ULD)
