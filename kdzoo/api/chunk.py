"""A few tokens with the whole vocabulary present: what a visit sees of each stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdzoo.api.batch import Side
from kdzoo.api.facts import FACTS
from kdzoo.errors import KdzooError, did_you_mean

Index = slice | Tensor
"""Which tokens of an axis a chunk has."""


@dataclass(frozen=True, eq=False)
class Logits:
    """One stream, cut to one chunk of n tokens.

    Softmaxes are shared: two losses that read one stream at one temperature cost one. So nothing here is ever changed
    in place.
    """

    stream: str
    """What the loss calls it."""
    logits: Tensor
    """[n, V], at least float32."""
    labels: Tensor
    """[n] gold tokens."""
    shared: dict[float, Tensor] = field(default_factory=dict)
    """Temperature -> log-softmax, of all losses together."""
    known: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """What the loss's own stream brought with its tokens, by name [n, ...]."""
    scanned: Mapping[str, Tensor] = field(default_factory=dict)
    """What `scan` made of this loss's scans."""
    side: Side | None = None
    """The model's tokens of the whole micro-batch that these stand beside; None for a packing of the loss's own."""
    at: Index | None = None
    """Which of its side's tokens these are: an index for anything that has one value per token."""
    group: Tensor | None = None
    """[n] the group of each token, counted from 0 in this chunk, ascending, where the stream brings groups."""
    groups: int = 0
    """How many groups the chunk has."""

    def __len__(self) -> int:
        return len(self.labels)

    def logprobs(self, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature) [n, V]"""
        if temperature not in self.shared:
            scaled = self.logits if temperature == 1.0 else self.logits * (1.0 / temperature)
            self.shared[temperature] = torch.log_softmax(scaled, dim=-1)
        return self.shared[temperature]

    def fact(self, name: str) -> Tensor:
        """[n] a fact that the loss declares, on these tokens."""
        if name not in self.known:
            declared = ", ".join(self.known) or "none"
            hint = "" if name.partition("@")[0] in FACTS else did_you_mean(name, FACTS)
            raise KdzooError(
                f"a visit reads the fact '{name}' of the stream '{self.stream}'{hint}; "
                f"facts here: {declared}; declare it in 'needs', and read it of a model's tokens"
            )
        return self.known[name]

    @property
    def sequence(self) -> Tensor:
        """[n] the sequence that each token stands in."""
        assert self.side is not None and self.at is not None, f"the stream '{self.stream}' is a packing of its own"
        return self.side.sample[self.at]
