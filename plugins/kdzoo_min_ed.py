"""Minimum edit distance (MinED): the teacher's distribution, moved to the student's vocabulary by a map of entries.

Every token of the student has a target. Where one token of each model stands for the same text, it is the teacher's
distribution, whose entries go to those of the student that say the same, or else to the nearest by edit distance.
Everywhere else it is the gold token.

Shapes: N student tokens, P aligned pairs, V / W student / teacher vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdzoo import Logits, Loss, Needs, Params, Register, Step, Terms, hookimpl, ops, visit


class MinED(Loss):
    """The forward KL from the teacher's moved distribution, or the cross-entropy with the gold token, of each token."""

    name = "min_ed"
    paper = "Wan et al., Knowledge Fusion of Large Language Models (FuseLLM), ICLR 2024, arxiv.org/abs/2401.10491"
    formula = (
        "L = 1/N sum_i KL(t_i || q_i), t_i = sum_w p_j(w) [m(w) = .] / sum_w p_j(w) [m(w) is some] where token j of "
        "the teacher is that of i, and else [y_i = .]; m the map of entries, p teacher, q student"
    )
    deviations = (
        "FuseLLM maps every entry to the nearest by its spelling; here texts are compared, and an entry that has "
        "nothing in common with any other, a special token, or a part of a character has no partner.",
        "FuseLLM keeps of a distribution the likeliest tokens that were stored; here it is whole.",
        "`MinEditDisForwardKLD` of DSKD also takes the teacher's token where several of the student's belong to it "
        "and one of them has the same text; here it is in no pair, and its target is the gold token.",
        "In float32, `get_aligned_teacher_logits` of DSKD writes its targets over the student's own logits, so that "
        "the divergence is 0; here it never is.",
        "`compute_baseline_mined_loss` of tokenkit compares the distributions behind the tokens of a pair, one "
        "position late, and counts padding among the pairs that it divides by; here they are those that predict them, "
        "and the sum is divided by the student's tokens.",
    )

    class Params(Params):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "dskd@077337a": {"several": "first", "agree": "input"},
            "tokenkit@bcacdef": {"entries": "nearest_in_teacher", "agree": "pair"},
        }
        preset: Literal["dskd@077337a", "tokenkit@bcacdef"] | None = None
        """Whose code: what is not given beside it is as there. That of songmzhang/DSKD, with 0.5 beside 0.5 for the
        cross-entropy, reads the aligner "min_edit" with its `rows` "input"; that of bminixhofer/tokenkit "by_bytes"."""
        temperature: float = Field(2.0, gt=0)
        """Divides the logits of both models, also where the target is the gold token. No factor of its square."""
        entries: Literal["nearest_in_student", "nearest_in_teacher", "same_text"] = "nearest_in_student"
        """The map. "nearest_in_student": each of the teacher's entries looks for its partner. "nearest_in_teacher":
        each of the student's does, and takes over its partner's logit, of which several may have the same.
        "same_text": none but those that say the same."""
        several: Literal["sum", "first"] = "sum"
        """Of several entries of the teacher with one partner: their probabilities are added, or those behind the first
        are dropped."""
        agree: Literal["label", "input", "pair"] = "label"
        """When a pair's target is the teacher's distribution. "label": the map leads from the teacher's token to the
        student's. "input": it does from the tokens that stand before these, which the models have read. "pair":
        always."""
        gold: bool = True
        """Whether the target of all other tokens is the gold token; if not, they add 0."""

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(aligned=not same_tokens, entries=frozenset({params.entries}), divergence=same_tokens)

    def build(self, student, teacher, artifacts):
        partners, self.vocab_size = self.pair.entries(self.params.entries), student.vocab_size
        self.by_student = self.params.entries == "nearest_in_teacher"
        takes = partners if self.by_student else ops.first_sources(partners, student.vocab_size)  # [V]
        mine, theirs = ops.linked_entries(takes)
        if self.params.several == "sum" and not self.by_student:
            theirs, mine = ops.linked_entries(partners)
        maps = {"partners": partners, "mine": mine, "theirs": theirs, "reached": theirs.unique()}  # [W] or [V]; [K]
        for name, entries in maps.items():
            self.register_buffer(name, entries, persistent=False)

    @visit(kind="tokens")
    def pairs(self, student: Logits, teacher: Logits) -> Mapping[str, Tensor]:
        tau = self.params.temperature
        kl = ops.forward_kl(self.moved(teacher.logprobs(tau)), student.logprobs(tau))
        mass = teacher.logprobs()[:, self.reached].exp().sum(-1)
        return {"kl": kl - kl.detach().clamp_max(0), "agrees": self.agrees(student, teacher), "mass": mass}

    @visit(kind="tokens", when=lambda params: params.gold)
    def golds(self, student: Logits) -> Mapping[str, Tensor]:
        return {"nll": ops.cross_entropy(student.logprobs(self.params.temperature), student.labels)}

    def moved(self, log_p: Tensor) -> Tensor:
        """Of log-probabilities over the teacher's entries [P, W] those over the student's [P, V]."""
        moved = log_p.new_zeros(len(log_p), self.vocab_size).index_add(1, self.mine, log_p.exp()[:, self.theirs])
        return (moved / moved.sum(-1, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny)).log()

    def agrees(self, student: Logits, teacher: Logits) -> Tensor:
        """Whether the teacher's distribution is the target [P] bool."""
        if self.params.agree == "pair":
            return torch.ones_like(student.labels, dtype=torch.bool)
        mine, theirs = student.labels, teacher.labels
        if self.params.agree == "input":
            mine, theirs = student.side.inputs[student.at], teacher.side.inputs[teacher.at]
        return self.partners[mine] == theirs if self.by_student else self.partners[theirs] == mine

    def finish(self, step: Step) -> Terms:
        kl, agrees, mass = (step.values[f"pairs.{name}"] for name in ("kl", "agrees", "mass"))
        value = step.values["golds.nll"] if self.params.gold else kl.new_zeros(len(step.student))
        ours = step.batch.pairs[:, 0]
        value = value.index_copy(0, ours, torch.where(agrees, kl, value[ours]))
        return Terms().add("kd", value).watch("taught", agrees, len(value)).watch("mapped_mass", mass, len(mass))


@hookimpl
def register_plugins(register: Register) -> None:
    register(MinED)
