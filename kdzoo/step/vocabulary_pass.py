"""One pass over the vocabulary, however many losses are composed.

Each head is applied once to every token of every stream, in chunks of tokens sized by bytes, so that memory depends on
the chunk and never on tokens x vocabulary. Where a visit is a plain sum over tokens, its weight and denominator are
known before the pass: the gradient of the logits is made on the spot, turned into gradients of states and head, and the
logits are gone. What is not a plain sum (visits of kind "tokens") is recomputed chunk by chunk in the backward pass.

The order of the walks is in `plan`, what makes a chunk in `chunks`, and what becomes of gradients in `gradients`. No
collective runs inside a loop over chunks: ranks have different numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo.api.batch import Side
from kdzoo.api.chunk import Index, Logits
from kdzoo.api.loss import Stream
from kdzoo.api.models import Role
from kdzoo.api.ops import at_least_float32, mean_by
from kdzoo.api.terms import Terms
from kdzoo.errors import KdzooError, did_you_mean
from kdzoo.step.chunks import (
    CHUNK_BYTES,
    GROUPS,
    Chunk,
    Cut,
    Groups,
    Tile,
    as_slice,
    chunk_tokens,
    pairs_and_others,
    side_by_side,
    tiles,
)
from kdzoo.step.facts import facts_of, predictions
from kdzoo.step.gradients import Gradients, HeadInput, PrecomputedGradient, Recomputed
from kdzoo.step.inputs import PassInputs
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.plan import (
    MODELS,
    Fact,
    Sight,
    Walk,
    own_name,
    scans,
    sight,
    streams_of,
    walks_of_models,
    walks_of_packings,
)
from kdzoo.step.report import Sums, weighted_sum
from kdzoo.step.weighing import TOKENS_OF, weighed_sums

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes parameters whole for the time of a `with` block, on every rank together."""

Facts = dict[Fact, Tensor]
"""One value per teacher token."""

Shared = dict[str, dict[float, Tensor]]
"""Stream -> temperature -> log-softmax, of one tile."""


def already_whole(_parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """The `Gather` of plain torch, where nothing is partitioned."""
    return nullcontext()


class VocabularyPass(nn.Module):
    """The pass, as a module of its own so that a partitioned head can be registered as a parameter it uses."""

    def __init__(
        self, terms: Sequence[LossTerm], gather: Gather = already_whole, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.gather = gather
        self.chunk_bytes = chunk_bytes

    def forward(self, hidden: Tensor, *, inputs: PassInputs) -> tuple[Tensor, ...]:
        """The loss of all plain sums, then the per-token tensors that `inputs.value_names` lists.

        `hidden` is the student's last state [N, S], or the teacher's where only the teacher runs: given by itself so
        that hooks which follow tensors from module to module see it.
        """
        run = _Run(self, hidden, inputs)
        with self.gather(inputs.heads["teacher"].parameters if "teacher" in inputs.heads else []):
            run.all_walks()
        return (run.loss(), *run.token_values())


@dataclass(frozen=True)
class _Leaves:
    """What the gradient of one tile is taken for, by stream."""

    products: dict[str, Tensor]
    biases: dict[str, Tensor]


class _Run:
    """One run of the pass over one micro-batch."""

    def __init__(self, owner: VocabularyPass, hidden: Tensor, inputs: PassInputs) -> None:
        self.owner = owner
        self.inputs = inputs
        self.terms = {term.name: term for term in owner.terms}
        self.head_learns = "student" in inputs.heads and inputs.heads["student"].weight.requires_grad
        self.streams = self._streams_of_models(hidden)
        self.total = hidden.new_zeros((), dtype=at_least_float32(hidden.dtype))
        self.gradients = Gradients(self.streams, inputs.heads)
        self.facts: Facts = {}
        self._carried: dict[str, Mapping[str, Tensor]] = {}
        self._scanned: dict[str, Mapping[str, Tensor]] = {}
        self._groups: dict[frozenset[str], Groups] = {}
        self._values: dict[tuple[str, str], list[tuple[Index, Tensor]]] = {}
        self._length_of_value: dict[tuple[str, str], int] = {}
        self._again: list[tuple[Chunk, list[Sight]]] = []
        inputs.steps.update({name: inputs.step(term) for name, term in self.terms.items()})

    def _streams_of_models(self, hidden: Tensor) -> dict[str, HeadInput]:
        batch, streams = self.inputs.batch, dict[str, HeadInput]()
        if batch.student is not None:
            streams["student"] = HeadInput(hidden, batch.student.labels, "student", "student", self.head_learns)
            if batch.teacher is not None:
                states = self.inputs.teacher["hidden.last"]
                streams["teacher"] = HeadInput(states, batch.teacher.labels, "teacher", "teacher", False)
        elif batch.teacher is not None:
            streams["teacher"] = HeadInput(hidden, batch.teacher.labels, "teacher", "teacher", False)
        if batch.teacher is not None:
            for term in self.owner.terms:
                if term.teacher_stream != "teacher":
                    states, labels = self.inputs.teacher[term.prediction], batch.teacher.labels
                    streams[term.teacher_stream] = HeadInput(states, labels, "teacher", "teacher", False)
        return streams

    # The walks, in order.

    def all_walks(self) -> None:
        for term in self.owner.terms:
            self._add_streams(term, term.loss.streams(self.inputs.with_views(term, heads=True)))
        sights = [one for term in self.owner.terms for one in self._sights(term)]
        wanted = frozenset((term.teacher_stream, fact) for term in self.owner.terms for fact in term.needs.facts)
        models = frozenset({"student", "teacher"} & self.streams.keys())
        self._scan(scans(sights))
        for walk in walks_of_models(sights, wanted, models, self.inputs.batch.same_tokens):
            self._walk(walk)
            self._carry_facts()
        for term in self.owner.terms:
            late = term.loss.streams_after_facts(self.inputs.with_views(term, heads=True))
            assert all(stream.beside is None for stream in late.values()), f"streams of '{term.name}' after facts"
            self._add_streams(term, late)
            self._refuse_missing_streams(term)
            for walk in walks_of_packings(self._sights(term), self._grouped()):
                self._walk(walk)

    def _add_streams(self, term: LossTerm, given: Mapping[str, Stream]) -> None:
        step = self.inputs.steps[term.name]
        step.streams = {**step.streams, **given}
        for own, stream in given.items():
            name = own_name(term.name, own)
            axis = name if stream.beside is None else stream.beside
            labels = stream.labels if stream.beside is None else self.streams[axis].labels
            assert labels is not None, f"the stream '{name}' stands beside no model and brings no labels"
            count = len(stream.hidden)
            assert len(labels) == count, f"the stream '{name}' has {count} tokens, not {len(labels)}"
            assert stream.group is None or stream.beside is None, f"the stream '{name}' stands beside a model"
            values = {key: value.detach() for key, value in stream.values.items()}
            learns = stream.learns_head and self.head_learns
            self.streams[name] = HeadInput(
                stream.hidden, labels, axis, stream.head, learns, stream.group, values, stream.tokens
            )

    def _sights(self, term: LossTerm) -> list[Sight]:
        training = torch.is_grad_enabled()
        axes = {name: stream.axis for name, stream in self.streams.items()}
        models = {"student": "student", "teacher": term.teacher_stream}
        found = (
            sight(term.name, visit, models, axes, self._grouped())
            for visit in term.visits
            if not (visit.measured_only and training)
        )
        return [one for one in found if one is not None]

    def _refuse_missing_streams(self, term: LossTerm) -> None:
        """What a visit names must be there: a misspelt stream would take the visit with it, in silence."""
        made = self.inputs.steps[term.name].streams
        for visit in term.visits:
            missing = [name for name in visit.streams if name not in MODELS and name not in made]
            if missing and not visit.of_each:
                raise KdzooError(
                    f"{term.name}: the visit '{visit.name}' sees a stream '{missing[0]}' that 'streams' does not make"
                    f"{did_you_mean(missing[0], {*MODELS, *made})}"
                )

    def _grouped(self) -> set[str]:
        return {name for name, stream in self.streams.items() if stream.group is not None}

    def _carry_facts(self) -> None:
        """The facts as each loss will see them: on student tokens where there is a student."""
        batch = self.inputs.batch
        for term in self.owner.terms:
            if term.name in self._carried or not (self.facts and term.needs.facts):
                continue
            own = {fact: self.facts[term.teacher_stream, fact] for fact in sorted(term.needs.facts)}
            if batch.student is not None and not batch.same_tokens:
                step = self.inputs.with_views(term)
                own = dict(term.loss.carry_facts(replace(step, facts=own, student_ranks_first=self._ranks_first)))
            self._carried[term.name] = self.inputs.steps[term.name].facts = own

    def _ranks_first(self, states: Tensor, labels: Tensor) -> Tensor:
        head = self.inputs.heads["student"]
        return predictions(states.detach(), head, labels, self.owner.chunk_bytes)["teacher.correct"]

    # Which tokens go together.

    def _length(self, axis: str) -> int:
        return next((len(s.labels) for s in self.streams.values() if s.axis == axis), 0)

    def _cut(self, walk: Walk) -> Cut:
        if walk.together == "pairs":
            lengths = {axis: self._length(axis) for axis in walk.axes}
            return pairs_and_others(self.inputs.batch.pairs, lengths, walk.leftovers)
        if walk.together == "tokens":
            return side_by_side(walk.axes, self._length(walk.axes[0]))
        streams = {}
        for axis in walk.axes:  # which is the stream's name
            stream = self.streams[axis]
            assert stream.group is not None
            streams[axis] = (stream.group, self._width(stream))
        groups = self._groups[frozenset(walk.axes)] = Groups(streams)
        return groups.whole

    def _width(self, stream: HeadInput) -> int:
        return self.inputs.heads[stream.head].rows.shape[0]

    def _chunk_size(self, names: Sequence[str]) -> int:
        return chunk_tokens(self.owner.chunk_bytes, sum(self._width(self.streams[name]) for name in names))

    # The walks before all others.

    @torch.no_grad()
    def _scan(self, walks: Sequence[Walk]) -> None:
        """What losses want to know of whole sequences before they see a token for good."""
        sums: dict[str, dict[str, Tensor]] = {}
        for walk in walks:
            (axis,) = walk.axes
            side, names = self._side(axis), streams_of(walk)
            assert side is not None
            for chunk in self._cut(walk)(self._chunk_size(names)):
                products = self._products(chunk, names)
                for tile in tiles(chunk, products, None):
                    _, logits = self._logits(tile, names, products)
                    shared: Shared = {}
                    sample = side.sample[tile.chunk[axis]]
                    for one in walk.sights:
                        into = sums.setdefault(one.term, {})
                        for name, value in self._per_token(
                            one, self._show(one, tile.chunk, logits, {}, shared)
                        ).items():
                            key = f"{one.visit.name}.{name}"
                            if key not in into:
                                into[key] = value.new_zeros((side.sequences, *value.shape[1:]))
                            into[key].index_add_(0, sample, value)
        for name in (name for name in self.terms if name in sums):
            self._scanned[name] = self.terms[name].loss.scan(replace(self.inputs.steps[name], sums=sums[name]))

    # One walk: chunk after chunk.

    def _walk(self, walk: Walk) -> None:
        names = streams_of(walk)
        if not names:
            return
        facts = [self._chunk(chunk, names, walk) for chunk in self._cut(walk)(self._chunk_size(names))]
        if walk.facts:
            self.facts = {name: torch.cat([part[name] for part in facts]) for name in sorted(walk.facts)}

    def _chunk(self, chunk: Chunk, names: Sequence[str], walk: Walk) -> Facts:
        # Tokens that no pair holds have no partner: what only visits of pairs see is not made for them.
        looked_at = {name for one in walk.sights if one.axes <= chunk.keys() for name in one.streams.values()}
        looked_at |= {stream for stream, _ in walk.facts}
        names = [name for name in names if name in looked_at and self.streams[name].axis in chunk]
        if not names:
            return {}
        products = self._products(chunk, names)
        received: set[str] = set()
        groups = self._groups[frozenset(chunk) - {GROUPS}] if GROUPS in chunk else None
        facts = [self._tile(tile, names, products, walk, received) for tile in tiles(chunk, products, groups)]
        for name in sorted(received):  # not in a set's order, which differs from run to run
            self.gradients.add(name, chunk[self.streams[name].axis], products[name])
        return {name: torch.cat([part[name] for part in facts]) for name in facts[0]}

    def _tile(
        self, tile: Tile, names: Sequence[str], products: Mapping[str, Tensor], walk: Walk, received: set[str]
    ) -> Facts:
        """Every loss on one tile; the gradients of its logits replace its products, and `received` says whose."""
        leaves, logits = self._logits(tile, names, products)
        shared: Shared = {}
        facts = self._facts_of_tile(tile, logits, walk.facts, shared)
        sums: list[Tensor] = []
        again: list[Sight] = []
        # Plain sums first: a softmax that they share with values of tokens must be made where gradients are.
        for one in sorted(walk.sights, key=lambda one: one.visit.kind == "tokens"):
            if not one.axes <= tile.chunk.keys():
                continue
            seen = self._show(one, tile.chunk, logits, facts, shared)
            if one.visit.kind == "sum":
                value = self._weighted(one, tile.chunk, seen)
                if value is not None:
                    sums.append(value)
                    if self.inputs.apart:
                        self._keep_apart(one, tile.chunk, leaves, [value], [None], 1.0)
            else:
                with torch.no_grad():
                    self._keep_values(one, tile.chunk, self._per_token(one, seen))
                if any(self.streams[name].trains for name in one.streams.values()):
                    again.append(one)
        value = torch.stack(sums).sum() if sums else torch.zeros_like(self.total)
        self.total += value.detach()
        if value.requires_grad:
            received |= self._replace(tile, leaves, products, [value], [None], self.gradients)
        else:  # other tiles may have gradients
            for name in leaves.products:
                products[name][tile.part[self.streams[name].axis]] = 0
        if again and torch.is_grad_enabled():
            self._again.append((tile.chunk, again))
        return facts

    def _facts_of_tile(
        self, tile: Tile, logits: Mapping[str, Tensor], wanted: frozenset[Fact], shared: Shared
    ) -> Facts:
        facts: Facts = {}
        for name in sorted({stream for stream, _ in wanted} & logits.keys()):
            seen = Logits(name, logits[name], self._labels(name, tile.chunk), shared.setdefault(name, {}))
            asked = frozenset(fact for stream, fact in wanted if stream == name)
            with torch.no_grad():
                found = facts_of(seen.logits, seen.labels, asked, seen.logprobs)
            facts |= {(name, fact): value for fact, value in found.items()}
        return facts

    def _weighted(self, one: Sight, chunk: Chunk, seen: Mapping[str, Logits]) -> Tensor | None:
        """The visit's share of the loss."""
        terms = one.visit.of(self.terms[one.term].loss, seen)
        assert isinstance(terms, Terms), f"the visit '{one.whole_name}' is a sum and returns Terms"
        counts = self.inputs.counts(one.term)
        sums: Sums = terms.sums
        if one.term in self.inputs.weighed:
            sums = weighed_sums(one.term, terms, lambda term: self._factors(one, chunk, len(term.value)))
        self.inputs.report.take(one.term, sums, terms.watched, counts)
        return weighted_sum(sums, self.inputs.weights[one.term], counts)

    def _factors(self, one: Sight, chunk: Chunk, count: int) -> Tensor:
        """What each of the visit's values in this chunk is multiplied by [count]."""
        weighed = self.inputs.weighed[one.term]
        if one.axes <= MODELS:
            axis = "student" if "student" in one.axes else "teacher"
            return weighed.on(TOKENS_OF[axis], self._length(axis))[chunk[axis]]
        stream = self._telling_tokens(one)
        if stream is None or stream.tokens is None:
            raise KdzooError(
                f"losses.{one.term}.weights: the visit '{one.visit.name}' sees packings that do not say which tokens "
                "they stand for; say it in 'Stream.tokens', or take 'weights' away"
            )
        at, groups = chunk[stream.axis], as_slice(chunk.get(GROUPS, slice(0, 0)))
        factors = weighed.factors[stream.tokens[at]]
        if stream.group is None or count != groups.stop - groups.start:
            return factors
        return mean_by(factors, stream.group[at] - groups.start, count, otherwise=1.0)

    def _per_token(self, one: Sight, seen: Mapping[str, Logits]) -> Mapping[str, Tensor]:
        values = one.visit.of(self.terms[one.term].loss, seen)
        assert not isinstance(values, Terms), f"the visit '{one.whole_name}' returns per-token tensors"
        return values

    def _labels(self, name: str, chunk: Chunk) -> Tensor:
        stream = self.streams[name]
        return stream.labels[chunk[stream.axis]]

    def _products(self, chunk: Chunk, names: Sequence[str]) -> dict[str, Tensor]:
        """The chunk's states times their heads, [n, V] in the model's dtype."""
        products = {}
        with torch.no_grad():
            for name in names:
                stream = self.streams[name]
                products[name] = stream.hidden[chunk[stream.axis]] @ self.inputs.heads[stream.head].rows.t()
        return products

    def _logits(
        self, tile: Tile, names: Sequence[str], products: Mapping[str, Tensor]
    ) -> tuple[_Leaves, dict[str, Tensor]]:
        """The tile's products as leaves of a graph of its own, likewise the biases, and its logits."""
        leaves = _Leaves({}, {})
        logits: dict[str, Tensor] = {}
        for name in names:
            stream = self.streams[name]
            head = self.inputs.heads[stream.head]
            product = products[name][tile.part[stream.axis]].detach()
            bias = None if head.biases is None else head.biases.detach()
            if stream.trains:
                leaves.products[name] = product.requires_grad_()
                if bias is not None and stream.learns_head:
                    leaves.biases[name] = bias = bias.requires_grad_()
            logits[name] = head.finish(product, bias)
        return leaves, logits

    def _show(
        self, one: Sight, chunk: Chunk, logits: Mapping[str, Tensor], facts: Facts, shared: Shared
    ) -> dict[str, Logits]:
        """What the visit sees, by what the loss calls it."""
        groups = as_slice(chunk.get(GROUPS, slice(0, 0)))
        seen = {}
        for local, name in one.streams.items():
            stream = self.streams[name]
            at = chunk[stream.axis]
            own, softmaxes = logits[name], name
            tau = self._temperatures(one, stream, at)
            if tau is not None:  # which is the term's own: so are the softmaxes
                own, softmaxes = own / tau.to(own.dtype)[:, None], f"{name}, tempered by {one.term}"
            seen[local] = Logits(
                local,
                own,
                self._labels(name, chunk),
                shared.setdefault(softmaxes, {}),
                self._known(self.terms[one.term], stream.axis, at, facts),
                {key: value[at] for key, value in stream.values.items()},
                self._scanned.get(one.term, {}),
                self._side(stream.axis),
                at,
                None if stream.group is None else stream.group[at] - groups.start,
                groups.stop - groups.start,
            )
        return seen

    def _telling_tokens(self, one: Sight) -> HeadInput | None:
        """Of the packings that are seen side by side, the one that says which tokens it stands for."""
        return next((s for s in map(self.streams.__getitem__, one.streams.values()) if s.tokens is not None), None)

    def _temperatures(self, one: Sight, stream: HeadInput, at: Index) -> Tensor | None:
        """What the term's token weights divide these logits by [n]: those of a group by the mean of its tokens'."""
        weighed = self.inputs.weighed.get(one.term)
        if weighed is None or weighed.weights.temperatures is None:
            return None
        if stream.axis in MODELS:
            whole = weighed.temperatures(TOKENS_OF[stream.axis], self._length(stream.axis))
            return None if whole is None else whole[at]
        if stream.tokens is not None:
            return weighed.weights.temperatures[stream.tokens[at]]
        told = self._telling_tokens(one)
        if told is None or told.tokens is None or told.group is None or stream.group is None:
            raise KdzooError(
                f"losses.{one.term}.weights: a packing does not say which tokens it stands for, whose temperatures "
                "differ; say it in 'Stream.tokens', or take weights without temperatures"
            )
        groups = int(stream.group[-1]) + 1 if len(stream.group) else 0
        return mean_by(weighed.weights.temperatures[told.tokens], told.group, groups, otherwise=1.0)[stream.group[at]]

    def _known(self, term: LossTerm, axis: str, at: Index, facts: Facts) -> dict[str, Tensor]:
        """The facts that the term declares, on these tokens of a model; `facts` are those of the tile."""
        if axis not in ("student", "teacher"):
            return {}
        if axis == "student" and not self.inputs.batch.same_tokens:
            carried = self._carried.get(term.name, {})
            return {name: carried[name][at] for name in term.needs.facts & carried.keys()}
        here = {name: (term.teacher_stream, name) for name in term.needs.facts}
        return {
            name: facts[key] if key in facts else self.facts[key][at]
            for name, key in here.items()
            if key in facts or key in self.facts
        }

    def _side(self, axis: str) -> Side | None:
        return {"student": self.inputs.batch.student, "teacher": self.inputs.batch.teacher}.get(axis)

    def _keep_apart(
        self,
        one: Sight,
        chunk: Chunk,
        leaves: _Leaves,
        outputs: list[Tensor],
        output_gradients: list[Tensor | None],
        scale: Tensor | float,
    ) -> None:
        """One term's gradient at the student's own tokens. (Its own streams reach the state through its view.)"""
        if "student" not in leaves.products or not any(output.requires_grad for output in outputs):
            return
        product = leaves.products["student"]
        (found,) = torch.autograd.grad(outputs, [product], output_gradients, retain_graph=True, allow_unused=True)
        if found is not None:
            gradient = self.inputs.report.gradient_of(one.term, self.streams["student"].hidden)
            gradient[chunk["student"]] += found @ self.inputs.heads["student"].rows.detach() / scale

    def _replace(
        self,
        tile: Tile,
        leaves: _Leaves,
        products: Mapping[str, Tensor],
        outputs: list[Tensor],
        output_gradients: list[Tensor | None],
        into: Gradients,
    ) -> set[str]:
        """Write the logits' gradients over the tile's products, which nobody needs any more; whose they are."""
        inputs = [*leaves.products.values(), *leaves.biases.values()]
        found = torch.autograd.grad(outputs, inputs, output_gradients, allow_unused=True)
        received = set()
        for name, gradient in zip(leaves.products, found, strict=False):
            part = tile.part[self.streams[name].axis]
            if gradient is not None:
                products[name][part] = gradient
                received.add(name)
            else:
                products[name][part] = 0
        for name, gradient in zip(leaves.biases, found[len(leaves.products) :], strict=True):
            if gradient is not None:
                into.add_bias(self.streams[name].head, gradient)
        return received

    # What leaves the pass.

    def leaves(self) -> tuple[list[str], list[Role], list[Tensor]]:
        """Streams and heads that may receive gradients, and their tensors in that order."""
        streams = [name for name, stream in self.streams.items() if stream.hidden.requires_grad]
        heads = sorted({stream.head for stream in self.streams.values() if stream.learns_head})
        tensors = [self.streams[name].hidden for name in streams]
        return streams, heads, [*tensors, *(p for name in heads for p in self.inputs.heads[name].parameters)]

    def loss(self) -> Tensor:
        streams, heads, tensors = self.leaves()
        if not tensors or not torch.is_grad_enabled():
            return self.total
        return PrecomputedGradient.apply(self.total, self.gradients.of(streams, heads), *tensors)

    def _keep_values(self, one: Sight, chunk: Chunk, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            key = (one.term, f"{one.visit.name}.{name}")
            # Values of pairs keep the order of the pairs; those of one axis stand where their tokens stand.
            paired = len(one.axes) == 2 and not self.inputs.batch.same_tokens
            first = min(one.axes)
            start = sum(len(v) for _, v in self._values.get(key, []))
            index: Index = slice(start, start + len(value)) if paired else chunk[first]
            # A copy: a part of the logits would hold them in memory, and be overwritten by their gradient.
            self._values.setdefault(key, []).append((index, value.clone()))
            self._length_of_value[key] = len(self.inputs.batch.pairs) if paired else self._length(first)

    def token_values(self) -> list[Tensor]:
        """What visits of kind "tokens" returned, with a backward pass that recomputes their chunks."""
        values: list[Tensor] = []
        for key, parts in self._values.items():
            whole = parts[0][1].new_zeros((self._length_of_value[key], *parts[0][1].shape[1:]))
            for index, value in parts:
                whole[index] = value
            values.append(whole)
            self.inputs.value_names.append(key)
        if not values or not torch.is_grad_enabled():
            return values
        return list(Recomputed.apply(self._recompute, len(values), *values, *self.leaves()[2]))

    def _recompute(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """The chunks of all visits of kind "tokens" once more, from the gradients of their values to the leaves'."""
        of_value = dict(zip(self._values, gradients, strict=True))
        into = Gradients(self.streams, self.inputs.heads)
        place = dict.fromkeys(of_value, 0)
        heads = self.inputs.heads
        with self.owner.gather(heads["teacher"].parameters if "teacher" in heads else []):
            for chunk, seen in self._again:
                names = sorted({name for one in seen for name in one.streams.values()})
                products = self._products(chunk, names)
                tile = Tile(dict.fromkeys(chunk, slice(None)), chunk)
                with torch.enable_grad():
                    leaves, logits = self._logits(tile, names, products)
                    shared: Shared = {}
                    outputs: list[Tensor] = []
                    output_gradients: list[Tensor | None] = []
                    for one in seen:
                        before = len(outputs)
                        for name, value in self._per_token(one, self._show(one, chunk, logits, {}, shared)).items():
                            key = (one.term, f"{one.visit.name}.{name}")
                            index = self._values[key][place[key]][0]
                            place[key] += 1
                            if value.requires_grad:
                                outputs.append(value)
                                output_gradients.append(of_value[key][index].to(value.dtype))
                        if self.inputs.apart:
                            scale = self.inputs.report.scale
                            self._keep_apart(one, chunk, leaves, outputs[before:], output_gradients[before:], scale)
                    if outputs:
                        for name in sorted(self._replace(tile, leaves, products, outputs, output_gradients, into)):
                            into.add(name, chunk[self.streams[name].axis], products[name])
        streams, learning, _ = self.leaves()
        return into.of(streams, learning)
