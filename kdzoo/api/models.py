"""What a loss may know of the models when it is built: sizes and vocabularies, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from torch import Tensor

from kdzoo.api.entries import EntryMap
from kdzoo.errors import KdzooError

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class Vocabulary:
    """What the entries of a vocabulary say, as the model's tokenizer has it. A head may be longer, or shorter."""

    texts: Sequence[str]
    """By token: what it adds to a text that goes on. A part of a character is "\ufffd"."""
    special: frozenset[int]
    end: int
    """The end-of-sequence token."""


@dataclass(frozen=True)
class Heads:
    """The attention heads of every block."""

    query: int
    key_value: int
    """How many heads keys and values have: as many, or fewer, each of which serves a group of query heads."""
    size: int
    """The width of one head."""

    @property
    def width(self) -> int:
        """Of the queries of all heads, side by side."""
        return self.query * self.size


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of one model."""

    width: int
    vocab_size: int
    """How many columns its logits have."""
    layers: int
    model_type: str
    known_vocabulary: Vocabulary | None = None
    """Where the loss's needs say `vocabularies`."""
    heads: Heads | None = None
    """None where its model adapter names no attention."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What its tokens say; a loss that reads it declares `vocabularies`."""
        if self.known_vocabulary is None:
            raise KdzooError("a loss reads what a vocabulary says; say 'vocabularies=True' in its 'needs'")
        return self.known_vocabulary


class AbsentModel(ModelInfo):
    """Stands where a stage has no such model: reading a size of it is an error that says so."""

    def __init__(self, role: Role) -> None:
        object.__setattr__(self, "role", role)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks for these, to copy it, say
            raise AttributeError(name)
        role = self.__dict__["role"]
        raise KdzooError(f"a loss reads the {role}'s '{name}' in a stage that has no {role}; use it in another stage")

    @property
    def vocabulary(self) -> Vocabulary:
        self.__getattr__("vocabulary")


@dataclass(frozen=True)
class ModelPair:
    """Both models, and how their tokenizers relate."""

    student: ModelInfo
    teacher: ModelInfo
    same_tokens: bool
    """Whether both tokenizers are one (decided by their tokens)."""
    ids_in_student: Tensor | None = None
    """[W] the student's token with the text of each teacher token, -1 where it has none. None without both models."""
    known_entries: Mapping[EntryMap, Tensor] = field(default_factory=dict)
    """The maps between the vocabularies that losses declare in their needs, by name."""

    def of(self, role: Role) -> ModelInfo:
        return self.student if role == "student" else self.teacher

    @property
    def student_ids(self) -> Tensor:
        """[W] the student's token with the text of each teacher token, -1 where it has none."""
        assert self.ids_in_student is not None, "a loss that maps tokens reads both models"
        return self.ids_in_student

    def entries(self, name: EntryMap) -> Tensor:
        """A map between the vocabularies, which the loss declares: of each entry its partner, -1 where it has none."""
        if name not in self.known_entries:
            raise KdzooError(f"a loss reads the map of entries '{name}'; name it under 'entries' in its 'needs'")
        return self.known_entries[name]
