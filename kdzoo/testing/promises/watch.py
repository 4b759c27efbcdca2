"""What a loss does while it is called: what it reads, and what it makes constant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdzoo.api.batch import Reduction
from kdzoo.api.chunk import Logits
from kdzoo.api.head import HEAD_WEIGHT
from kdzoo.api.models import ModelInfo, ModelPair, Vocabulary
from kdzoo.api.step import Step
from kdzoo.api.terms import Terms
from kdzoo.step.loss_term import LossTerm

Around = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(method, the loss's own, arguments, named arguments) -> what the method returns."""

OF_A_STEP = ("streams", "streams_after_facts", "scan", "finish", "carry_facts", "statistics")
"""The methods whose only argument is the step."""


def intercepted(term: LossTerm, around: Around) -> LossTerm:
    """A copy of the term whose loss is called through `around`."""
    loss = deepcopy(term.loss)
    base = type(loss)

    def method(name: str) -> Callable[..., Any]:
        def called(self: Any, *arguments: Any, **named: Any) -> Any:
            original = inspect.getattr_static(base, name).__get__(self, base)
            return around(name, original, arguments, named)

        return called

    names = {*OF_A_STEP, "start_from_heads", *(visit.method for visit in term.visits)}
    loss.__class__ = type(base.__name__, (base,), {name: method(name) for name in names})
    return replace(term, loss=loss)


@dataclass
class Reads:
    """What a loss has read."""

    sites: dict[str, set[str]] = field(default_factory=lambda: {"student": set(), "teacher": set()})
    facts: set[str] = field(default_factory=set)
    logits: set[tuple[str, str]] = field(default_factory=set)
    """(visit's method, stream)"""
    streams: set[str] = field(default_factory=set)
    """The streams that it made."""
    vocabulary: set[str] = field(default_factory=set)
    entries: set[str] = field(default_factory=set)
    artifacts: set[str] = field(default_factory=set)

    def around(self, name: str, original: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if name == "start_from_heads":
            return original(Heard(arguments[0], lambda model: self.sites[model].add(HEAD_WEIGHT)))
        if name not in OF_A_STEP:
            hear = partial(_HeardLogits.of, method=name, reads=self)
            return original(*map(hear, arguments), **{stream: hear(seen) for stream, seen in named.items()})
        step: Step = arguments[0]
        found = original(replace(step, facts=Heard(step.facts, self.facts.add)))
        self.sites["teacher"] |= step.teacher.read
        if name != "statistics":
            self.sites["student"] |= step.student.read
        if name in ("streams", "streams_after_facts"):
            self.streams |= found.keys()
        return found


class Heard(dict[str, Any]):
    """A mapping that tells which keys are read."""

    def __init__(self, content: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        super().__init__(content)
        self._tell = tell

    def __deepcopy__(self, memo: dict[int, Any]) -> Heard:
        """Itself: a copy of a loss that holds it has read nothing by that."""
        return self

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


class _HeardLogits(Logits):
    """Logits that tell that they, and which facts, are read."""

    @classmethod
    def of(cls, seen: Logits, method: str, reads: Reads) -> _HeardLogits:
        copy = cls(**{each.name: getattr(seen, each.name) for each in fields(Logits)})
        object.__setattr__(copy, "heard", (method, reads))
        return copy

    def __getattribute__(self, name: str) -> Any:
        if name in ("logits", "logprobs"):
            method, reads = object.__getattribute__(self, "__dict__").get("heard", ("", Reads()))
            reads.logits.add((method, object.__getattribute__(self, "stream")))
        return object.__getattribute__(self, name)

    def fact(self, name: str) -> Tensor:
        self.__dict__["heard"][1].facts.add(name)
        return super().fact(name)


class _HeardVocabulary(Vocabulary):
    """A vocabulary that tells that it is read."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("texts", "special", "end"):
            object.__getattribute__(self, "heard").add(name)
        return object.__getattribute__(self, name)


def with_heard_vocabularies(pair: ModelPair, heard: set[str]) -> ModelPair:
    def of(info: ModelInfo) -> ModelInfo:
        known = info.known_vocabulary
        if known is None:
            return info
        copy = _HeardVocabulary(known.texts, known.special, known.end)
        object.__setattr__(copy, "heard", heard)
        return replace(info, known_vocabulary=copy)

    return replace(pair, student=of(pair.student), teacher=of(pair.teacher))


def with_heard_entries(pair: ModelPair, heard: set[str]) -> ModelPair:
    known: Any = Heard({str(name): partners for name, partners in pair.known_entries.items()}, heard.add)
    return replace(pair, known_entries=known)


@dataclass
class Divisors:
    """What a loss's terms are divided by, by term."""

    of: dict[str, Reduction] = field(default_factory=dict)

    def around(self, name: str, original: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        found = original(*arguments, **named)
        if isinstance(found, Terms):
            self.of |= {name: term.per for name, term in found.values.items()}
        return found


@dataclass
class Calls:
    """Which modules with parameters a loss calls, in their order: their names."""

    made: list[str] = field(default_factory=list)

    def listen(self, loss: nn.Module) -> None:
        for name, module in loss.named_modules():
            if name and any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(partial(self._called, name))

    def _called(self, name: str, _module: nn.Module, _arguments: Any) -> None:
        self.made.append(name)


@dataclass
class Edits:
    """What a loss changes in place of what it is shown: others see it too."""

    found: list[str] = field(default_factory=list)

    def around(self, name: str, original: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        seen = [*arguments, *named.values()]
        logits = [one for one in seen if isinstance(one, Logits)]
        before = Untouched(dict(pair for one in seen for pair in _tensors(one)))
        made = {id(one): set(one.shared) for one in logits}
        own = {id(one): Logits(one.stream, one.logits.detach().clone(), one.labels) for one in logits}
        result = original(*arguments, **named)
        self.found += [f"{what} in '{name}'" for what in before.changed()]
        for one in logits:
            for temperature in one.shared.keys() - made[id(one)]:
                mine, fresh = one.shared[temperature].detach(), own[id(one)].logprobs(temperature)
                if mine._version != fresh._version or not torch.allclose(mine, fresh, rtol=1e-12, atol=1e-12):
                    self.found.append(f"the log-probabilities of '{one.stream}' in '{name}'")
        return result


class Untouched:
    """Tensors by name, as they were."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._versions = {name: tensor._version for name, tensor in self._tensors.items()}
        self._values = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    def changed(self) -> list[str]:
        """Those that are not: a version is raised by every operation in place, but for those on `.data`."""
        return [
            name
            for name, tensor in self._tensors.items()
            if tensor._version != self._versions[name] or not torch.equal(tensor, self._values[name])
        ]


def _tensors(seen: Any) -> Iterator[tuple[str, Tensor]]:
    """What a method is shown, by what a reader calls it."""
    if isinstance(seen, Logits):
        yield f"the logits of '{seen.stream}'", seen.logits
        yield f"the labels of '{seen.stream}'", seen.labels
        for temperature, logprobs in seen.shared.items():
            yield f"the log-probabilities of '{seen.stream}' at temperature {temperature}", logprobs
        for kind, named in (("fact", seen.known), ("value", seen.values), ("scanned value", seen.scanned)):
            for name, value in named.items():
                yield f"the {kind} '{name}' of '{seen.stream}'", value
    elif isinstance(seen, Step):
        for kind, named in (("fact", seen.facts), ("sum", seen.sums), ("value", seen.values)):
            for name, value in named.items():
                yield f"the {kind} '{name}'", value
    elif isinstance(seen, Mapping):  # of `start_from_heads`
        for name, value in seen.items():
            yield f"the {name}'s head", value


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

    def around(self, name: str, original: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        # Visits of kind "tokens" are first called without gradient, by the core: that says nothing of the loss.
        with torch.enable_grad(), self:
            found = original(*arguments, **named)
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
