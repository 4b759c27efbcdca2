"""The sites of one model, packed to the tokens that are scored: all that a loss may read of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdzoo.api.batch import Side
from kdzoo.api.head import HEAD_WEIGHT
from kdzoo.errors import KdzooError, did_you_mean


class View:
    """Declared sites of one model for one micro-batch.

    `view["hidden.last"]` is `[N, width]`. Reading a site that the loss did not declare in its needs raises.
    """

    def __init__(self, side: Side, sites: Mapping[str, Tensor], owner: str, declared: frozenset[str]) -> None:
        self.side = side
        self.read: set[str] = set()
        self._sites = sites
        self._owner = owner
        self._declared = declared

    def __getitem__(self, site: str) -> Tensor:
        if site not in self._declared:
            known = sorted(self._declared) or ["nothing"]
            raise KdzooError(
                f"{self._owner}: reads the site '{site}' that its needs do not declare"
                f"{did_you_mean(site, known)}; declared: {', '.join(known)}"
            )
        self.read.add(site)
        if site == HEAD_WEIGHT and site not in self._sites:
            raise KdzooError(f"{self._owner}: reads the site '{site}' where heads are not whole; read it in 'streams'")
        return self._sites[site]

    @property
    def labels(self) -> Tensor:
        """[N] the token that each position predicts."""
        return self.side.labels

    @property
    def sample(self) -> Tensor:
        """[N] the sequence of each token, ascending."""
        return self.side.sample

    def __len__(self) -> int:
        return len(self.side)

    def padded(self, site: str) -> tuple[Tensor, Tensor]:
        """A site as `[B, n, width]` with a `[B, n]` mask of its tokens; n is those of the longest response."""
        return pad_tokens(self[site], self.side)


def pad_tokens(values: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """Packed `[N, ...]` as `[B, n, ...]`, zero where a sequence has no such token, and the `[B, n]` mask."""
    place, mask = token_places(side)
    padded = values.new_zeros((mask.numel(), *values.shape[1:]))
    padded = padded.index_copy(0, place, values)
    return padded.view(*mask.shape, *values.shape[1:]), mask


def unpad_tokens(padded: Tensor, side: Side) -> Tensor:
    """The inverse of `pad_tokens`: `[B, n, ...]` back to packed `[N, ...]`."""
    place, _ = token_places(side)
    return padded.flatten(0, 1)[place]


def token_places(side: Side) -> tuple[Tensor, Tensor]:
    """Where each packed token stands in a `[B, n]` grid (flat), and the grid's mask."""
    within = places_within(side)
    n = int(within.max()) + 1 if len(side) else 0
    place = side.sample * n + within
    mask = torch.zeros(side.sequences * n, dtype=torch.bool, device=side.sample.device)
    mask[place] = True
    return place, mask.view(side.sequences, n)


def places_within(side: Side) -> Tensor:
    """The place of each packed token among those of its sequence, from 0 [N]."""
    count = torch.bincount(side.sample, minlength=side.sequences)
    first = count.cumsum(0) - count
    return torch.arange(len(side), device=side.sample.device) - first[side.sample]
