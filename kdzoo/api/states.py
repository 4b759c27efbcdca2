"""How states of two widths, at the same tokens, belong together. Part of `kdzoo.ops`."""

from __future__ import annotations

import torch
from torch import Tensor


def regression_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """X'X [S + 1, S + 1] and X'Y [S + 1, D] of states x [n, S], with a column of ones, and y [n, D], in float64."""
    x, y = torch.cat([x, torch.ones_like(x[:, :1])], -1).double(), y.double()
    return x.T @ x, x.T @ y


def best_linear(gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """The weight [D, S] and bias [D] with the least squared error on the states of `regression_sums`.

    Directions in which the states do not vary, as far as float32 tells, get a weight of 0.
    """
    smallest = len(gram) * torch.finfo(torch.float32).eps
    best = torch.linalg.pinv(gram, rtol=smallest**2, hermitian=True) @ cross
    return best[:-1].T, best[-1]


def linear_cka(x: Tensor, y: Tensor, sample: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Linear CKA of states x [n, S] and y [n, D] of each sequence's tokens [B], and where there is one [B] bool.

    |Y'X|^2 / (|X'X| |Y'Y|) in Frobenius norms, X and Y less their means over the sequence: 1 where one is the other,
    turned, scaled and moved. There is none of a single token, nor where all states of a sequence are the same.
    `sample` [n]: the sequence of each token.
    """
    found = []
    for b in range(sequences):
        here = sample == b
        mine, its = (z[here] - z[here].sum(0) / here.sum().clamp_min(1) for z in (x, y))
        if len(mine) <= min(x.shape[1], y.shape[1]):  # products of tokens are the smaller ones
            of_mine, of_its = mine @ mine.T, its @ its.T
            shared = (of_mine * of_its).sum()
        else:
            of_mine, of_its = mine.T @ mine, its.T @ its
            shared = (its.T @ mine).square().sum()
        found.append(torch.stack([shared, torch.linalg.norm(of_mine) * torch.linalg.norm(of_its)]))
    shared, norms = torch.stack(found).unbind(1)
    return shared / norms.clamp_min(torch.finfo(norms.dtype).tiny), norms > 0
