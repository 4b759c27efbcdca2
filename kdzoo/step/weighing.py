"""Token weights: made before the first backward pass of an optimizer step, so that their sums are known in the pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo.api import ops
from kdzoo.api.batch import Batch, Reduction
from kdzoo.api.facts import carry_by_spans
from kdzoo.api.head import Head
from kdzoo.api.models import Role
from kdzoo.api.terms import Of, Term, Terms
from kdzoo.api.token_weights import TokenWeights, WeighedTokens, Weights
from kdzoo.errors import KdzooError
from kdzoo.step.chunks import chunk_tokens
from kdzoo.step.facts import LogProbs, facts_of, log_softmax_at
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Sums

Facts = Mapping[str, Mapping[str, Tensor]]
"""Loss term -> fact -> [N]: what its token weights read, on the student's tokens."""

PAIRS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": ops.forward_kl,
    "reverse_kl": ops.reverse_kl,
    "js": ops.js,
    "hellinger": ops.hellinger,
    "total_variation": ops.total_variation,
}


# What weights are made of


class TokenFacts(nn.Module):
    """What token weights read of the models' predictions; a module of its own, as the vocabulary pass is one."""

    def __init__(self, terms: Sequence[LossTerm], gather: Callable[..., Any], chunk_bytes: int) -> None:
        super().__init__()
        self.terms = [term for term in terms if term.weights is not None]
        self.gather = gather
        self.chunk_bytes = chunk_bytes

    @property
    def reads_student(self) -> bool:
        return any(term.weight_needs.reads_student for term in self.terms)

    @torch.no_grad()
    def forward(
        self, *, batch: Batch, student: Tensor | None, teacher: Mapping[str, Tensor], heads: Mapping[Role, Head]
    ) -> dict[str, dict[str, Tensor]]:
        """`student`: its last states [N, S], where they are read; `teacher`: its sites."""
        wanted: dict[str, frozenset[str]] = {}
        for term in self.terms:
            wanted[term.prediction] = wanted.get(term.prediction, frozenset()) | term.weight_needs.facts
        with self.gather(heads["teacher"].parameters if "teacher" in heads else []):
            found = {
                prediction: self._facts(batch, student, teacher.get(prediction), heads, facts)
                for prediction, facts in wanted.items()
            }
        return {
            term.name: {fact: found[term.prediction][fact] for fact in term.weight_needs.facts} for term in self.terms
        }

    def _facts(
        self,
        batch: Batch,
        student: Tensor | None,
        teacher: Tensor | None,
        heads: Mapping[Role, Head],
        wanted: frozenset[str],
    ) -> dict[str, Tensor]:
        of_teacher = frozenset(fact for fact in wanted if fact.startswith("teacher."))
        states: dict[Role, Tensor] = {}
        if student is not None:
            states["student"] = student
        if teacher is not None:
            states["teacher"] = teacher
        if not of_teacher or batch.same_tokens:
            return self._walk(batch, states, heads, wanted)
        assert batch.student is not None and batch.teacher is not None and teacher is not None
        theirs = self._walk(batch, {"teacher": teacher}, heads, of_teacher)
        rest = wanted - of_teacher
        ours = self._walk(batch, {"student": states["student"]}, heads, rest) if rest else {}
        return {**ours, **carry_by_spans(theirs, batch.student, batch.teacher)}

    def _walk(
        self, batch: Batch, states: Mapping[Role, Tensor], heads: Mapping[Role, Head], wanted: frozenset[str]
    ) -> dict[str, Tensor]:
        """Facts of tokens that the models have in common, chunk by chunk."""
        sides = {"student": batch.student, "teacher": batch.teacher}
        read = [role for role in states if any(fact.startswith((role, "pair.")) for fact in wanted)]
        if not read:
            return {}
        count = len(states[read[0]])
        size = chunk_tokens(self.chunk_bytes, sum(heads[role].rows.shape[0] for role in read))
        parts = []
        for start in range(0, max(count, 1), size):
            at = slice(start, start + size)
            found: dict[str, Tensor] = {}
            logprobs: dict[Role, LogProbs] = {}
            for role in read:
                side = sides[role]
                assert side is not None
                logits = heads[role].finish(states[role][at] @ heads[role].rows.t(), heads[role].biases)
                logprobs[role] = partial(log_softmax_at, logits)
                own = frozenset(fact for fact in wanted if fact.startswith(f"{role}."))
                found |= facts_of(logits, side.labels[at], own, logprobs[role])
            pairs = sorted(fact for fact in wanted if fact.startswith("pair."))
            if pairs:
                log_p, log_q = logprobs["teacher"](1.0), logprobs["student"](1.0)
                found |= {fact: PAIRS[fact.removeprefix("pair.")](log_p, log_q) for fact in pairs}
            parts.append(found)
        return {fact: torch.cat([part[fact] for part in parts]) for fact in wanted}


# What tokens weigh

WATCHED_OF_WEIGHTS = ("token_weight", "token_temperature")
"""What is logged of a weighed term beside what its loss watches."""

TOKENS_OF: Mapping[str, Reduction] = {"student": "tokens", "teacher": "teacher_tokens"}
"""By model: what its tokens are called in a term."""


def carried(batch: Batch, values: Tensor, of: Of, count: int) -> Tensor:
    """Values of the student's tokens [N] as those of what else a term may be of [count]: means over its tokens.

    What has none of the student's tokens gets 1: neither a weight nor a temperature changes anything there.
    """
    student = batch.student
    assert student is not None
    if isinstance(of, Tensor):
        return ops.mean_by(values, of, count, otherwise=1.0)
    match of:
        case "tokens":
            return values
        case "pairs":
            return values[batch.pairs[:, 0]]
        case "spans":
            return ops.mean_by(values, student.span, count, otherwise=1.0)
        case "sequences":
            return ops.mean_by(values, student.sample, count, otherwise=1.0)
    if batch.same_tokens:
        return values
    teacher = batch.teacher
    assert teacher is not None
    spans = 1 + int(torch.cat([student.span, teacher.span, student.span.new_full((1,), -1)]).max())
    by_span = ops.mean_by(values, student.span, spans, otherwise=1.0)
    by_sequence = ops.mean_by(values, student.sample, student.sequences, otherwise=1.0)
    shared = torch.zeros(spans + 1, dtype=torch.bool, device=values.device).index_fill(0, student.span, True)
    shared[-1] = False  # the place of tokens without a span
    return torch.where(
        shared[teacher.span], torch.cat([by_span, by_span.new_ones(1)])[teacher.span], by_sequence[teacher.sample]
    )


@dataclass(frozen=True)
class Weighed:
    """What the tokens of one term weigh on one micro-batch."""

    batch: Batch
    weights: Weights
    counts: Mapping[Reduction, float] = field(default_factory=dict)
    """The denominators of the whole optimizer step."""
    _known: dict[tuple[str, Reduction, int], Tensor] = field(default_factory=dict)

    @cached_property
    def factors(self) -> Tensor:
        """[N] what the loss's values are multiplied by."""
        tau = self.weights.temperatures
        return self.weights.values if tau is None else self.weights.values * tau.square()

    def of_term(self, term: Term) -> Tensor:
        """The factors of the values of a term of `finish`."""
        return self.on(term.per if term.of is None else term.of, term.value.numel())

    def on(self, of: Of, count: int) -> Tensor:
        """The factors of `count` things that a term has values of."""
        return self._carried("factors", self.factors, of, count)

    def temperatures(self, of: Of, count: int) -> Tensor | None:
        """Likewise."""
        tau = self.weights.temperatures
        return None if tau is None else self._carried("temperatures", tau, of, count)

    def _carried(self, name: str, values: Tensor, of: Of, count: int) -> Tensor:
        if isinstance(of, Tensor):
            return carried(self.batch, values, of, count)
        if (name, of, count) not in self._known:  # asked for in every chunk
            self._known[name, of, count] = carried(self.batch, values, of, count)
        return self._known[name, of, count]

    def local_counts(self) -> dict[Reduction, Tensor]:
        """This micro-batch's own share of the denominators: like its counts, each thing with its weight."""
        batch, w = self.batch, self.weights.values.double()
        student, teacher = batch.student, batch.teacher
        assert student is not None
        present = torch.zeros(student.sequences, dtype=torch.bool, device=w.device)
        present[student.sample] = True
        found: dict[Reduction, Tensor] = {
            "tokens": w.sum(),
            "pairs": carried(batch, w, "pairs", 0).sum(),
            "sequences": carried(batch, w, "sequences", student.sequences)[present].sum(),
        }
        if teacher is not None:
            spans = torch.arange(1 + int(torch.cat([student.span, student.span.new_full((1,), -1)]).max()))
            held = torch.isin(spans.to(w.device), student.span) & torch.isin(spans.to(w.device), teacher.span)
            found["spans"] = carried(batch, w, "spans", len(spans))[held].sum()
            found["teacher_tokens"] = carried(batch, w, "teacher_tokens", len(teacher)).sum()
        else:
            found["spans"] = found["teacher_tokens"] = w.new_zeros(())
        return found


Gathered = Callable[[Tensor], Tensor]
"""From this rank's values [n] to those of all ranks, in the order of ranks."""

Summed = Callable[[Mapping[str, Tensor]], Mapping[str, float]]
"""Scalars, added up over ranks."""


def alone(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The `Summed` of a single process."""
    return {name: float(value) for name, value in values.items()}


@torch.no_grad()
def weigh_step(
    terms: Sequence[LossTerm],
    batches: Sequence[Batch],
    facts: Sequence[Facts],
    gathered: Gathered = lambda values: values,
    summed: Summed = alone,
) -> list[dict[str, Weighed]]:
    """For every micro-batch of an optimizer step, by term: what its tokens weigh, with denominators of the whole step.

    `batches` hold the global counts; `facts` are those of each. Every rank comes here with as many micro-batches.
    """
    found: list[dict[str, Weighed]] = [{} for _ in batches]
    for term in terms:
        if term.weights is None:
            continue
        seen = [_seen(term, batch, known) for batch, known in zip(batches, facts, strict=True)]
        try:
            seen = _scored(term.weights, seen, gathered)
            made = [term.weights.weigh(tokens) for tokens in seen]
        except KdzooError as error:  # what the weights read is not what they declare
            raise KdzooError(f"losses.{term.name}.weights: {error}") from error
        weights = [_valid(term, each, len(tokens)) for each, tokens in zip(made, seen, strict=True)]
        weighed = [Weighed(batch, each) for batch, each in zip(batches, weights, strict=True)]
        by_weights = term.weights.params.divide_by == "weights"
        counts = _counts(weighed, summed) if by_weights else [batch.counts for batch in batches]
        for place, one, total in zip(found, weighed, counts, strict=True):
            place[term.name] = replace(one, counts=total)
    return found


def _scored(weights: TokenWeights, seen: list[WeighedTokens], gathered: Gathered) -> list[WeighedTokens]:
    """The same with the scores of the whole step, where these weights compare tokens."""
    scores = [score for score in map(weights.score, seen) if score is not None]
    if not scores:
        return seen
    of_step = gathered(torch.cat(scores))
    return [replace(tokens, scores=score, scores_of_step=of_step) for tokens, score in zip(seen, scores, strict=True)]


def _counts(weighed: Sequence[Weighed], summed: Summed) -> list[Mapping[Reduction, float]]:
    """The denominators, for every micro-batch the same."""
    local = [one.local_counts() for one in weighed]
    totals: dict[Reduction, Tensor] = {per: torch.stack([counts[per] for counts in local]).sum() for per in local[0]}
    found = summed({str(per): total for per, total in totals.items()})
    return [{per: found[per] for per in totals}] * len(weighed)


def _seen(term: LossTerm, batch: Batch, facts: Facts) -> WeighedTokens:
    assert batch.student is not None, "token weights are of the student's tokens"
    columns = {name: batch.columns[name] for name in term.weight_needs.columns}
    return WeighedTokens(batch.student, facts.get(term.name, {}), columns)


def _valid(term: LossTerm, weights: Weights, count: int) -> Weights:
    """In at least float32."""
    if not isinstance(weights, Weights):
        raise KdzooError(
            f"losses.{term.name}.weights: 'weigh' of '{term.weights.name}' returns a {type(weights).__name__}; return "
            "Weights(values)"
        )
    for what, found in {"weights": weights.values, "temperatures": weights.temperatures}.items():
        if found is not None and found.shape != (count,):
            raise KdzooError(
                f"losses.{term.name}.weights: the {what} are {list(found.shape)}, of {count} tokens; return one for "
                "each"
            )
    tau = weights.temperatures
    values = weights.values if weights.values.is_floating_point() else weights.values.float()
    return Weights(ops.widened(values), None if tau is None else ops.widened(tau))


def refuse_invalid(weighed: Sequence[Mapping[str, Weighed]], summed: Summed = alone) -> None:
    """End the step, on every rank, where some weight is no number of at least 0, or some temperature none above 0.

    Such numbers would train on in silence.
    """
    counts: dict[str, Tensor] = {}
    for name in weighed[0] if weighed else ():
        ours = [one[name].weights for one in weighed]
        values = torch.cat([one.values for one in ours])
        wrong = ~(values.isfinite() & (values >= 0))
        counts[f"losses.{name}.weights: {{}} of them are negative or not finite; each is at least 0"] = wrong.sum()
        temperatures = [one.temperatures for one in ours if one.temperatures is not None]
        tau = torch.cat(temperatures) if temperatures else values.new_ones(0)
        told = f"losses.{name}.weights: {{}} of their temperatures are not above 0 or not finite; each divides logits"
        counts[told] = (~(tau.isfinite() & (tau > 0))).sum()
    for told, count in summed(counts).items():
        if count:
            raise KdzooError(told.format(int(count)))


def weighed_sums(term: str, terms: Terms, factors: Callable[[Term], Tensor]) -> Sums:
    """Every term's values times their factors, as one number."""
    found: dict[str, tuple[Tensor, Reduction]] = {}
    for name, one in terms.values.items():
        if not one.value.dim():
            raise KdzooError(
                f"losses.{term}.weights: the term '{name}' is a sum, whose tokens cannot be weighed; take 'weights' "
                "away, or hand back values of tokens"
            )
        values, each = one.value.flatten(), factors(one)
        if len(values) != len(each):
            raise KdzooError(
                f"losses.{term}.weights: the term '{name}' has {len(values)} values, for {len(each)} weights; hand "
                "back values of tokens, and say in 'of' where they are of something else"
            )
        found[name] = ((values * each.to(values.dtype)).sum(), one.per)
    return found
