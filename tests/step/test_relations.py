"""Relations between positions, in blocks of rows: the memory that they take."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from kdzoo import Heads, Side, ops

HEADS, SIZE = 8, 16


def peak(sequences: int, tokens: int) -> int:
    """The most bytes that relations and their backward pass hold at once, beyond their inputs."""
    ids = torch.zeros(sequences, tokens, dtype=torch.long)
    at = torch.arange(ids.numel())
    side = Side(ids, torch.ones_like(ids), at, ids.flatten(), ids.flatten(), at // tokens, torch.full_like(at, -1))
    query, key, *teacher = (torch.randn(ids.numel(), HEADS, SIZE) for _ in range(4))
    student = ops.Relation(query.requires_grad_(), key.requires_grad_())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.relation_distance(student, ops.Relation(*teacher), side, "kl", causal=True).sum().backward()
    assert query.grad is not None and key.grad is not None
    events = profile.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.slow
@pytest.mark.parametrize(("sequences", "tokens"), [(1, 2048), (4, 1024)])
def test_memory_does_not_grow_with_rows_times_positions(sequences, tokens):
    # Scores, softmaxes and gradients of one block; padded inputs and gradients of [tokens, heads * size].
    bound = 4 * 16 * 2**20 + 10 * sequences * tokens * HEADS * SIZE * 4
    assert peak(sequences, tokens) < bound
    scores_of_both = 2 * sequences * HEADS * tokens**2 * 4  # in float32: without blocks, several times as much is kept
    assert bound < 0.35 * scores_of_both


@pytest.mark.parametrize("distance", ["kl", "mse", "mse_of_softmax"])
def test_scores_of_states_in_bfloat16_are_not_rounded_to_it(distance):
    """Gradients are as near to those of the same states in float64 as the gradient's own dtype lets them be."""
    torch.manual_seed(0)
    tokens, of = 48, Heads(4, 4, 64)
    ids, at = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)
    side = Side(ids, torch.ones_like(ids), at, ids[0], ids[0], ids[0], at)
    theirs = torch.randn(tokens, of.width)
    mine = (theirs + 0.05 * torch.randn_like(theirs)).bfloat16()

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        x, y = mine.to(dtype).requires_grad_(), theirs.bfloat16().to(dtype)
        relations = ops.relation_of(x, of, of.query), ops.relation_of(y, of, of.query)
        value = ops.relation_distance(*relations, side, distance, causal=True)
        return torch.autograd.grad(value.sum(), x)[0].double()

    exact = gradient(torch.float64)
    assert (gradient(torch.bfloat16) - exact).norm() < 0.01 * exact.norm()
