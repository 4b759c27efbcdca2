"""What a loss does while it is called: what it reads, and what it makes constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kdzoo.plugin.contracts import Lexicon, Models
from kdzoo.step.chunk import Chunk
from kdzoo.step.head import HEAD_WEIGHT
from kdzoo.step.view import View
from kdzoo.step.vocabulary import Slot

Around = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]
"""(method, the loss's own, arguments) -> what the method returns."""


def intercepted(slot: Slot, around: Around) -> Slot:
    """A copy of the slot whose loss is called through `around`."""
    loss = deepcopy(slot.loss)
    base = type(loss)

    def method(name: str) -> Callable[..., Any]:
        return lambda self, *arguments: around(name, partial(getattr(base, name), self), arguments)

    names = ("streams", "over_vocab", "scan", "combine", "carry_facts", "survey", "setup")
    loss.__class__ = type(base.__name__, (base,), {name: method(name) for name in names})
    return replace(slot, loss=loss)


@dataclass
class Reads:
    """What a loss has read."""

    sites: dict[str, set[str]] = field(default_factory=lambda: {"student": set(), "teacher": set()})
    facts: set[str] = field(default_factory=set)
    logits: set[tuple[str, str]] = field(default_factory=set)
    """(visit, stream)"""
    visit_facts: set[tuple[str, str]] = field(default_factory=set)
    """(visit, fact)"""
    lexicon: set[str] = field(default_factory=set)
    artefacts: set[str] = field(default_factory=set)

    def around(self, name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        views = [argument for argument in arguments if isinstance(argument, View)]
        if name == "over_vocab":
            visit, chunk = arguments
            return original(visit, _HeardChunk(chunk, visit, self))
        if name == "setup":
            return original(Heard(arguments[0], lambda model: self.sites[model].add(HEAD_WEIGHT)))
        if name in ("streams", "combine", "carry_facts"):
            batch, student, teacher, facts, *rest = arguments
            arguments = (batch, student, teacher, Heard(facts, self.facts.add), *rest)
        found = original(*arguments)
        for view, model in zip(views, ("teacher",) if name == "survey" else ("student", "teacher"), strict=False):
            self.sites[model] |= view.read
        return found


class Heard(dict[str, Any]):
    """A mapping that tells which keys are read."""

    def __init__(self, content: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        super().__init__(content)
        self._tell = tell

    def __getitem__(self, key: str) -> Any:
        self._tell(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._tell(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            self._tell(key)
            yield key

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        return [self[key] for key in self]


class _HeardChunk(Chunk):
    """A chunk that tells which streams' logits and which facts are read."""

    def __init__(self, chunk: Chunk, visit: str, reads: Reads) -> None:
        self.__dict__ |= chunk.__dict__
        self._visit, self._reads = visit, reads
        self.facts = Heard(chunk.facts, lambda fact: reads.visit_facts.add((visit, fact)))

    def logits(self, stream: str) -> Tensor:
        self._reads.logits.add((self._visit, stream))
        return super().logits(stream)

    def logprobs(self, stream: str, temperature: float = 1.0) -> Tensor:
        self._reads.logits.add((self._visit, stream))
        return super().logprobs(stream, temperature)


class _HeardLexicon(Lexicon):
    """A lexicon that tells that it is read."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("texts", "special", "end"):
            object.__getattribute__(self, "heard").add(name)
        return object.__getattribute__(self, name)


def with_heard_lexicons(models: Models, heard: set[str]) -> Models:
    def told(lexicon: Lexicon | None) -> Lexicon | None:
        if lexicon is None:
            return None
        copy = _HeardLexicon(lexicon.texts, lexicon.special, lexicon.end)
        object.__setattr__(copy, "heard", heard)
        return copy

    def of(facts: Any) -> Any:
        return None if facts is None else replace(facts, lexicon=told(facts.lexicon))

    return replace(models, student=of(models.student), teacher=of(models.teacher))


class Constants(TorchFunctionMode):
    """What a loss detaches, or computes without gradient, keeps its first value when the loss is called again.

    So a finite difference is of what the gradient is of. The second pass calls the same operations in the same order.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Tensor] = []
        self._next: int | None = None
        self._without_gradient = False

    def replay(self) -> None:
        """From here on, the values of the first pass."""
        self._next = 0

    def around(self, name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        # Visits of kind "rows" are first called without gradient, by the core: that says nothing of the loss.
        with torch.enable_grad(), self:
            found = original(*arguments)
        return {key: self._constant(value) for key, value in found.items()} if name == "scan" else found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            self._without_gradient = not args[0]
        found = func(*args, **(kwargs or {}))
        if (name == "detach" or self._without_gradient) and isinstance(found, Tensor) and found.is_floating_point():
            return self._constant(found, in_place=any(found is argument for argument in args))
        return found

    def _constant(self, value: Tensor, in_place: bool = False) -> Tensor:
        if self._next is None:
            self._kept.append(value.detach().clone())
            return value
        kept = self._kept[self._next]
        self._next += 1
        return value.copy_(kept) if in_place else kept.clone()
