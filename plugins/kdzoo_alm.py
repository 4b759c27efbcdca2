"""Approximate likelihood matching: the likelihoods of chunks of text, whatever tokens they are made of.

After bminixhofer/tokenkit @ bcacdef, `compute_alm_loss` in tokenkit/training/losses.py; deviations are parameters and
named there. One is none: a chunk that only one model has scored tokens of is left out.

A chunk is an aligned span, or several that are joined. Shapes: N student tokens, M teacher tokens, n either,
B sequences, K places for chunks (some empty), V a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kdzoo import (
    Logits,
    Loss,
    ModelInfo,
    Needs,
    Params,
    Reduction,
    Register,
    Role,
    Step,
    Stream,
    Terms,
    hookimpl,
    ops,
    visit,
)

LOWEST = -1e6
"""Log-probability of a chunk that one of the models excludes: a finite number, so that others still learn."""


WITHOUT_TEMPERATURE = ("binary_kl_temp_limit", "abs", "renyi")


class Alm(Loss):
    """How likely both models find each chunk, as two outcomes, softened by a temperature: long chunks are unlikely."""

    name = "alm"
    paper = (
        "Minixhofer et al., Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching, NeurIPS 2025, "
        "arxiv.org/abs/2503.20083"
    )
    formula = "L = 1/C sum_c [- P_c log Q_c - (1 - P_c) log(1 - Q_c)],  P_c = p(c)^(1/tau), Q_c = q(c)^(1/tau)"
    deviations = (
        "`compute_alm_loss` divides by joined chunks, and joins their counts twice by mistake; by default the divisor "
        "is all chunks before they are joined, which no prediction has a part in (`denominator`).",
        "It asks the state at a response's last token whether a boundary follows; by default that is certain, since "
        "nothing trains that prediction (`last_state`).",
        "By default it scores prompts as well; here chunks are of responses, and need scored tokens of both models.",
        "Chunks cut by a matrix over pairs of tokens (`get_unbiased_alignments`), which a script of the authors' makes "
        "from a corpus, are not offered; their examples join chunks instead, as `merge_below` does.",
        "The authors scale each loss by its gradient's norm; here a term counts by its slot's weight, which should be "
        "in proportion to `temperature`.",
        "`compute_alm_latents_loss` (states where chunks end) is not offered: its divisor is a micro-batch's mean.",
    )

    class Params(Params):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "tokenkit@bcacdef": {"last_state": True, "denominator": "merged_chunk_count"},
        }
        preset: Literal["tokenkit@bcacdef"] | None = None
        """A release of the authors' code: what is not given beside it is as there."""
        difference: ops.LikelihoodDifference = "binary_ce"
        """How far the teacher's likelihood of a chunk is from the student's, by the authors' names. "binary_ce" keeps
        the teacher's entropy, so that its minimum is not 0. "binary_kl_temp_limit" is the limit of a large temperature;
        it, "abs" and "renyi" have none."""
        temperature: float = Field(100.0, gt=0)
        """Divides log-probabilities of chunks, and gradients with them: a slot's weight should be in proportion. (The
        authors scale every loss by its gradient's norm instead.)"""
        order: float = Field(2.0, gt=0)
        """Of "renyi"; not 1."""
        epsilon: float = Field(1e-6, gt=0)
        """Taken from log-probabilities, so that no chunk is certain."""
        append_boundary: bool = True
        """Whether a chunk's outcome is its tokens and then a boundary: without that, a tokenizer which could have gone
        on with a longer token finds the same text less likely than one that could not."""
        merge_below: float | None = Field(0.1, ge=0, lt=1)
        """Chunks after which the teacher gives a boundary at most this probability are joined with those that follow,
        up to one with more. The paper's value; null: none."""
        boundary: Literal["space", "end"] = "space"
        """Which tokens are a boundary: those that begin with a space, tab or newline and the special ones, or the end
        of the sequence alone."""
        last_state: bool = False
        """Whether the state at a response's last token says if a boundary follows, as in the authors' code. It predicts
        nothing that is trained, and of a cut response only one model may have a state there: by default the boundary
        is certain for both."""
        numerator: Literal["chunk_count", "token_count", "log1p_token_count"] = "chunk_count"
        """What a chunk weighs: 1, or how many tokens the teacher has for it."""
        denominator: Literal["chunk_count", "token_count", "merged_chunk_count"] = "chunk_count"
        """What the sum is divided by, over the whole step. "chunk_count": all chunks, before they are joined.
        "token_count": the teacher's tokens. "merged_chunk_count": joined chunks, the authors' intention, which only the
        teacher's predictions tell, so that it is of one micro-batch. (The authors join the counts twice by mistake,
        which makes their loss too large by about the chunks of a joined one.)"""

        @field_validator("order")
        @classmethod
        def not_one(cls, order: float) -> float:
            if order == 1:
                raise ValueError("the limit 1 is a KL divergence; take 'reverse_binary_kl' or 'binary_ce'")
            return order

        @property
        def looks_beyond(self) -> bool:
            """Whether it matters what follows a chunk."""
            return self.append_boundary or self.merge_below is not None

        @property
        def looks_at_last_state(self) -> bool:
            return self.looks_beyond and self.last_state

    @classmethod
    def needs(cls, params, same_tokens):
        sites = frozenset({"hidden.last@all"} if params.looks_at_last_state else ())
        coupled = params.denominator == "merged_chunk_count" and params.merge_below is not None
        says, aligned = params.looks_beyond, not same_tokens
        return Needs(student=sites, teacher=sites, aligned=aligned, vocabularies=says, batch_coupled=coupled)

    def build(self, student, teacher, artifacts):
        if self.params.looks_beyond:
            self.register_buffer("student_boundary", self.boundaries(student), persistent=False)  # [V]
            self.register_buffer("teacher_boundary", self.boundaries(teacher), persistent=False)  # [W]

    def boundaries(self, model: ModelInfo) -> Tensor:
        """Which tokens are a boundary [vocabulary] bool."""
        tokens = {model.vocabulary.end}
        if self.params.boundary == "space":
            texts = enumerate(model.vocabulary.texts)
            tokens = model.vocabulary.special.union(i for i, text in texts if text.startswith((" ", "\t", "\n")))
        mask = torch.zeros(model.vocab_size, dtype=torch.bool)
        mask[[token for token in tokens if token < model.vocab_size]] = True
        return mask

    def streams(self, step: Step):
        if not self.params.looks_at_last_state:
            return {}
        return {"student_last": last_states(step, "student"), "teacher_last": last_states(step, "teacher")}

    @visit(kind="tokens", each=("student", "teacher", "student_last", "teacher_last"))
    def outcome(self, seen: Logits) -> dict[str, Tensor]:
        log_p = seen.logprobs()
        found = {"label": -ops.cross_entropy(log_p, seen.labels)}
        if self.params.looks_beyond:
            boundary = self.get_buffer(f"{seen.stream.removesuffix('_last')}_boundary")
            mass = log_p.exp() @ boundary.to(log_p.dtype)
            found["boundary"] = mass.clamp(torch.finfo(mass.dtype).tiny, 1).log()
        return found

    def finish(self, step: Step) -> Terms:
        p, values = self.params, step.values
        aligned = chunks = ops.Spans.aligned({"student": step.student.side, "teacher": step.teacher.side})
        if p.merge_below is not None:
            closes = self.after(chunks, step)["teacher"].exp() > p.merge_below
            chunks = aligned.joined(closes, step.teacher.sample)
        log = {model: chunks.sum(model, values[f"outcome.{model}.label"]) for model in chunks.of}
        if p.append_boundary:
            log = {model: log[model] + after for model, after in self.after(chunks, step).items()}
        # Places without a chunk have some value, so that no gradient is lost in infinities.
        log = {model: torch.where(chunks.held, value.clamp(LOWEST, 0), -1) for model, value in log.items()}

        tau = 1.0 if p.difference in WITHOUT_TEMPERATURE else p.temperature
        a, b = log["teacher"].detach() / tau - p.epsilon, log["student"] / tau - p.epsilon
        tokens, count = chunks.sum("teacher", torch.ones_like(values["outcome.teacher.label"])), chunks.held.sum()
        weight = {"chunk_count": 1, "token_count": tokens, "log1p_token_count": tokens.log1p()}[p.numerator]
        value = torch.where(chunks.held, weight * ops.LIKELIHOOD_DIFFERENCES[p.difference](a, b, p.order), 0)
        if p.denominator == "merged_chunk_count":
            value = value * aligned.held.sum() / count.clamp_min(1)
        per: Reduction = "teacher_tokens" if p.denominator == "token_count" else "spans"
        terms = Terms().add("likelihood", value, per, of=chunks.of["student"])
        terms.watch("teacher_tokens_per_chunk", tokens, count)
        for model, value in log.items():
            terms.watch(f"{model}_log_likelihood", torch.where(chunks.held, value, 0), count)
        return terms

    def after(self, chunks: ops.Spans, step: Step) -> dict[str, Tensor]:
        """Log-probability of a boundary after each chunk [K], by model: what the state at its last token predicts."""
        found, certain = {}, torch.zeros_like(chunks.held)
        for model, view in (("student", step.student), ("teacher", step.teacher)):
            is_followed = ops.is_followed(view.side)
            following = step.values[f"outcome.{model}.boundary"].roll(-1)
            if self.params.last_state:
                last = step.values[f"outcome.{model}_last.boundary"][view.sample]
                following = torch.where(is_followed, following, last)
            else:
                certain |= ~chunks.last(model, is_followed)
            found[model] = chunks.last(model, following)
        return {model: torch.where(certain, 0, value) for model, value in found.items()}


def last_states(step: Step, role: Role) -> Stream:
    """The state at each response's last token [B, width]."""
    view = step.student if role == "student" else step.teacher
    last = view.side.positions.new_zeros(view.side.sequences)
    last = last.scatter_reduce(0, view.sample, view.side.positions + 1, "amax")
    hidden = view["hidden.last@all"][last]
    return Stream(hidden, role, labels=torch.zeros_like(last), learns_head=role == "student")


@hookimpl
def register_plugins(register: Register) -> None:
    register(Alm)
