"""Approximate likelihood matching: the likelihoods of chunks of text, whatever tokens they are made of.

After bminixhofer/tokenkit @ bcacdef, `compute_alm_loss` in tokenkit/training/losses.py; deviations are parameters and
named there. One is none: a chunk that only one model has scored tokens of is left out.

Shapes: N student rows, M teacher rows, n either, B sequences, K places for chunks (some empty), V a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kdzoo import Batch, Chunk, Loss, Models, Needs, Own, OwnStream, Params, Side, Terms, View, Visit, hookimpl, ops

LOWEST = -1e6
"""Log-probability of a chunk that one of the models excludes: a finite number, so that others still learn."""

Difference = Literal[
    "binary_ce", "reverse_binary_kl", "binary_kl_temp_limit", "abs", "abs_exp", "renyi", "joschu_k2", "joschu_k3"
]


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0."""
    return (-x.expm1()).log()


def renyi(a: Tensor, b: Tensor, order: float) -> Tensor:
    """log(p^order q^(1 - order) + (1 - p)^order (1 - q)^(1 - order)) / (order - 1)"""
    outcomes = (order * x + (1 - order) * y for x, y in ((a, b), (log1mexp(a), log1mexp(b))))
    return torch.logaddexp(*outcomes) / (order - 1)


DIFFERENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "binary_ce": lambda a, b, _: a.expm1() * log1mexp(b) - a.exp() * b,
    "reverse_binary_kl": lambda a, b, _: b.exp() * (b - a) - b.expm1() * (log1mexp(b) - log1mexp(a)),
    "binary_kl_temp_limit": lambda a, b, _: a - b + a * (b / a).log(),
    "abs": lambda a, b, _: (a - b).abs(),
    "abs_exp": lambda a, b, _: (a.exp() - b.exp()).abs(),
    "renyi": renyi,
    "joschu_k2": lambda a, b, _: (a - b).square() / 2,
    "joschu_k3": lambda a, b, _: (r := (a - b).clamp_max(80)).expm1() - r,  # e^88 is infinite in float32
}
"""Of the teacher's and the student's log-probabilities [K] < 0, and of the order of Renyi's divergence."""
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
        "`compute_alm_loss` divides by joined chunks, and joins their counts twice by mistake; by default the "
        "divisor is all chunks before they are joined, which no prediction has a part in (`denominator`).",
        "It asks the state at a response's last token whether a boundary follows; by default that is certain, "
        "since nothing trains that prediction (`last_state`).",
        "By default it scores prompts as well; here chunks are of responses, and those with scored tokens of one "
        "model only are left out.",
        "Chunks that are cut by a matrix over pairs of tokens (`get_unbiased_alignments`) are not offered: a "
        "script of the authors' makes it from a corpus, and their examples join chunks instead, as `merge_below` "
        "does.",
        "The authors scale each loss by its gradient's norm; here a term counts by its slot's weight, which "
        "should be in proportion to `temperature`.",
        "`compute_alm_latents_loss`, between states where chunks end, is not offered: its divisor is a mean over "
        "the micro-batch.",
    )

    class Params(Params):
        difference: Difference = "binary_ce"
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
        "token_count": the teacher's rows. "merged_chunk_count": joined chunks, the authors' intention, which only the
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

    @classmethod
    def needs(cls, params: Alm.Params, same_tokens: bool) -> Needs:
        last = (
            OwnStream("student_last", "own", head="student", learns_head=True),
            OwnStream("teacher_last", "own", head="teacher"),
        )
        streams = last if params.looks_beyond and params.last_state else ()
        sites = frozenset({"hidden.last@all"} if streams else ())
        return Needs(
            student=sites,
            teacher=sites,
            streams=streams,
            visits=tuple(Visit(n, (n,), kind="rows") for n in ("student", "teacher", *(s.name for s in streams))),
            aligned=not same_tokens,
            lexicons=params.looks_beyond,
            batch_coupled=params.denominator == "merged_chunk_count" and params.merge_below is not None,
        )

    def __init__(self, params: Alm.Params, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(params, models, artefacts)
        if params.looks_beyond:
            for model, facts in (("student", models.student), ("teacher", models.teacher)):
                assert facts is not None and facts.lexicon is not None
                tokens = {facts.lexicon.end}
                if params.boundary == "space":
                    texts = enumerate(facts.lexicon.texts)
                    tokens = facts.lexicon.special.union(i for i, text in texts if text.startswith((" ", "\t", "\n")))
                mask = torch.zeros(facts.vocabulary, dtype=torch.bool)
                mask[[token for token in tokens if token < facts.vocabulary]] = True
                self.register_buffer(f"{model}_boundary", mask, persistent=False)  # [V]

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> dict[str, Own]:
        """The state at each response's last token [B, width]."""
        found = {}
        for model, view in (("student", student), ("teacher", teacher)):
            rows = view.side.rows
            last = rows.new_zeros(view.side.sequences).scatter_reduce(0, view.sample, rows + 1, "amax")
            found[f"{model}_last"] = Own(view["hidden.last@all"][last], labels=torch.zeros_like(last))
        return found

    def over_vocab(self, visit: str, chunk: Chunk) -> dict[str, Tensor]:
        log_p = chunk.logprobs(visit)
        found = {"label": -ops.cross_entropy(log_p, chunk.labels(visit))}
        if self.params.looks_beyond:
            boundary = self.get_buffer(f"{visit.removesuffix('_last')}_boundary")
            mass = log_p.exp() @ boundary.to(log_p.dtype)
            found["boundary"] = mass.clamp(torch.finfo(mass.dtype).tiny, 1).log()
        return found

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        p, sides = self.params, {"student": student.side, "teacher": teacher.side}
        aligned = chunks = Chunks.aligned(sides)
        if p.merge_below is not None:
            closes = self.after(chunks, sides, rows)["teacher"].exp() > p.merge_below
            chunks = aligned.joined(closes, teacher.sample)
        log = {model: chunks.sum(model, rows[f"{model}.label"]) for model in sides}
        if p.append_boundary:
            log = {model: log[model] + after for model, after in self.after(chunks, sides, rows).items()}
        # Places without a chunk have some value, so that no gradient is lost in infinities.
        log = {model: torch.where(chunks.held, value.clamp(LOWEST, 0), -1) for model, value in log.items()}

        tau = 1.0 if p.difference in WITHOUT_TEMPERATURE else p.temperature
        a, b = log["teacher"].detach() / tau - p.epsilon, log["student"] / tau - p.epsilon
        tokens, count = chunks.sum("teacher", torch.ones_like(rows["teacher.label"])), chunks.held.sum()
        weight = {"chunk_count": 1, "token_count": tokens, "log1p_token_count": tokens.log1p()}[p.numerator]
        total = torch.where(chunks.held, weight * DIFFERENCES[p.difference](a, b, p.order), 0).sum()
        if p.denominator == "merged_chunk_count":
            total = total * aligned.held.sum() / count.clamp_min(1)
        terms = Terms().add("likelihood", total, per="teacher_rows" if p.denominator == "token_count" else "spans")
        terms.watch("teacher_tokens_per_chunk", tokens.sum(), count)
        for model, value in log.items():
            terms.watch(f"{model}_log_likelihood", torch.where(chunks.held, value, 0).sum(), count)
        return terms

    def after(self, chunks: Chunks, sides: Mapping[str, Side], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log-probability of a boundary after each chunk [K], by model: what the state at its last token predicts."""
        found, certain = {}, torch.zeros_like(chunks.held)
        for model, side in sides.items():
            is_followed = ops.is_followed(side)
            following = rows[f"{model}.boundary"].roll(-1)
            if self.params.last_state:
                following = torch.where(is_followed, following, rows[f"{model}_last.boundary"][side.sample])
            else:
                certain |= ~chunks.last(model, is_followed)
            found[model] = chunks.last(model, following)
        return {model: torch.where(certain, 0, value) for model, value in found.items()}


@dataclass(frozen=True)
class Chunks:
    """Chunks of a batch, each at one of K places; what has rows on one side alone is none."""

    of: Mapping[str, Tensor]  # by model [n]: the place of each row's chunk; K for none
    held: Tensor  # [K] bool: where a chunk is

    @classmethod
    def aligned(cls, sides: Mapping[str, Side]) -> Chunks:
        # Every chunk has a token: a bound on their number, so that no device is waited for.
        places = max(side.input_ids.numel() for side in sides.values())
        held = sides["teacher"].span.new_ones(places + 1, dtype=torch.bool)
        for side in sides.values():
            present = torch.zeros_like(held)
            present[side.span] = True
            held &= present
        held[-1] = False  # a span of -1 is none
        of = {model: torch.where(held[side.span], side.span, places) for model, side in sides.items()}
        return cls(of, held[:-1])

    def sum(self, model: str, values: Tensor) -> Tensor:
        """Values of rows [n], added up over each chunk [K]."""
        return values.new_zeros(len(self.held) + 1).index_add(0, self.of[model], values)[:-1]

    def last(self, model: str, values: Tensor) -> Tensor:
        """The value [n] of each chunk's last row [K]; 0 without a chunk."""
        of = self.of[model]
        row = torch.arange(len(of), device=of.device)
        row = of.new_full((len(self.held) + 1,), -1).scatter_reduce(0, of, row, "amax")[:-1]
        return torch.cat([values, values.new_zeros(1)])[row]

    def joined(self, closes: Tensor, sample: Tensor) -> Chunks:
        """Chunks up to one that `closes` [K], or a sequence's last, as one at its place. `sample` is the teacher's."""
        places = len(self.held)
        place = torch.arange(places, device=closes.device)
        sequence = self.last("teacher", sample)
        ends = torch.zeros_like(place).scatter_reduce(0, sequence, torch.where(self.held, place, 0), "amax")
        final = self.held & (closes | (place == ends[sequence]))
        to = torch.where(final, place, places).flip(0).cummin(0).values.flip(0)
        to = torch.cat([to, to.new_full((1,), places)])
        return Chunks({model: to[of] for model, of in self.of.items()}, final)


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(Alm)
