"""One pass over the vocabulary, however many losses are composed.

Each head is applied once to every row of every stream, in chunks of rows sized by bytes, so that memory depends on
the chunk and never on rows x vocabulary. Where a visit is a plain sum over rows, its weight and denominator are known
before the pass: the gradient of the logits is made on the spot, turned into gradients of states and head, and the
logits are gone. What is not a plain sum ("rows" visits) is recomputed chunk by chunk in the backward pass.

With one tokenizer, student and teacher rows go side by side and the teacher's facts are at hand in the chunk. With
two, the teacher's rows come first where somebody waits for their facts (rows that a loss also wants side by side with
the student's then meet the teacher's head a second time). Packings of a loss's own come last, when all facts are
known; those that bring groups go side by side, whole groups in every chunk. Losses that need to know a whole sequence
before its first row ("scan" visits) have a walk of their own before all that, one more product. No collective runs
inside a loop over chunks: ranks have different numbers of rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo.plugin.contracts import Loss, Needs, Visit
from kdzoo.step.batch import Batch, Side
from kdzoo.step.chunk import Chunk, Index, OwnRows
from kdzoo.step.facts import facts_of, judge
from kdzoo.step.head import HEAD_WEIGHT, Head
from kdzoo.step.report import Report, weighted_sum
from kdzoo.step.terms import Terms
from kdzoo.step.view import View

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes parameters whole for the time of a `with` block, on every rank together."""

CHUNK_BYTES = 64 * 2**20
"""Float32 logits of one chunk, all streams together: what one matrix product makes, and what memory depends on."""

CHUNK_ROWS = 128
"""Rows of one chunk at least, where `CHUNK_BYTES` would be less (a large vocabulary): every chunk reads and writes the
head's whole gradient once, which only pays for many rows."""

TILE_BYTES = 4 * 2**20
"""On a CPU, softmax and losses pass over the chunk in tiles of this size per stream, which stay in the cache."""


def already_whole(_parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """The `Gather` of plain torch, where nothing is partitioned."""
    return nullcontext()


@dataclass(frozen=True)
class Slot:
    """One term of the recipe: a loss under a name, with what it needs."""

    name: str
    loss: Loss
    needs: Needs
    state: str = "hidden.last"
    """The teacher's site that the loss reads as `hidden.last`: its own, or a fused one."""
    judge: str = "hidden.last"
    """The teacher's site whose logits are the teacher's prediction."""

    @property
    def teacher_sites(self) -> frozenset[str]:
        """All that the teacher must capture for this slot."""
        read = self.needs.teacher - {HEAD_WEIGHT}
        return frozenset({self.judge, *(self.stands_for(site) for site in read)})

    def stands_for(self, site: str) -> str:
        """The site that is behind one that the loss declares."""
        name, at, everywhere = site.partition("@")
        return f"{self.state}{at}{everywhere}" if name == "hidden.last" else site

    @property
    def judge_stream(self) -> str:
        return "teacher" if self.judge == "hidden.last" else f"teacher {self.judge}"

    def facts(self, training: bool) -> frozenset[str]:
        """The teacher's facts that it reads."""
        shown = (visit for visit in self.needs.visits if not (visit.report_only and training))
        return frozenset(self.needs.facts).union(*(visit.facts for visit in shown))

    @property
    def streams_wait(self) -> bool:
        """Whether its streams are made from facts, and so after the models' rows; else `combine` alone reads them."""
        axes = {stream.axis for stream in self.needs.streams}
        waits = bool(self.needs.facts) and "own" in axes
        assert not waits or axes == {"own"}, f"streams of '{self.name}' that wait for facts need an axis of their own"
        return waits


@dataclass
class Call:
    """Everything one micro-batch brings to the pass, and what the pass leaves for the losses to combine."""

    batch: Batch
    student: Mapping[str, Tensor]
    """Sites of the student."""
    teacher: Mapping[str, Tensor]
    """Sites of the teacher, without gradient."""
    heads: Mapping[str, Head]
    """"student" and "teacher", as far as the batch has them."""
    weights: Mapping[str, float]
    """Slot -> weight at this optimizer step."""
    report: Report
    apart: bool = False
    """Whether each slot's gradient at the student's last state is kept apart, in the report."""
    facts: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Slot -> the teacher's facts, on student rows where there is a student. Filled by the pass."""
    row_names: list[tuple[str, str]] = field(default_factory=list)
    """(slot, name) of every per-row tensor that the pass returns after the loss. Filled by the pass."""

    def views(self, slot: Slot, heads: bool = False) -> tuple[View, View]:
        """The slot's views; where one model is absent, its view holds no site. `heads`: whether they are whole."""
        student, teacher = self.batch.student, self.batch.teacher
        present = student if student is not None else teacher
        assert present is not None
        ours = self.student
        if self.apart and ours:
            heard = {"hidden.last": None, "hidden.last@all": None if student is None else student.rows}
            listen = self.report.listen
            ours = {**ours, **{site: listen(slot.name, ours[site], heard[site]) for site in heard.keys() & ours.keys()}}
        read = slot.needs.teacher - {HEAD_WEIGHT}
        theirs = {site: self.teacher[slot.stands_for(site)] for site in read} if self.teacher else {}
        if heads:
            whole = {name: {HEAD_WEIGHT: head.rows.detach()} for name, head in self.heads.items()}
            ours, theirs = {**ours, **whole.get("student", {})}, {**theirs, **whole.get("teacher", {})}
        return (
            View(present if student is None else student, ours, slot.name, slot.needs.student),
            View(present if teacher is None else teacher, theirs, slot.name, slot.needs.teacher),
        )


class VocabularyPass(nn.Module):
    """The pass, as a module of its own so that a partitioned head can be registered as a parameter it uses."""

    def __init__(self, slots: Sequence[Slot], gather: Gather = already_whole, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__()
        self.slots = tuple(slots)
        self.gather = gather
        self.chunk_bytes = chunk_bytes

    def chunk_rows(self, width: int) -> int:
        """Rows of a chunk whose streams have `width` logits together. An odd `chunk_bytes` (in tests) has no floor."""
        floor = CHUNK_ROWS if self.chunk_bytes >= CHUNK_BYTES else 1
        return max(floor, self.chunk_bytes // (4 * width))

    def forward(self, hidden: Tensor, *, call: Call) -> tuple[Tensor, ...]:
        """The loss of all plain sums, then the per-row tensors that `call.row_names` lists.

        `hidden` is the student's last state [N, S], or the teacher's where only the teacher runs: given by itself so
        that hooks which follow tensors from module to module see it.
        """
        walk = _Walk(self, hidden, call)
        with self.gather(call.heads["teacher"].parameters if "teacher" in call.heads else []):
            walk.run()
        return (walk.loss(), *walk.row_values())


@dataclass(frozen=True)
class _Stream:
    """Rows of hidden states on their way to a head."""

    hidden: Tensor  # [n, width]
    labels: Tensor  # [n]
    axis: str  # "student", "teacher", or the stream's own name
    head: str
    learns_head: bool
    group: Tensor | None = None  # [n]
    values: Mapping[str, Tensor] = field(default_factory=dict)  # [n, ...]

    @property
    def trains(self) -> bool:
        return torch.is_grad_enabled() and (self.learns_head or self.hidden.requires_grad)


@dataclass(frozen=True)
class _Seen:
    """One loss's visit, with its streams under their names in this pass."""

    slot: Slot
    visit: Visit
    streams: Mapping[str, str]


Rows = Mapping[str, Index]
"""One chunk: axis -> which of its rows. Rows of two axes in one chunk are pairs, or (with `GROUPS`) whole groups."""

GROUPS = "groups"
"""Where a chunk has whole groups: which. No axis has this name: those of own streams have a slash in theirs."""

Facts = dict[tuple[str, str], Tensor]
"""(stream that judges, fact) -> one value per teacher row."""


@dataclass(frozen=True)
class _Tile:
    """A part of a chunk: by axis, which of the chunk's rows, and which rows of the axis they are."""

    part: Mapping[str, slice]
    rows: Rows


class _Groups:
    """Where the groups of several packings begin, so that they can be cut between groups."""

    def __init__(self, streams: Mapping[str, tuple[Tensor, int]]) -> None:
        """`streams`: axis -> the group of each row [n], and how many logits a row has."""
        found = {axis: (group.cpu(), width) for axis, (group, width) in streams.items()}
        assert all((group[1:] >= group[:-1]).all() for group, _ in found.values()), "groups of rows must be ascending"
        self.count = 1 + max(int(group[-1]) if len(group) else -1 for group, _ in found.values())
        sizes = {axis: torch.bincount(group, minlength=self.count) for axis, (group, _) in found.items()}
        self.starts = {axis: [0, *size.cumsum(0).tolist()] for axis, size in sizes.items()}
        rows = [(self.starts[axis], width) for axis, (_, width) in found.items()]
        self._logits = [sum(starts[g] * width for starts, width in rows) for g in range(self.count + 1)]

    def cut(self, first: int, last: int, logits: int) -> Iterator[Rows]:
        """Groups `first` to `last` in parts of so many logits, or of one group; at least one part."""
        while True:
            fits = bisect_right(self._logits, self._logits[first] + logits, first, last + 1) - 1
            stop = min(max(fits, first + 1), last)
            parts: dict[str, Index] = {axis: slice(starts[first], starts[stop]) for axis, starts in self.starts.items()}
            yield parts | {GROUPS: slice(first, stop)}
            first = stop
            if first == last:
                return


@dataclass(frozen=True)
class _Leaves:
    """What the gradient of one tile is taken for, by stream."""

    products: dict[str, Tensor]
    biases: dict[str, Tensor]


class _Gradients:
    """Gradients of states and heads, summed over chunks; the head's in float32 whatever the model's dtype."""

    def __init__(self, streams: Mapping[str, _Stream], heads: Mapping[str, Head]) -> None:
        self._streams = streams
        self._heads = heads
        self.hidden: dict[str, Tensor] = {}
        self.weight: dict[str, Tensor] = {}
        self.bias: dict[str, Tensor] = {}

    def add(self, name: str, rows: Index, product: Tensor) -> None:
        """`product` [n, V]: the gradient of the stream's `rows` [n, width] times the head's transpose."""
        stream = self._streams[name]
        head = self._heads[stream.head]
        if stream.hidden.requires_grad:
            if name not in self.hidden:
                self.hidden[name] = torch.zeros_like(stream.hidden)
            # Added, not set: rows that a pair holds may have been walked alone before.
            self.hidden[name][rows] += product @ head.rows.detach()
        if stream.learns_head:
            states = stream.hidden.detach()[rows]
            if stream.head not in self.weight:
                self.weight[stream.head] = (product.t() @ states).to(_at_least_float32(head.weight.dtype))
            elif product.dtype == self.weight[stream.head].dtype:
                self.weight[stream.head].addmm_(product.t(), states)
            else:
                self.weight[stream.head].add_(product.t() @ states)

    def add_bias(self, head: str, gradient: Tensor) -> None:
        self.bias[head] = self.bias[head] + gradient if head in self.bias else gradient

    def of(self, streams: Iterable[str], heads: Iterable[str]) -> list[Tensor | None]:
        """In the order of `_Walk.leaves`: states, then weight and bias of each head."""
        found: list[Tensor | None] = [self.hidden.get(name) for name in streams]
        for name in heads:
            head = self._heads[name]
            weight = self.weight.get(name)
            found.append(None if weight is None else head.padded(weight.to(head.weight.dtype)))
            if head.bias is not None:
                bias = self.bias.get(name)
                found.append(None if bias is None else head.padded(bias.to(head.bias.dtype)))
        return found


class _Walk:
    """One run of the pass over one micro-batch."""

    def __init__(self, owner: VocabularyPass, hidden: Tensor, call: Call) -> None:
        self.owner = owner
        self.call = call
        self.streams: dict[str, _Stream] = {}
        batch = call.batch
        self.head_learns = "student" in call.heads and call.heads["student"].weight.requires_grad
        if batch.student is not None:
            self.streams["student"] = _Stream(hidden, batch.student.labels, "student", "student", self.head_learns)
            if batch.teacher is not None:
                states = call.teacher["hidden.last"]
                self.streams["teacher"] = _Stream(states, batch.teacher.labels, "teacher", "teacher", False)
        elif batch.teacher is not None:
            self.streams["teacher"] = _Stream(hidden, batch.teacher.labels, "teacher", "teacher", False)
        if batch.teacher is not None:
            for slot in owner.slots:
                if slot.judge_stream != "teacher":
                    states, labels = call.teacher[slot.judge], batch.teacher.labels
                    self.streams[slot.judge_stream] = _Stream(states, labels, "teacher", "teacher", False)
        self.total = hidden.new_zeros((), dtype=_at_least_float32(hidden.dtype))
        self.gradients = _Gradients(self.streams, call.heads)
        self.facts: Facts = {}
        self._scanned: dict[str, Mapping[str, Tensor]] = {}
        self._groups: dict[frozenset[str], _Groups] = {}
        self._values: dict[tuple[str, str], list[tuple[Index, Tensor]]] = {}
        self._length_of_value: dict[tuple[str, str], int] = {}
        self._again: list[tuple[Rows, list[_Seen]]] = []

    # The walks, in order.

    def run(self) -> None:
        slots = self.owner.slots
        training = torch.is_grad_enabled()
        wanted = frozenset((slot.judge_stream, fact) for slot in slots for fact in slot.facts(training))
        for slot in slots:
            if not slot.streams_wait:
                self._add_streams(slot, {})
        both_models = "student" in self.streams and "teacher" in self.streams
        seen = [seen for slot in slots for seen in self._model_visits(slot)]
        self._scan([s for s in seen if s.visit.kind == "scan"])
        seen = [s for s in seen if s.visit.kind != "scan"]
        if both_models and self.call.batch.same_tokens:
            self._walk(self._rows("student", "teacher"), seen, wanted)
        elif both_models and not wanted and any(self._axes(s) == {"student", "teacher"} for s in seen):
            self._walk(self._pairs_and_others(("student", "teacher")), seen, wanted)
        else:
            teacher_only = [s for s in seen if self._axes(s) == {"teacher"}]
            rest = [s for s in seen if self._axes(s) != {"teacher"}]
            self._walk(self._rows("teacher"), teacher_only, wanted)
            self._carry_facts(wanted)
            in_pairs = any("teacher" in self._axes(s) for s in rest)
            self._walk(self._pairs_and_others(("student",)) if in_pairs else self._rows("student"), rest, frozenset())
        self._carry_facts(wanted)
        for slot in slots:
            if slot.streams_wait:
                self._add_streams(slot, self.call.facts[slot.name])
            own: dict[tuple[str, ...], list[_Seen]] = {}
            for s in self._visits(slot):
                if not self._axes(s) <= {"student", "teacher"}:
                    own.setdefault(tuple(sorted(self._axes(s))), []).append(s)
            for axes, visits in own.items():
                grouped = all(self.streams[axis].group is not None for axis in axes)
                self._walk(self._whole_groups(axes) if grouped else self._rows(*axes), visits, frozenset())

    def _add_streams(self, slot: Slot, facts: Mapping[str, Tensor]) -> None:
        if not slot.needs.streams:
            return
        given = slot.loss.streams(self.call.batch, *self.call.views(slot, heads=True), facts)
        for spec in slot.needs.streams:
            own = given[spec.name]
            name = f"{slot.name}/{spec.name}"
            axis = name if spec.axis == "own" else spec.axis
            labels = own.labels if spec.axis == "own" else self.streams[spec.axis].labels
            assert labels is not None, f"the stream '{name}' has an axis of its own and brings no labels"
            assert len(labels) == len(own.hidden), f"the stream '{name}' has {len(own.hidden)} rows, not {len(labels)}"
            assert own.group is None or spec.axis == "own", f"the stream '{name}' has the rows of a model, not groups"
            values = {key: value.detach() for key, value in own.values.items()}
            learns = spec.learns_head and self.head_learns
            self.streams[name] = _Stream(own.hidden, labels, axis, spec.head, learns, own.group, values)

    def _visits(self, slot: Slot) -> Iterator[_Seen]:
        for visit in slot.needs.visits:
            if visit.report_only and torch.is_grad_enabled():
                continue
            models = {"student": "student", "teacher": slot.judge_stream}
            names = {name: models.get(name, f"{slot.name}/{name}") for name in visit.streams}
            if all(name in self.streams for name in names.values()):
                axes = {self.streams[name].axis for name in names.values()}
                groups = visit.kind == "sum" and all(self.streams[name].group is not None for name in names.values())
                assert len(axes) == 1 or axes <= {"student", "teacher"} or groups, (
                    f"the visit '{slot.name}.{visit.name}' puts rows of {sorted(axes)} side by side"
                )
                assert visit.kind != "scan" or (axes in ({"student"}, {"teacher"}) and not visit.facts), (
                    f"the scan '{slot.name}.{visit.name}' is of one model's rows, and before all facts"
                )
                yield _Seen(slot, visit, names)

    def _model_visits(self, slot: Slot) -> Iterator[_Seen]:
        return (seen for seen in self._visits(slot) if self._axes(seen) <= {"student", "teacher"})

    def _axes(self, seen: _Seen) -> set[str]:
        return {self.streams[name].axis for name in seen.streams.values()}

    def _carry_facts(self, wanted: frozenset[tuple[str, str]]) -> None:
        """The facts as each loss will see them: on student rows where there is a student."""
        batch = self.call.batch
        for slot in self.owner.slots:
            if slot.name in self.call.facts or not wanted or not self.facts:
                continue
            own = {fact: value for (stream, fact), value in self.facts.items() if stream == slot.judge_stream}
            if batch.student is not None and not batch.same_tokens:
                own = dict(slot.loss.carry_facts(batch, *self.call.views(slot), own, self._ranks_first))
            self.call.facts[slot.name] = own

    def _ranks_first(self, states: Tensor, labels: Tensor) -> Tensor:
        head = self.call.heads["student"]
        return judge(states.detach(), head, labels, self.owner.chunk_bytes)["teacher.correct"]

    # Which rows go together.

    def _length(self, axis: str) -> int:
        return next((len(s.labels) for s in self.streams.values() if s.axis == axis), 0)

    def _rows(self, *axes: str) -> Callable[[int], Iterator[Rows]]:
        """Rows of one axis, or of two whose rows are the same tokens."""
        length = self._length(axes[0])

        def cut(size: int) -> Iterator[Rows]:
            # One empty chunk where there is no row: every rank must report the same terms and train the same modules.
            for start in range(0, max(length, 1), size):
                yield {axis: slice(start, start + size) for axis in axes}

        return cut

    def _pairs_and_others(self, leftovers: Sequence[str]) -> Callable[[int], Iterator[Rows]]:
        """Aligned pairs side by side, then the rows of `leftovers` that no pair holds."""
        pairs = self.call.batch.pairs

        def cut(size: int) -> Iterator[Rows]:
            for part in pairs.split(size):
                yield {"student": part[:, 0], "teacher": part[:, 1]}
            for column, axis in enumerate(("student", "teacher")):
                if axis in leftovers:
                    alone = torch.ones(self._length(axis), dtype=torch.bool, device=pairs.device)
                    alone[pairs[:, column]] = False
                    for part in alone.nonzero().squeeze(-1).split(size):
                        yield {axis: part}

        return cut

    def _whole_groups(self, axes: tuple[str, ...]) -> Callable[[int], Iterator[Rows]]:
        """Rows of packings that bring groups: of all of them the same groups, and none in parts."""
        streams = {}
        for axis in axes:  # which is the stream's name
            stream = self.streams[axis]
            assert stream.group is not None
            streams[axis] = (stream.group, self.call.heads[stream.head].rows.shape[0])
        groups = self._groups[frozenset(axes)] = _Groups(streams)
        return lambda size: groups.cut(0, groups.count, size * sum(width for _, width in streams.values()))

    # The walk before all others.

    @torch.no_grad()
    def _scan(self, seen: list[_Seen]) -> None:
        """What losses want to know of whole sequences before they see a row for good."""
        sums: dict[str, dict[str, Tensor]] = {s.slot.name: {} for s in seen}
        for axis, side in (("student", self.call.batch.student), ("teacher", self.call.batch.teacher)):
            mine = [s for s in seen if self._axes(s) == {axis}]
            names = sorted({name for s in mine for name in s.streams.values()})
            if not names or side is None:
                continue
            width = sum(self.call.heads[self.streams[name].head].rows.shape[0] for name in names)
            for rows in self._rows(axis)(self.owner.chunk_rows(width)):
                products = self._products(rows, names)
                for tile in self._tiles(rows, products):
                    _, logits = self._logits(tile, names, products)
                    shared: dict[tuple[str, float], Tensor] = {}
                    sample = side.sample[tile.rows[axis]]
                    for s in mine:
                        for name, value in _per_row(s, self._show(s, tile.rows, logits, {}, shared)).items():
                            into = sums[s.slot.name]
                            key = f"{s.visit.name}.{name}"
                            if key not in into:
                                into[key] = value.new_zeros((side.sequences, *value.shape[1:]))
                            into[key].index_add_(0, sample, value)
        for slot in self.owner.slots:
            if slot.name in sums:
                self._scanned[slot.name] = slot.loss.scan(self.call.batch, sums[slot.name])

    # One walk: chunk after chunk.

    def _walk(
        self, cut: Callable[[int], Iterator[Rows]], seen: list[_Seen], wanted: frozenset[tuple[str, str]]
    ) -> None:
        names = {name for s in seen for name in s.streams.values()} | {stream for stream, _ in wanted}
        if not names:
            return
        width = sum(self.call.heads[self.streams[name].head].rows.shape[0] for name in names)
        size = self.owner.chunk_rows(width)
        facts: list[Facts] = []
        for rows in cut(size):
            facts.append(self._chunk(rows, sorted(names), seen, wanted))
        if wanted and not self.facts:
            self.facts = {name: torch.cat([part[name] for part in facts]) for name in sorted(wanted)}

    def _chunk(self, rows: Rows, names: list[str], seen: list[_Seen], wanted: frozenset[tuple[str, str]]) -> Facts:
        # Rows that no pair holds have no partner: what only visits of pairs see is not made for them.
        looked_at = {name for s in seen if self._axes(s) <= rows.keys() for name in s.streams.values()}
        looked_at |= {stream for stream, _ in wanted}
        names = [name for name in names if name in looked_at and self.streams[name].axis in rows]
        if not names:
            return {}
        products = self._products(rows, names)
        received: set[str] = set()
        facts: list[Facts] = []
        for tile in self._tiles(rows, products):
            facts.append(self._tile(tile, names, products, seen, wanted, received))
        for name in sorted(received):  # not in a set's order, which differs from run to run
            self.gradients.add(name, rows[self.streams[name].axis], products[name])
        return {name: torch.cat([part[name] for part in facts]) for name in facts[0]}

    def _tile(
        self,
        tile: _Tile,
        names: list[str],
        products: Mapping[str, Tensor],
        seen: list[_Seen],
        wanted: frozenset[tuple[str, str]],
        received: set[str],
    ) -> Facts:
        """Every loss on one tile; the gradients of its logits replace its products, and `received` says whose."""
        leaves, logits = self._logits(tile, names, products)
        shared: dict[tuple[str, float], Tensor] = {}
        facts: Facts = {}
        for name in {stream for stream, _ in wanted} & logits.keys():
            own = Chunk.of_one(name, logits[name], self._labels(name, tile.rows), shared)
            asked = frozenset(fact for stream, fact in wanted if stream == name)
            with torch.no_grad():
                found = facts_of(logits[name], own.labels(name), asked, partial(own.logprobs, name))
            facts |= {(name, fact): value for fact, value in found.items()}
        sums: list[Tensor] = []
        again: list[_Seen] = []
        # Plain sums first: a softmax that they share with values of rows must be made where gradients are.
        for s in sorted(seen, key=lambda s: s.visit.kind == "rows"):
            if not self._axes(s) <= tile.rows.keys():
                continue
            chunk = self._show(s, tile.rows, logits, facts, shared)
            if s.visit.kind == "sum":
                terms = s.slot.loss.over_vocab(s.visit.name, chunk)
                assert isinstance(terms, Terms), f"{s.slot.name}: the visit '{s.visit.name}' is a sum and returns Terms"
                value = weighted_sum(terms, self.call.weights[s.slot.name], self.call.batch.counts)
                self.call.report.take(s.slot.name, terms, self.call.batch.counts)
                if value is not None:
                    sums.append(value)
                    if self.call.apart:
                        self._keep_apart(s, tile.rows, leaves, [value], [None], 1.0)
            else:
                with torch.no_grad():
                    self._keep_values(s, tile.rows, _per_row(s, chunk))
                if any(self.streams[name].trains for name in s.streams.values()):
                    again.append(s)
        value = torch.stack(sums).sum() if sums else torch.zeros_like(self.total)
        self.total += value.detach()
        if value.requires_grad:
            received |= self._replace(tile, leaves, products, [value], [None], self.gradients)
        else:  # other tiles may have gradients
            for name in leaves.products:
                products[name][tile.part[self.streams[name].axis]] = 0
        if again and torch.is_grad_enabled():
            self._again.append((tile.rows, again))
        return facts

    def _tiles(self, rows: Rows, products: Mapping[str, Tensor]) -> Iterator[_Tile]:
        """The chunk in pieces that stay in the processor's cache while softmax and losses pass over them."""
        length = next(len(product) for product in products.values())
        width = max(product.shape[1] for product in products.values())
        on_cpu = next(iter(products.values())).device.type == "cpu"
        size = max(1, TILE_BYTES // (4 * width)) if on_cpu else max(1, length)
        if GROUPS in rows:
            groups, whole = self._groups[frozenset(rows) - {GROUPS}], _as_slice(rows[GROUPS])
            logits = sum(product.shape[1] * (size if on_cpu else len(product)) for product in products.values())
            for part in groups.cut(whole.start, whole.stop, logits):
                yield _Tile({axis: _within(rows[axis], part[axis]) for axis in groups.starts}, part)
            return
        for start in range(0, max(length, 1), size):
            here = slice(start, min(start + size, length))
            yield _Tile(dict.fromkeys(rows, here), {a: _part(i, start, size, length) for a, i in rows.items()})

    def _labels(self, name: str, rows: Rows) -> Tensor:
        stream = self.streams[name]
        return stream.labels[rows[stream.axis]]

    def _products(self, rows: Rows, names: Sequence[str]) -> dict[str, Tensor]:
        """The chunk's states times their heads, [n, V] in the model's dtype."""
        products = {}
        with torch.no_grad():
            for name in names:
                stream = self.streams[name]
                products[name] = stream.hidden[rows[stream.axis]] @ self.call.heads[stream.head].rows.t()
        return products

    def _logits(
        self, tile: _Tile, names: Sequence[str], products: Mapping[str, Tensor]
    ) -> tuple[_Leaves, dict[str, Tensor]]:
        """The tile's products as leaves of a graph of its own, likewise the biases, and its logits."""
        leaves = _Leaves({}, {})
        logits: dict[str, Tensor] = {}
        for name in names:
            stream = self.streams[name]
            head = self.call.heads[stream.head]
            product = products[name][tile.part[stream.axis]].detach()
            bias = None if head.biases is None else head.biases.detach()
            if stream.trains:
                leaves.products[name] = product.requires_grad_()
                if bias is not None and stream.learns_head:
                    leaves.biases[name] = bias = bias.requires_grad_()
            logits[name] = head.finish(product, bias)
        return leaves, logits

    def _show(self, seen: _Seen, rows: Rows, logits: Mapping[str, Tensor], facts: Facts, shared: dict) -> Chunk:
        if seen.visit.facts and "student" in self._axes(seen) and not self.call.batch.same_tokens:
            carried = self.call.facts[seen.slot.name]
            shown = {name: carried[name][rows["student"]] for name in seen.visit.facts}
        else:
            shown = {name: facts[seen.slot.judge_stream, name] for name in seen.visit.facts}
        own = {}
        for local, name in seen.streams.items():
            stream = self.streams[name]
            here = rows[stream.axis]
            group = stream.group[here] - _as_slice(rows[GROUPS]).start if stream.group is not None else None
            own[local] = OwnRows({key: value[here] for key, value in stream.values.items()}, group)
        groups = _as_slice(rows.get(GROUPS, slice(0, 0)))
        return Chunk(
            {local: logits[name] for local, name in seen.streams.items()},
            {local: self._labels(name, rows) for local, name in seen.streams.items()},
            shown,
            shared,
            seen.streams,
            self._places(seen, rows),
            self._scanned.get(seen.slot.name),
            own,
            groups.stop - groups.start,
        )

    def _places(self, seen: _Seen, rows: Rows) -> dict[str, tuple[Side, Index]]:
        """Where rows beside a model's stand in that model's tokens."""
        axes = {local: self.streams[name].axis for local, name in seen.streams.items()}
        sides = {"student": self.call.batch.student, "teacher": self.call.batch.teacher}
        return {local: (side, rows[axis]) for local, axis in axes.items() if (side := sides.get(axis)) is not None}

    def _keep_apart(
        self,
        seen: _Seen,
        rows: Rows,
        leaves: _Leaves,
        outputs: list[Tensor],
        output_gradients: list[Tensor | None],
        scale: Tensor | float,
    ) -> None:
        """One slot's gradient at the student's own rows. (Its own streams reach the state through its view.)"""
        if "student" not in leaves.products or not any(output.requires_grad for output in outputs):
            return
        product = leaves.products["student"]
        (found,) = torch.autograd.grad(outputs, [product], output_gradients, retain_graph=True, allow_unused=True)
        if found is not None:
            gradient = self.call.report.gradient_of(seen.slot.name, self.streams["student"].hidden)
            gradient[rows["student"]] += found @ self.call.heads["student"].rows.detach() / scale

    def _replace(
        self,
        tile: _Tile,
        leaves: _Leaves,
        products: Mapping[str, Tensor],
        outputs: list[Tensor],
        output_gradients: list[Tensor | None],
        into: _Gradients,
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

    def leaves(self) -> tuple[list[str], list[str], list[Tensor]]:
        """Streams and heads that may receive gradients, and their tensors in that order."""
        streams = [name for name, stream in self.streams.items() if stream.hidden.requires_grad]
        heads = sorted({stream.head for stream in self.streams.values() if stream.learns_head})
        tensors = [self.streams[name].hidden for name in streams]
        return streams, heads, [*tensors, *(p for name in heads for p in self.call.heads[name].parameters)]

    def loss(self) -> Tensor:
        streams, heads, tensors = self.leaves()
        if not tensors or not torch.is_grad_enabled():
            return self.total
        return _Deposit.apply(self.total, self.gradients.of(streams, heads), *tensors)

    def _keep_values(self, seen: _Seen, rows: Rows, values: Mapping[str, Tensor]) -> None:
        axes = self._axes(seen)
        for name, value in values.items():
            key = (seen.slot.name, f"{seen.visit.name}.{name}")
            # Values of pairs keep the order of the pairs; those of one axis stand where their rows stand.
            paired = len(axes) == 2 and not self.call.batch.same_tokens
            start = sum(len(v) for _, v in self._values.get(key, []))
            index: Index = slice(start, start + len(value)) if paired else rows[sorted(axes)[0]]
            length = len(self.call.batch.pairs) if paired else self._length(sorted(axes)[0])
            # A copy: a part of the logits would hold them in memory, and be overwritten by their gradient.
            self._values.setdefault(key, []).append((index, value.clone()))
            self._length_of_value[key] = length

    def row_values(self) -> list[Tensor]:
        """Per-row tensors of the "rows" visits, with a backward pass that recomputes their chunks."""
        values: list[Tensor] = []
        for key, parts in self._values.items():
            whole = parts[0][1].new_zeros((self._length_of_value[key], *parts[0][1].shape[1:]))
            for index, value in parts:
                whole[index] = value
            values.append(whole)
            self.call.row_names.append(key)
        if not values or not torch.is_grad_enabled():
            return values
        return list(_Recomputed.apply(self, len(values), *values, *self.leaves()[2]))

    def recompute(self, gradients: Mapping[tuple[str, str], Tensor]) -> list[Tensor | None]:
        """The chunks of all "rows" visits once more, from the gradients of their values to those of the leaves."""
        into = _Gradients(self.streams, self.call.heads)
        place = dict.fromkeys(gradients, 0)
        with self.owner.gather(self.call.heads["teacher"].parameters if "teacher" in self.call.heads else []):
            for rows, seen in self._again:
                names = sorted({name for s in seen for name in s.streams.values()})
                products = self._products(rows, names)
                tile = _Tile(dict.fromkeys(rows, slice(None)), rows)
                with torch.enable_grad():
                    leaves, logits = self._logits(tile, names, products)
                    shared: dict[tuple[str, float], Tensor] = {}
                    outputs: list[Tensor] = []
                    output_gradients: list[Tensor | None] = []
                    for s in seen:
                        before = len(outputs)
                        chunk = self._show(s, rows, logits, self._facts_at(rows), shared)
                        for name, value in _per_row(s, chunk).items():
                            key = (s.slot.name, f"{s.visit.name}.{name}")
                            index = self._values[key][place[key]][0]
                            place[key] += 1
                            if value.requires_grad:
                                outputs.append(value)
                                output_gradients.append(gradients[key][index].to(value.dtype))
                        if self.call.apart:
                            scale = self.call.report.scale
                            self._keep_apart(s, rows, leaves, outputs[before:], output_gradients[before:], scale)
                    if outputs:
                        for name in sorted(self._replace(tile, leaves, products, outputs, output_gradients, into)):
                            into.add(name, rows[self.streams[name].axis], products[name])
        streams, heads, _ = self.leaves()
        return into.of(streams, heads)

    def _facts_at(self, rows: Rows) -> Facts:
        """The teacher's facts of a chunk's teacher rows; with one tokenizer, every chunk has them."""
        return {name: fact[rows["teacher"]] for name, fact in self.facts.items()} if "teacher" in rows else {}


class _Deposit(torch.autograd.Function):
    """A loss whose gradients are already there."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *_leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradient.device.type == "cpu" and gradient.item() == 1.0:
            return (None, None, *gradients)
        # In place: a copy of a head's gradient would double the pass's peak.
        return (None, None, *(None if g is None else g.mul_(gradient) for g in gradients))


class _Recomputed(torch.autograd.Function):
    """Per-row values whose chunks are computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.walk, ctx.count = walk, count
        return tuple(value.clone() for value in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        named = dict(zip(ctx.walk._values, gradients, strict=True))
        return (None, None, *([None] * ctx.count), *ctx.walk.recompute(named))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _per_row(seen: _Seen, chunk: Chunk) -> Mapping[str, Tensor]:
    values = seen.slot.loss.over_vocab(seen.visit.name, chunk)
    assert not isinstance(values, Terms), f"{seen.slot.name}: the visit '{seen.visit.name}' returns per-row tensors"
    return values


def _as_slice(index: Index) -> slice:
    assert isinstance(index, slice)
    return index


def _within(whole: Index, part: Index) -> slice:
    """Where a part of an axis stands in a chunk that holds more of it."""
    start = _as_slice(whole).start
    return slice(_as_slice(part).start - start, _as_slice(part).stop - start)


def _part(index: Index, start: int, size: int, length: int) -> Index:
    """Rows `start` to `start + size` of a chunk's index into an axis."""
    if isinstance(index, slice):
        return slice(index.start + start, index.start + min(start + size, length))
    return index[start : start + size]
