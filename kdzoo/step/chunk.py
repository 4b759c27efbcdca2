"""A few rows with the whole vocabulary present: what `over_vocab` sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdzoo.step.batch import Side

Index = slice | Tensor


@dataclass(frozen=True)
class OwnRows:
    """What an own stream brings beside states and labels, cut to one chunk."""

    values: Mapping[str, Tensor]
    group: Tensor | None


class Chunk:
    """The streams of one visit, cut to one chunk of rows. Logits are at least float32.

    Softmaxes are shared: two losses that read one stream at one temperature cost one.
    """

    def __init__(
        self,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        facts: Mapping[str, Tensor],
        shared: dict[tuple[str, float], Tensor],
        names: Mapping[str, str],
        places: Mapping[str, tuple[Side, Index]] | None = None,
        scanned: Mapping[str, Tensor] | None = None,
        own: Mapping[str, OwnRows] | None = None,
        groups: int = 0,
    ) -> None:
        self._logits = logits
        self._labels = labels
        self.facts = facts
        self.scanned = scanned or {}
        """What `scan` made of this loss's "scan" visits."""
        self._shared = shared
        self._names = names  # what the loss calls a stream -> its name in this pass
        self._places = places or {}
        self._own = own or {}
        self.groups = groups
        """How many groups of rows the chunk has, where its streams bring any."""

    @classmethod
    def of_one(cls, stream: str, logits: Tensor, labels: Tensor, shared: dict[tuple[str, float], Tensor]) -> Chunk:
        """A chunk of a single stream of the pass."""
        return cls({stream: logits}, {stream: labels}, {}, shared, {stream: stream})

    def logits(self, stream: str) -> Tensor:
        """[n, vocabulary]"""
        return self._logits[stream]

    def labels(self, stream: str) -> Tensor:
        """[n] gold tokens"""
        return self._labels[stream]

    def side(self, stream: str) -> Side:
        """The model's tokens of the whole micro-batch that a stream's rows stand beside."""
        return self._places[stream][0]

    def rows(self, stream: str) -> Index:
        """Which of its side's rows [n] the chunk has: an index for anything that has one value per row."""
        return self._places[stream][1]

    def values(self, stream: str) -> Mapping[str, Tensor]:
        """What an own stream brought with its rows, by name [n, ...]."""
        return self._own[stream].values

    def group(self, stream: str) -> Tensor:
        """[n] the group of each row, counted from 0 in this chunk, ascending."""
        group = self._own[stream].group
        assert group is not None, f"the stream '{stream}' brings no groups"
        return group

    def logprobs(self, stream: str, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature) [n, vocabulary]"""
        key = (self._names[stream], temperature)
        if key not in self._shared:
            logits = self._logits[stream]
            scaled = logits if temperature == 1.0 else logits * (1.0 / temperature)
            self._shared[key] = torch.log_softmax(scaled, dim=-1)
        return self._shared[key]
