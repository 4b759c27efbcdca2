"""A few rows with the whole vocabulary present: what `over_vocab` sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


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
    ) -> None:
        self._logits = logits
        self._labels = labels
        self.facts = facts
        self._shared = shared
        self._names = names  # what the loss calls a stream -> its name in this pass

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

    def logprobs(self, stream: str, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature) [n, vocabulary]"""
        key = (self._names[stream], temperature)
        if key not in self._shared:
            logits = self._logits[stream]
            scaled = logits if temperature == 1.0 else logits * (1.0 / temperature)
            self._shared[key] = torch.log_softmax(scaled, dim=-1)
        return self._shared[key]
