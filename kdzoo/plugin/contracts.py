"""What a plugin author writes: a loss, an aligner, a fusion, an anatomy, a tracker. Nothing of DeepSpeed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from kdzoo.step.batch import Batch
from kdzoo.step.chunk import Chunk
from kdzoo.step.head import Head
from kdzoo.step.terms import Terms
from kdzoo.step.view import View

Model = Literal["student", "teacher"]

RanksFirst = Callable[[Tensor, Tensor], Tensor]
"""Whether the student's head puts each gold token [n] first, from states [n, S]: [n] bool, without gradient."""


class Params(BaseModel):
    """The parameters of a plugin: frozen, strict, documented field by field; its JSON Schema is the recipe's."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class NoParams(Params):
    """A plugin without parameters."""


@dataclass(frozen=True)
class OwnStream:
    """Rows of hidden states that a loss sends through a head itself.

    `axis` "student" or "teacher" puts them side by side with that model's rows, one to one; "own" is a packing of
    the loss's choice (it brings its labels), walked after the models' own rows and so after every fact. Own packings
    that bring groups may be seen by one visit, group beside group.
    """

    name: str
    axis: Literal["student", "teacher", "own"]
    head: Model
    learns_head: bool = False


@dataclass(frozen=True)
class Visit:
    """Which streams a loss sees side by side, chunk by chunk.

    `kind` "sum": `over_vocab` returns `Terms`, plain sums over the chunk's rows, and the core makes the gradient on
    the spot. `kind` "rows": it returns per-row tensors, which `combine` receives for all rows; recomputed backward.
    `kind` "scan", of one model's rows: it returns per-row tensors [n, ...] without gradient, which the core adds up
    over the rows of each sequence; every scan is over before any other visit, which sees what `scan` makes of the sums.
    `facts` are the teacher's facts that the chunk must carry (on the student's rows where the visit has them).
    """

    name: str
    streams: tuple[str, ...]
    kind: Literal["sum", "rows", "scan"] = "sum"
    facts: tuple[str, ...] = ()
    report_only: bool = False
    """Seen only where a trained stage is measured, never in training: what costs a product of its own just to watch."""


@dataclass(frozen=True)
class Needs:
    """Everything a loss reads, so that the core can plan before it runs."""

    student: frozenset[str] = frozenset()
    """Sites of the student: `hidden.last`, `hidden.<block>`, `embed.input`, `embed.target`, ... `head.weight`
    [vocabulary, width] is without gradient, and there in `streams` and `setup` alone, where heads are whole."""
    teacher: frozenset[str] = frozenset()
    """Sites of the teacher. Where the recipe's slot names a fusion, `hidden.last` is the fused state."""
    visits: tuple[Visit, ...] = ()
    streams: tuple[OwnStream, ...] = ()
    facts: tuple[str, ...] = ()
    """Teacher facts that `streams` or `combine` read: `teacher.top1`, `.correct` (`.correct@5`: the gold token is among
    the first five), `.label_logprob` (`.label_logprob@2.0`: at temperature 2), `.entropy`."""
    tokenizers: Literal["any", "same"] = "any"
    """"same": the loss makes sense for one tokenizer only; two are refused before anything is loaded."""
    aligned: bool = False
    """Whether pairs or spans of the aligner are read."""
    artefacts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stages whose trained module this loss receives, with the parameters it insists on."""
    survey: bool = False
    """Whether `survey` is to see the training rows, and `prepare` their sums, before the first step."""
    rows: Literal["response", "sequence"] = "response"
    lexicons: bool = False
    """Whether the loss reads what the entries of the vocabularies say: `models.student.lexicon`, and the teacher's."""
    batch_coupled: bool = False
    """One sample's loss depends on its neighbours or on padding: the authors' reading, never a default."""
    divergence: bool = False
    """A promise that `kdzoo check` holds it to: never negative, and 0 where both models say the same."""


@dataclass(frozen=True)
class Lexicon:
    """What the entries of a vocabulary say, as the model's tokenizer has it. A head may be longer, or shorter."""

    texts: Sequence[str]
    """By token: what it adds to a text that goes on. A part of a character is "\ufffd"."""
    special: frozenset[int]
    end: int
    """The end-of-sequence token."""


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of one model: all that a loss may know of it when it is built."""

    width: int
    vocabulary: int
    layers: int
    model_type: str
    lexicon: Lexicon | None = None
    """Where the loss's needs say `lexicons`."""


@dataclass(frozen=True)
class Models:
    """Both models' sizes, and whether their tokenizers are one (decided by their tokens)."""

    teacher: ModelFacts | None
    student: ModelFacts | None
    same_tokens: bool
    student_ids: Tensor | None = None
    """[W] the student's token with the text of each teacher token, -1 where it has none. None without both models."""


@dataclass
class Own:
    """The rows of an own stream. `labels` and `group` only where its axis is "own"."""

    hidden: Tensor  # [n, width of the head]
    labels: Tensor | None = None  # [n]
    group: Tensor | None = None
    """[n] long, from 0, ascending. A chunk has whole groups: of every stream of a visit, the rows of the same ones."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """[n, ...] what else the chunk is to show of each row, without gradient: a weight, say."""


class Loss(nn.Module, ABC):
    """A distillation method. Subclasses are final; write the methods that the method needs and no other.

    Trainable parts are submodules: they get the slot's `lr`, are checkpointed, and never reach the exported student.
    Every module runs on every step, also on zero rows: a rank that skips one stalls all the others.
    """

    name: ClassVar[str]
    """What recipes say in `use`."""
    paper: ClassVar[str]
    """Title, venue and address; stands in the docs and in exported model cards."""
    formula: ClassVar[str]
    """One line, for the zoo table."""
    deviations: ClassVar[tuple[str, ...]] = ()
    """Where this differs from its authors' code, one sentence each: function, what, why."""
    Params: ClassVar[type[Params]] = NoParams

    @classmethod
    @abstractmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        """What is read, for these parameters, with one tokenizer or two. Pure and cheap."""

    def __init__(self, params: Any, models: Models, artefacts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Sizes only: no weight of a model is at hand. `artefacts` hold the state of the stages named in needs."""
        super().__init__()
        self.params = params
        self.models = models

    def survey(self, batch: Batch, teacher: View) -> Mapping[str, Tensor]:
        """Sums over this batch's teacher rows; added up over training rows and ranks where `needs.survey`."""
        return {}

    def prepare(self, sums: Mapping[str, Tensor]) -> None:
        """The sums of `survey` over all rows, in float64, once before the first step: a start, or constants."""

    def setup(self, heads: Mapping[str, Tensor]) -> None:
        """The head weights [vocabulary, width] of the models whose `head.weight` is declared, once before the first
        step: for a start that depends on them, or constants. After `prepare`."""

    def carry_facts(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], ranks_first: RanksFirst
    ) -> Mapping[str, Tensor]:
        """Teacher facts [M] carried to student rows [N] where the tokenizers differ. Default: by aligned spans."""
        from kdzoo.step.facts import carry_by_spans

        assert batch.student is not None and batch.teacher is not None
        return carry_by_spans(facts, batch.student, batch.teacher)

    def streams(self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor]) -> Mapping[str, Own]:
        """The rows of every own stream named in needs; `facts` on student rows [N] where there is a student."""
        return {}

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms | Mapping[str, Tensor]:
        """One chunk of rows with the vocabulary present: `Terms` for a "sum" visit, else per-row tensors."""
        raise NotImplementedError

    def scan(self, batch: Batch, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """From the sums of "scan" visits, `<visit>.<name>` [B, ...], to what other visits' chunks have as `scanned`."""
        return sums

    def combine(
        self, batch: Batch, student: View, teacher: View, facts: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Terms:
        """Per-row values of "rows" visits and sites into terms; also the place for watched values.

        Not called `forward`: it is a plain method, since its arguments are no tensors that hooks could see.
        """
        return Terms()


@dataclass(frozen=True)
class Tokens:
    """The scored tokens of one response on one side, as an aligner sees them."""

    ids: Sequence[int]
    starts: Sequence[int]  # first character of each token in the response text
    ends: Sequence[int]  # one past its last character; an end-of-sequence token stands at (length, length)
    text: str


@dataclass(frozen=True)
class Alignment:
    """Which tokens of two sides belong together.

    `pairs`: one-to-one, ascending. `spans`: groups (student tokens, teacher tokens) covering the same text, as
    half-open index ranges (student start, student end, teacher start, teacher end), ascending, disjoint.
    """

    pairs: Sequence[tuple[int, int]]
    spans: Sequence[tuple[int, int, int, int]]


class Aligner(ABC):
    """Aligns the tokens of one response under two tokenizers. Runs in the collator, on the CPU."""

    name: ClassVar[str]
    Params: ClassVar[type[Params]] = NoParams

    def __init__(self, params: Any) -> None:
        self.params = params

    @abstractmethod
    def align(self, student: Tokens, teacher: Tokens) -> Alignment: ...


@dataclass(frozen=True)
class Mixture:
    """The parts of a block that mixes experts. A pass calls each of its modules once, the router before the experts."""

    block: nn.Module
    """Takes [B, T, D]: what router and experts read."""
    norm: nn.Module
    """The norm before it; its input is the residual stream that the block's output is added to."""
    router: nn.Module
    """[n, D] -> logits [n, E], weights of the routed experts [n, K], and which they are [n, K]."""
    experts: nn.Module
    """[n, D], which [n, K], weights [n, K] -> their weighted sum [n, D]."""
    shared: Callable[[Tensor], Tensor] | None = None
    """[n, D] -> [n, D]: what the block adds whatever the router says."""


@dataclass(frozen=True)
class Experts:
    """All experts of one block on n rows: what a fusion mixes."""

    outputs: Tensor  # [n, E, D] each expert's own output
    logits: Tensor  # [n, E] the router's
    weights: Tensor  # [n, E] what the model itself weighs each expert with, 0 where it is not routed to


class FusionParams(Params):
    """What every fusion has; a fusion with parameters of its own inherits it."""

    layer: int = -1
    """The block whose experts are fused, counted from 0, or from the end."""
    into: Literal["block", "alone"] = "block"
    """"block": the fused output takes the place of the experts' output: a shared expert and the residual stream are
    added, the final norm follows. "alone": the fused output itself is the state."""
    judge: Literal["model", "fused"] = "model"
    """Whose prediction the teacher's is, for the losses that read the fused state."""


class Fusion(ABC):
    """Mixes the experts of a frozen teacher's block anew. It writes the site `fused.<slot>`; it trains nothing."""

    name: ClassVar[str]
    Params: ClassVar[type[FusionParams]] = FusionParams

    def __init__(self, params: Any) -> None:
        self.params = params

    @abstractmethod
    def fuse(self, experts: Experts) -> Tensor:
        """The fused output [n, D]; n may be 0."""

    def watch(self, experts: Experts) -> Mapping[str, Tensor]:
        """Values per row [n] whose means are logged as `fuse.<slot>/<name>`."""
        return {}


class Tracker(ABC):
    """Sends the steps of one run somewhere. Made on the first rank before anything is trained, where a recipe's
    `trackers` names it; what it raises then ends the run, an ImportError as the extra that has to be installed.
    Later it is told once, and the tracker left out: hours of training are worth more than its curves."""

    name: ClassVar[str]
    Params: ClassVar[type[Params]] = NoParams

    @abstractmethod
    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Of the run in `folder`, with its resolved recipe."""

    @abstractmethod
    def step_logged(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """What the log got after an optimizer step; every stage counts from 1."""

    @abstractmethod
    def close(self) -> None:
        """The run is over, well or not."""


class Anatomy(ABC):
    """Where a model family keeps its parts. One instance serves every model of the family; no model is rewritten."""

    families: ClassVar[tuple[str, ...]]
    """The `model_type`s of Hugging Face configurations that this anatomy covers."""

    @abstractmethod
    def backbone(self, model: nn.Module) -> nn.Module:
        """The model without its head; its `last_hidden_state` is what the head reads (`hidden.last`)."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The transformer blocks; `hidden.<k>` is the output of block k."""

    @abstractmethod
    def embedding(self, model: nn.Module) -> nn.Module:
        """The input embedding module."""

    def embed_scale(self, model: nn.Module) -> float:
        """The factor that the embedding module multiplies its table with."""
        return 1.0

    @abstractmethod
    def head(self, model: nn.Module) -> Head:
        """The output head: weight, bias, scale and soft cap as the family has them."""

    def experts(self, config: Any) -> int:
        """How many experts a block of a model with this configuration has; 0 where it is no mixture."""
        return 0

    def mixture(self, model: nn.Module, block: int) -> Mixture | None:
        """The experts of block `block`, counted from 0; None where it is dense."""
        return None

    @abstractmethod
    def norm(self, model: nn.Module) -> nn.Module:
        """The norm after the last block, whose output the head reads."""

    @abstractmethod
    def block_prefix(self) -> str:
        """The name of the blocks in a state dict, with a trailing dot (`model.layers.`)."""

    @abstractmethod
    def cut_config(self, config: Any, layers: Sequence[int]) -> Any:
        """A copy of a configuration that keeps only these blocks, in this order."""


__all__ = [
    "Aligner",
    "Alignment",
    "Anatomy",
    "Experts",
    "Fusion",
    "FusionParams",
    "Lexicon",
    "Loss",
    "Mixture",
    "ModelFacts",
    "Models",
    "Needs",
    "NoParams",
    "Own",
    "OwnStream",
    "Params",
    "RanksFirst",
    "Tokens",
    "Visit",
]
