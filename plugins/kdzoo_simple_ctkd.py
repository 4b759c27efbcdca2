"""Distillation on the sub-vocabulary that two tokenizers share: what both models can say is compared entry by entry.

Shapes: P aligned pairs, N student tokens, V / W student / teacher vocabulary, K entries of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdzoo import Logits, Loss, Needs, Register, Step, Terms, hookimpl, ops, visit


class SimpleCTKD(Loss):
    """A divergence between both models' distributions over shared entries, where a token of both covers one text."""

    name = "simple_ctkd"
    paper = (
        "Zhang et al., KDFlow: A User-Friendly and Efficient Knowledge Distillation Framework for Large Language "
        "Models, 2026, arxiv.org/abs/2603.01875"
    )
    formula = "L = 1/P sum_i D(p_i(. | shared), q_i(. | shared)), over pairs i of tokens, p teacher, q student"
    deviations = (
        "`SimpleCrossTokenizerKD` takes entries for the same by their spelling, with one sign for a space; here they "
        "are by their text, which also finds lines, bytes and what two tokenizers spell in two ways.",
        "It pairs tokens by a walk that compares spellings and goes astray after characters of several tokens; here "
        "the recipe's aligner pairs them.",
        'It divides the sum over pairs by all response tokens of the student; here that is `mean` "tokens".',
        "It uses the log-softmax over shared entries alone, however little of the teacher's probability they hold; "
        "here that share is logged as `shared_mass`, and `rest` can keep the others as one entry.",
        "Of KDFlow's functions, `top1_ce` and `hrl` are losses for one tokenizer here, and `jsd` has equal weights.",
    )

    class Params(ops.DivergenceParams):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"kdflow@3a7a21a": {"mean": "tokens"}}
        preset: Literal["kdflow@3a7a21a"] | None = None
        """Whose code: what is not given beside it is as there. Of songmzhang/KDFlow, whose scripts weigh this with 0.5
        beside 0.5 for the cross-entropy."""
        temperature: float = Field(1.0, gt=0)
        """Divides the logits of both models."""
        rest: Literal["dropped", "one_entry"] = "dropped"
        """What is not shared. "dropped": distributions are over shared entries alone. "one_entry": all others of a
        model are one entry more, so that the student also learns how much is theirs."""
        mean: Literal["pairs", "tokens"] = "pairs"
        """What the sum over pairs is divided by: pairs, or the student's tokens, paired or not."""

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(aligned=not same_tokens, entries=frozenset({"same_text"}), divergence=True)

    def build(self, student, teacher, artifacts):
        entries = ops.shared_entries(self.pair.entries("same_text"), student.vocab_size, teacher.vocab_size)
        for name, ids in entries.items():
            self.register_buffer(name, ids, persistent=False)

    @visit(kind=lambda params: "sum" if params.mean == "pairs" else "tokens")
    def pairs(self, student: Logits, teacher: Logits) -> Terms | Mapping[str, Tensor]:
        log_p = self.shared(teacher, self.teacher_shared, self.teacher_rest)
        log_q = self.shared(student, self.student_shared, self.student_rest)
        divergence = self.params.measure(log_p, log_q)
        divergence = divergence - divergence.detach().clamp_max(0)  # below 0 is rounding
        mass = teacher.logprobs().detach()[:, self.teacher_shared].exp().sum(-1)
        if self.params.mean == "tokens":
            return {"divergence": divergence, "shared_mass": mass}
        terms = Terms().watch("shared_mass", mass, len(mass))
        return terms.add("divergence", divergence, per="tokens" if self.pair.same_tokens else "pairs")

    def shared(self, model: Logits, entries: Tensor, others: Tensor) -> Tensor:
        """Log-probabilities of the shared entries [P, K], or [P, K + 1] with the others as one."""
        tau = self.params.temperature
        if self.params.rest == "dropped":
            return torch.log_softmax(model.logits[:, entries] / tau, -1)
        logprobs = model.logprobs(tau)
        rest = logprobs[:, others].exp().sum(-1, keepdim=True).clamp_min(torch.finfo(logprobs.dtype).tiny)
        return torch.cat([logprobs[:, entries], rest.log()], -1)

    def finish(self, step: Step) -> Terms:
        """With `mean` "tokens": a value of every token of the student [N], 0 where it has no pair."""
        if not step.values:
            return Terms()
        divergence, mass = step.values["pairs.divergence"], step.values["pairs.shared_mass"]
        tokens = divergence.new_zeros(len(step.student)).index_add(0, step.batch.pairs[:, 0], divergence)
        return Terms().add("divergence", tokens).watch("shared_mass", mass, len(mass))


@hookimpl
def register_plugins(register: Register) -> None:
    register(SimpleCTKD)
