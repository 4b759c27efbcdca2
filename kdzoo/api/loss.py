"""The kind of plugin that kdzoo is for: a distillation loss. Plain torch, nothing of DeepSpeed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar, Literal, overload

from torch import Tensor, nn

from kdzoo.api.chunk import Logits
from kdzoo.api.entries import EntryMap
from kdzoo.api.facts import carry_by_spans
from kdzoo.api.models import ModelInfo, ModelPair, Role
from kdzoo.api.plugin import NoParams, Params, Plugin, is_text
from kdzoo.api.step import Step
from kdzoo.api.terms import Terms


@dataclass(frozen=True)
class Needs:
    """What a loss reads that its methods do not tell, so that the core can plan before it runs."""

    student: frozenset[str] = frozenset()
    """Sites of the student: `hidden.last`, `hidden.<block>`, `embed.input`, `embed.target`, ... `head.weight`
    [V, S] is without gradient, and there in `streams` and `start_from_heads` alone, where heads are whole."""
    teacher: frozenset[str] = frozenset()
    """Sites of the teacher. Where the recipe's slot names a fusion, `hidden.last` is the fused state."""
    facts: frozenset[str] = frozenset()
    """Facts of the teacher's prediction: `teacher.top1`, `.correct` (`.correct@5`: the gold token is among the first
    five), `.label_logprob` (`.label_logprob@2.0`: at temperature 2), `.entropy`."""
    tokenizers: Literal["any", "same"] = "any"
    """"same": the loss makes sense for one tokenizer only; two are refused before anything is loaded."""
    aligned: bool = False
    """Whether pairs or spans of the aligner are read."""
    artifacts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stages whose trained module this loss receives, with the parameters it insists on."""
    answers: bool = False
    """Whether the loss makes sense only on rows whose responses are the teacher's answers: the stage `answers`."""
    tokens: Literal["response", "sequence"] = "response"
    """Of a stage on the teacher alone: which tokens are scored, those of responses or every real one."""
    vocabularies: bool = False
    """Whether the loss reads what the tokens of the vocabularies say: `student.vocabulary`, `teacher.vocabulary`."""
    entries: frozenset[EntryMap] = frozenset()
    """Maps between the vocabularies that the loss reads: "same_text", "nearest_in_student", "nearest_in_teacher"; read
    one as `self.pair.entries(name)`. How far they reach is said at the start of a run."""
    batch_coupled: bool = False
    """One sample's loss depends on its neighbours or on padding: the authors' reading, never a default."""
    divergence: bool = False
    """A promise that `kdzoo check` holds it to: never negative, and 0 where both models say the same."""


@dataclass
class Stream:
    """Tokens' hidden states that a loss sends through a head itself.

    Beside a model, they stand one to one with its tokens, whose labels are theirs. Otherwise they are a packing of the
    loss's own, which brings labels; a packing that also brings groups may be seen beside others that do, by groups.
    """

    hidden: Tensor  # [n, width of the head]
    head: Role
    """Whose head they go through."""
    beside: Role | None = None
    labels: Tensor | None = None
    """[n]; only of an own packing."""
    learns_head: bool = False
    """Whether the student's head gets a gradient from them."""
    group: Tensor | None = None
    """[n] long, from 0, ascending; only of an own packing. A chunk has whole groups: of every stream of a visit, the
    tokens of the same ones."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """[n, ...] what else a visit is to see of each token, without gradient: a weight, say."""
    tokens: Tensor | None = None
    """[n] long, which of the student's tokens each stands for; only of an own packing, so that token weights reach it.
    Where packings are seen side by side, one of them says it."""


VisitKind = Literal["sum", "tokens", "scan"]
Visited = Terms | Mapping[str, Tensor]


@dataclass(frozen=True)
class Visit:
    """Which streams one method of a loss sees side by side, chunk by chunk; made from the method."""

    name: str
    method: str
    streams: tuple[str, ...]
    kind: VisitKind
    measured_only: bool
    of_each: bool = False
    """Whether its method is called once for each of several streams, as far as they are made."""

    def of(self, loss: Loss, seen: Mapping[str, Logits]) -> Visited:
        """What the method returns for these streams."""
        method = getattr(loss, self.method)
        return method(*seen.values()) if self.of_each else method(**seen)


class VisitMethod:
    """A method that `visit` has marked."""

    def __init__(
        self,
        function: Callable[..., Visited],
        kind: VisitKind | Callable[[Any], VisitKind],
        streams: Callable[[Any], tuple[str, ...]] | None,
        each: tuple[str, ...],
        when: Callable[[Any], bool] | None,
        measured_only: bool,
    ) -> None:
        self.function = function
        self.__doc__ = function.__doc__
        self._kind, self._streams, self._each, self._when = kind, streams, each, when
        self._measured_only = measured_only

    def __get__(self, loss: Loss | None, owner: type[Loss]) -> Any:
        return self if loss is None else MethodType(self.function, loss)

    def calling(self, function: Callable[..., Visited]) -> VisitMethod:
        """The same marks on another function, one that wraps this."""
        return VisitMethod(function, self._kind, self._streams, self._each, self._when, self._measured_only)

    def visits(self, params: Any) -> list[Visit]:
        """What it sees with these parameters."""
        if self._when is not None and not self._when(params):
            return []
        kind = self._kind(params) if callable(self._kind) else self._kind
        name = self.function.__name__
        if self._each:
            only = self._measured_only
            return [Visit(f"{name}.{stream}", name, (stream,), kind, only, of_each=True) for stream in self._each]
        own = tuple(inspect.signature(self.function).parameters)[1:]
        streams = own if self._streams is None else self._streams(params)
        return [Visit(name, name, streams, kind, self._measured_only)]


@overload
def visit(method: Callable[..., Visited], /) -> VisitMethod: ...
@overload
def visit(
    *,
    kind: VisitKind | Callable[[Any], VisitKind] = "sum",
    streams: Callable[[Any], tuple[str, ...]] | None = None,
    each: tuple[str, ...] = (),
    when: Callable[[Any], bool] | None = None,
    measured_only: bool = False,
) -> Callable[[Callable[..., Visited]], VisitMethod]: ...
def visit(
    method: Callable[..., Visited] | None = None,
    /,
    *,
    kind: VisitKind | Callable[[Any], VisitKind] = "sum",
    streams: Callable[[Any], tuple[str, ...]] | None = None,
    each: tuple[str, ...] = (),
    when: Callable[[Any], bool] | None = None,
    measured_only: bool = False,
) -> Any:
    """Marks a method that sees streams with the whole vocabulary present, chunk by chunk.

    The names of its arguments are the streams that it sees side by side: `student`, `teacher`, or those of `streams`.

    `kind` "sum": it returns `Terms` of the chunk's tokens, and the core makes the gradient on the spot. "tokens": it
    returns per-token tensors, which `finish` receives for all tokens as `step.values["<method>.<name>"]`; recomputed
    backward. "scan", of one model's tokens: per-token tensors [n, ...] without gradient, which the core adds up over
    the tokens of each sequence; every scan is over before any other visit, which sees what `scan` makes of the sums.

    `each`: it is called once for each of these streams that is made, with that one as its argument; the visit is then
    called `<method>.<stream>`.
    `streams`, and `kind` if it is a function, follow from the parameters where the signature alone cannot say it (the
    method then takes `**seen`); `when` says for which parameters the visit is there. `measured_only`: seen only where a
    trained stage is measured, never in training: what costs a product of its own just to watch.
    """

    def mark(function: Callable[..., Visited]) -> VisitMethod:
        return VisitMethod(function, kind, streams, each, when, measured_only)

    return mark if method is None else mark(method)


class Loss(nn.Module, Plugin):
    """A distillation method. Subclasses are final; write the methods that the method needs and no other.

    Trainable parts are submodules: they get the slot's `lr`, are checkpointed, and never reach the exported student.
    Every module runs on every step, also on zero tokens: a rank that skips one stalls all the others. What moves over
    the steps and is not trained is a buffer, changed in `after_step`.
    """

    kind = "loss"
    texts = ("name", "paper", "formula")
    name: ClassVar[str]
    paper: ClassVar[str]
    """Title, venue and address; stands in the docs and in exported model cards."""
    formula: ClassVar[str]
    """One line, for the zoo table."""
    deviations: ClassVar[tuple[str, ...]] = ()
    """Where this differs from its authors' code, one sentence each: function, what, why."""
    Params: ClassVar[type[Params]] = NoParams

    @classmethod
    def declared_fault(cls) -> str | None:
        if fault := super().declared_fault():
            return fault
        if not (isinstance(cls.deviations, tuple) and all(map(is_text, cls.deviations))):
            return "has 'deviations' that are no sentences; give it a tuple of strings"
        if not cls.visit_methods() and cls.finish is Loss.finish:
            return "has neither a visit nor 'finish'; mark a method with '@kdzoo.visit'"
        return None

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        """What is read, for these parameters, with one tokenizer or two. Pure and cheap.

        A site that follows from the models' sizes is named `hidden.<block>` here, and by its number in `needs_of`.
        """
        return Needs()

    @classmethod
    def needs_of(cls, params: Any, pair: ModelPair) -> Needs:
        """`needs`, with what follows from the sizes of both models. Asked before anything is trained.

        What these models do not have is a `RecipeError` that begins with the parameter: "pairs: the student has ...".
        """
        return cls.needs(params, pair.same_tokens)

    @classmethod
    def reads_statistics(cls) -> bool:
        """Whether `statistics` is to see training rows before the first step."""
        return cls.statistics is not Loss.statistics

    @classmethod
    def visit_methods(cls) -> list[VisitMethod]:
        """In the order of their definition, those of a parent first."""
        names = dict.fromkeys(name for parent in reversed(cls.__mro__) for name in vars(parent))
        found = (inspect.getattr_static(cls, name) for name in names)
        return [method for method in found if isinstance(method, VisitMethod)]

    @classmethod
    def visits(cls, params: Any) -> tuple[Visit, ...]:
        """What its methods see with these parameters."""
        return tuple(visit for method in cls.visit_methods() for visit in method.visits(params))

    def __init__(self, params: Any, pair: ModelPair, artifacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """For the core. A method writes `build`."""
        super().__init__()
        self.params = params
        self.pair = pair
        self.build(pair.student, pair.teacher, artifacts)

    def build(self, student: ModelInfo, teacher: ModelInfo, artifacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make the submodules, from sizes: no weight of a model is at hand.

        `artifacts` hold the state of the stages named in needs; `self.params` and `self.pair` are there.
        """

    @property
    def statistics_of(self) -> frozenset[Role]:
        """Which models' sites `statistics` reads: the teacher's, unless a loss says otherwise; none: it is not called.

        With the student's, its untrained weights are loaded once more for that time.
        """
        return frozenset({"teacher"}) if self.reads_statistics() else frozenset()

    def statistics(self, step: Step) -> Mapping[str, Tensor]:
        """Sums over this batch's tokens, added up over training rows and ranks before the first step."""
        return {}

    def start_from_statistics(self, sums: Mapping[str, Tensor]) -> None:
        """The sums of `statistics` over all rows, in float64, once before the first step: a start, or constants."""

    def start_from_heads(self, heads: Mapping[Role, Tensor]) -> None:
        """The head weights [V, width] of the models whose `head.weight` is declared, once before the first step: for a
        start that depends on them, or constants. After `start_from_statistics`."""

    def carry_facts(self, step: Step) -> Mapping[str, Tensor]:
        """The teacher's facts `step.facts` [M] carried to student tokens [N], where the tokenizers differ.

        Default: by aligned spans.
        """
        return carry_by_spans(step.facts, step.student.side, step.teacher.side)

    def streams(self, step: Step) -> Mapping[str, Stream]:
        """The streams that it sends through a head itself, by the name that visits see them under.

        No fact is known yet.
        """
        return {}

    def streams_after_facts(self, step: Step) -> Mapping[str, Stream]:
        """Streams that follow from `step.facts`: packings of the loss's own, walked after the models' tokens."""
        return {}

    def scan(self, step: Step) -> Mapping[str, Tensor]:
        """From the sums of scans, `step.sums["<visit>.<name>"]` [B, ...], to what other visits see as `scanned`."""
        return step.sums

    def finish(self, step: Step) -> Terms:
        """Terms of sites and of what visits found of each token, `step.values`; the last method of a step.

        Not called `forward`: it is a plain method, since its argument is no tensor that hooks could see.
        """
        return Terms()

    def after_step(self, terms: Mapping[str, float], progress: float) -> None:
        """The optimizer has stepped. `terms`: this loss's terms and watched values, the same on every rank.

        `progress`: the share of the stage's optimizer steps that are done, this one included: above 0, and 1 after the
        last. The place to move a buffer, such as a schedule that follows the loss.
        """


__all__ = ["Loss", "Needs", "Stream", "Visit", "VisitKind", "VisitMethod", "visit"]
