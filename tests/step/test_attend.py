"""Attention to the teacher's tokens of a sequence: in blocks, and equal to what it is without them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from settings import make_side
from torch import Tensor

from kdzoo import Side, ops

A, WIDTH = 4, 3
TOKENS = [
    ([4, 1, 6], [5, 1, 3]),
    ([3], [7]),
    ([4, 2, 6], [5, 0, 3]),  # a sequence without keys
    ([4, 0, 6], [5, 2, 3]),  # a sequence without queries
    ([0, 3, 0], [2, 0, 0]),  # neither meets the other
    ([4, 2], [0, 0]),
    ([0, 0], [4, 2]),
    ([0], [0]),
]
IN_EVERY_SHAPE = pytest.mark.parametrize("tokens", TOKENS, ids=str)


def make(tokens: tuple[Sequence[int], Sequence[int]], dtype: torch.dtype = torch.float64) -> tuple[Side, Side, list]:
    """Both sides, and leaves: queries [N, A], keys [M, A], values [M, width]."""
    torch.manual_seed(0)
    student, teacher = make_side(tokens[0], 9), make_side(tokens[1], 9)
    shapes = (len(student), A), (len(teacher), A), (len(teacher), WIDTH)
    return student, teacher, [(2 * torch.randn(*s, dtype=dtype)).requires_grad_() for s in shapes]


def plain(query: Tensor, keys: Tensor, values: Tensor, student: Side, teacher: Side) -> tuple[Tensor, Tensor]:
    """Sequence by sequence."""
    mixed, entropies = [values.new_zeros(0, values.shape[1])], [values.new_zeros(0)]
    for b in range(student.sequences):
        q, k, v = query[student.sample == b], keys[teacher.sample == b], values[teacher.sample == b]
        weights = (q @ k.T / A**0.5).softmax(-1)
        mixed.append(weights @ v)
        entropies.append(-(weights * weights.log()).sum(-1))
    return torch.cat(mixed), torch.cat(entropies)


def gradients(mixed: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    towards = torch.randn(mixed.shape, dtype=torch.float64).to(mixed.dtype)
    found = torch.autograd.grad((mixed * towards).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@IN_EVERY_SHAPE
@pytest.mark.parametrize("block_bytes", [1, 100, 300, ops.ATTENTION_BYTES])
def test_it_is_attention_within_each_sequence(tokens, block_bytes):
    student, teacher, leaves = make(tokens)
    mixed, entropy = ops.attend(*leaves, student, teacher, block_bytes=block_bytes)
    expected, expected_entropy = plain(*leaves, student, teacher)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(entropy, expected_entropy.detach())
    for ours, theirs in zip(gradients(mixed, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@IN_EVERY_SHAPE
def test_entropies_carry_no_gradient(tokens):
    student, teacher, leaves = make(tokens)
    for block_bytes in (1, ops.ATTENTION_BYTES):
        assert not ops.attend(*leaves, student, teacher, block_bytes=block_bytes)[1].requires_grad


def test_a_sequence_without_keys_gives_zeros():
    student, teacher, leaves = make(([4, 2, 6], [5, 0, 3]))
    mixed, entropy = ops.attend(*leaves, student, teacher)
    assert (mixed[student.sample == 1] == 0).all() and (entropy[student.sample == 1] == 0).all()
    assert (gradients(mixed, leaves)[0][student.sample == 1] == 0).all()


@pytest.mark.parametrize("tokens", [([4, 2], [0, 0]), ([0, 0], [4, 2]), ([0], [0])], ids=str)
def test_where_there_is_nothing_the_graph_is_whole(tokens):
    """Every rank must train the same modules, also one without tokens."""
    student, teacher, leaves = make(tokens)
    mixed, _ = ops.attend(*leaves, student, teacher)
    found = torch.autograd.grad(mixed.sum(), leaves, allow_unused=True)
    assert all(gradient is not None and (gradient == 0).all() for gradient in found)


def blocks_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    checkpoint = ops.checkpoint

    def counted(function, part, *args, **options):  # type: ignore[no-untyped-def]
        seen.append(part.shape[1])
        return checkpoint(function, part, *args, **options)

    monkeypatch.setattr(ops, "checkpoint", counted)
    return seen


@pytest.mark.parametrize(("size", "blocks"), [(1, [1] * 6), (2, [2, 2, 2]), (4, [4, 2]), (5, [5, 1]), (6, []), (9, [])])
def test_blocks_of_any_size_give_the_same(size, blocks, monkeypatch):
    student, teacher, leaves = make(TOKENS[0])
    whole, entropy = ops.attend(*leaves, student, teacher)
    seen = blocks_seen(monkeypatch)
    one_query = 3 * 5 * 8  # its scores in every sequence, padded
    found, found_entropy = ops.attend(*leaves, student, teacher, block_bytes=size * one_query)
    assert seen == blocks
    torch.testing.assert_close(found, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found_entropy, entropy, rtol=1e-13, atol=1e-13)
    for ours, theirs in zip(gradients(found, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [1, ops.ATTENTION_BYTES])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_even_and_one_sided_attention(scale, size):
    """All scores equal: the mean, and log M. One far above the others: its value, and no entropy."""
    student, teacher = make_side([2, 1], 9), make_side([3, 4], 9)
    query = torch.ones(3, A)
    keys = scale * torch.tensor([1.0, 2, 3, 8, 6, 5, 4])[:, None].expand(7, A)
    values = torch.arange(7.0)[:, None]
    mixed, entropy = ops.attend(query, keys, values, student, teacher, block_bytes=size)
    if scale == 0:
        assert mixed.flatten().tolist() == pytest.approx([1, 1, 4.5])
        assert entropy.tolist() == pytest.approx([torch.tensor(n).log().item() for n in (3.0, 3.0, 4.0)])
    if scale == 1e4:
        assert mixed.flatten().tolist() == [2, 2, 3] and entropy.tolist() == [0, 0, 0]
    assert mixed.isfinite().all() and entropy.isfinite().all()


@pytest.mark.parametrize("block_bytes", [1, 100, ops.ATTENTION_BYTES])
@pytest.mark.parametrize("tokens", [TOKENS[0], TOKENS[2], TOKENS[3]], ids=str)
def test_bfloat16_stays_near_float64(tokens, block_bytes):
    student, teacher, leaves = make(tokens, torch.bfloat16)
    mixed, entropy = ops.attend(*leaves, student, teacher, block_bytes=block_bytes)
    assert mixed.dtype == torch.bfloat16 and entropy.dtype == torch.float32
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected, expected_entropy = plain(*exact, student, teacher)
    if tokens == TOKENS[2]:
        expected_entropy = expected_entropy.nan_to_num()
    torch.testing.assert_close(mixed.double(), expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(entropy.double(), expected_entropy.detach(), rtol=0.03, atol=0.03)
    for ours, theirs in zip(gradients(mixed, leaves), gradients(expected, exact), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=0.06, atol=0.06)


# Memory.


def peak(sequences: int, tokens: int, low: int = 64) -> int:
    """The most bytes that attention and its backward pass hold at once, beyond their inputs."""
    student, teacher = make_side([tokens] * sequences, 9), make_side([tokens] * sequences, 9)
    leaves = [torch.randn(sequences * tokens, low).requires_grad_() for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.attend(*leaves, student, teacher)[0].sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    events = profile.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.slow
@pytest.mark.parametrize(("sequences", "tokens"), [(1, 4096), (1, 8192), (8, 4096)])
def test_memory_does_not_grow_with_queries_times_keys(sequences, tokens):
    # Scores, weights and gradients of one block; padded inputs, results and gradients of [tokens, 64].
    bound = 5 * ops.ATTENTION_BYTES + 10 * sequences * tokens * 64 * 4
    assert peak(sequences, tokens) < bound
    scores_and_weights = 2 * sequences * tokens * tokens * 4  # in float32, kept for the way back: without blocks
    assert bound < 0.75 * scores_and_weights
    assert tokens == sequences * 4096 or bound < 0.2 * scores_and_weights
