"""The plan of the vocabulary pass: who sees which streams, and in which order they are walked. No tensor in sight.

With one tokenizer, student and teacher tokens go side by side and the teacher's facts are at hand in the chunk. With
two, the teacher's tokens come first where somebody waits for their facts (tokens that a loss also wants side by side
with the student's then meet the teacher's head a second time). Packings of a loss's own come last, when all facts are
known; those that bring groups go side by side, whole groups in every chunk. Scans have walks of their own before all
that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kdzoo.api.loss import Visit

Fact = tuple[str, str]
"""(the teacher's stream whose prediction it is of, the fact's name)"""

MODELS = frozenset({"student", "teacher"})


@dataclass(frozen=True)
class Sight:
    """One loss's visit, with its streams under their names in the pass."""

    term: str
    """The loss term whose visit it is."""
    visit: Visit
    streams: Mapping[str, str]
    """What the loss calls a stream -> its name in the pass."""
    axes: frozenset[str]
    """What its tokens are counted along: a model's tokens, or a packing of its own."""

    @property
    def whole_name(self) -> str:
        return f"{self.term}.{self.visit.name}"


@dataclass(frozen=True)
class Walk:
    """Once through the tokens of some axes, chunk by chunk."""

    axes: tuple[str, ...]
    together: Literal["tokens", "pairs", "groups"]
    """Which tokens of the axes make a chunk: the same ones, aligned pairs and then what no pair holds, or those of the
    same groups."""
    leftovers: tuple[str, ...] = ()
    """Of pairs: the axes whose other tokens are walked too."""
    sights: tuple[Sight, ...] = ()
    facts: frozenset[Fact] = frozenset()
    """What falls out of it."""


def sight(
    term: str, visit: Visit, streams: Mapping[str, str], axes: Mapping[str, str], grouped: Collection[str]
) -> Sight | None:
    """The visit in this pass; None where a stream of it is not there.

    `streams`: what the loss calls those that are not its own. `axes`: stream of the pass -> its axis. `grouped`: those
    that bring groups.
    """
    names = {name: streams.get(name, own_name(term, name)) for name in visit.streams}
    if not all(name in axes for name in names.values()):
        return None
    found = frozenset(axes[name] for name in names.values())
    in_groups = visit.kind == "sum" and all(name in grouped for name in names.values())
    assert len(found) == 1 or found <= MODELS or in_groups, (
        f"the visit '{term}.{visit.name}' puts tokens of {sorted(found)} side by side"
    )
    assert visit.kind != "scan" or found in ({"student"}, {"teacher"}), (
        f"the scan '{term}.{visit.name}' is of one model's tokens"
    )
    return Sight(term, visit, names, found)


def own_name(term: str, stream: str) -> str:
    """What the pass calls a stream of a loss's own: no model's stream has a slash in its name."""
    return f"{term}/{stream}"


def scans(sights: Iterable[Sight]) -> list[Walk]:
    """The walks before all others."""
    found = [one for one in sights if one.visit.kind == "scan"]
    by_axis = ((axis, tuple(one for one in found if one.axes == {axis})) for axis in ("student", "teacher"))
    return [Walk((axis,), "tokens", sights=mine) for axis, mine in by_axis if mine]


def walks_of_models(
    sights: Iterable[Sight], wanted: frozenset[Fact], models: frozenset[str], same_tokens: bool
) -> list[Walk]:
    """The walks over the models' own tokens."""
    seen = tuple(one for one in sights if one.visit.kind != "scan" and one.axes <= MODELS)
    if models == MODELS and same_tokens:
        return [Walk(("student", "teacher"), "tokens", sights=seen, facts=wanted)]
    if models == MODELS and not wanted and any(one.axes == MODELS for one in seen):
        return [Walk(("student", "teacher"), "pairs", ("student", "teacher"), seen)]
    of_teacher = tuple(one for one in seen if one.axes == {"teacher"})
    rest = tuple(one for one in seen if one.axes != {"teacher"})
    first = Walk(("teacher",), "tokens", sights=of_teacher, facts=wanted)
    if any("teacher" in one.axes for one in rest):
        return [first, Walk(("student", "teacher"), "pairs", ("student",), rest)]
    return [first, Walk(("student",), "tokens", sights=rest)]


def walks_of_packings(sights: Iterable[Sight], grouped: Collection[str]) -> list[Walk]:
    """The walks over one loss's own packings, whose names are those of their streams."""
    by_axes: dict[tuple[str, ...], list[Sight]] = {}
    for one in sights:
        if not one.axes <= MODELS:
            by_axes.setdefault(tuple(sorted(one.axes)), []).append(one)
    return [
        Walk(axes, "groups" if all(axis in grouped for axis in axes) else "tokens", sights=tuple(seen))
        for axes, seen in by_axes.items()
    ]


def streams_of(walk: Walk) -> Sequence[str]:
    """The streams that it applies a head to, always in the same order."""
    return sorted({name for one in walk.sights for name in one.streams.values()} | {stream for stream, _ in walk.facts})
