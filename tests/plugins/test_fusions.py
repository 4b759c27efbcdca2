"""The fusions against their formulas, written out one row and one expert at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdzoo import Experts, Fusion
from kdzoo_fusions import ExpertAttention, ExpertMean, ExpertRouterAll, RouterWeighted

N, E, D, K = 6, 5, 16, 2
ALL: list[type[Fusion]] = [ExpertAttention, ExpertMean, ExpertRouterAll, RouterWeighted]


def experts(*, rows: int = N, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Experts:
    """Random experts; the router's weights are those of its first K, not renormalised."""
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(rows, E, D, generator=generator, dtype=torch.float64) * size
    logits = torch.randn(rows, E, generator=generator, dtype=torch.float64)
    kept, which = logits.softmax(-1).topk(K)
    weights = torch.zeros_like(logits).scatter(1, which, kept)
    return Experts(outputs.to(dtype), logits.to(dtype), weights.to(dtype))


def alpha(outputs: list[list[float]]) -> list[list[float]]:
    """softmax_j(e_m . e_j / sqrt(D)) of one row."""
    found = []
    for e_m in outputs:
        scores = [sum(a * b for a, b in zip(e_m, e_j, strict=True)) / math.sqrt(len(e_m)) for e_j in outputs]
        powers = [math.exp(score - max(scores)) for score in scores]
        found.append([power / sum(powers) for power in powers])
    return found


def row(name: str, e: list[list[float]], z: list[float], g: list[float]) -> list[float]:
    """`fused` of one row."""
    if name == "expert_attention":
        attended = alpha(e)
        gathered = [[sum(a * e_j[d] for a, e_j in zip(row, e, strict=True)) for d in range(D)] for row in attended]
        return [sum(g_m * gathered[m][d] for m, g_m in enumerate(g)) for d in range(D)]
    powers = [math.exp(z_m) for z_m in z]
    weights = {
        "expert_mean": [1 / len(e)] * len(e),
        "expert_router_all": [power / sum(powers) for power in powers],
        "router_weighted": g,
    }[name]
    return [sum(w * e_m[d] for w, e_m in zip(weights, e, strict=True)) for d in range(D)]


def formula(name: str, given: Experts) -> Tensor:
    lists = [value.double().tolist() for value in (given.outputs, given.logits, given.weights)]
    return torch.tensor([row(name, *one) for one in zip(*lists, strict=True)], dtype=torch.float64)


def made(fusion: type[Fusion]) -> Fusion:
    return fusion(fusion.Params())


def test_the_four_of_the_ablation_are_there() -> None:
    assert [fusion.name for fusion in ALL] == [
        "expert_attention",
        "expert_mean",
        "expert_router_all",
        "router_weighted",
    ]


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("fusion", ALL, ids=lambda fusion: fusion.name)
def test_a_fusion_is_its_formula(fusion: type[Fusion], size: float) -> None:
    given = experts(size=size)
    torch.testing.assert_close(made(fusion).fuse(given), formula(fusion.name, given), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("fusion", ALL, ids=lambda fusion: fusion.name)
def test_bfloat16_experts_are_mixed_in_float32(fusion: type[Fusion]) -> None:
    given = experts(dtype=torch.bfloat16)
    found = made(fusion).fuse(given)
    assert found.dtype == torch.bfloat16
    # No more than the rounding of the result: eight bits, half of the last one.
    torch.testing.assert_close(found.double(), formula(fusion.name, given), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fusion", ALL, ids=lambda fusion: fusion.name)
def test_no_rows_give_no_rows(fusion: type[Fusion], dtype: torch.dtype) -> None:
    given = experts(rows=0, dtype=dtype)
    found = made(fusion).fuse(given)
    assert (found.shape, found.dtype) == ((0, D), dtype)
    assert all(value.shape == (0,) for value in made(fusion).watch(given).values())


@pytest.mark.parametrize("fusion", ALL, ids=lambda fusion: fusion.name)
def test_equal_experts_are_their_one_output(fusion: type[Fusion]) -> None:
    given = experts()
    same = given.outputs[:, :1].expand(-1, E, -1)
    sums_to_one = given.weights / given.weights.sum(-1, keepdim=True)
    found = made(fusion).fuse(Experts(same, given.logits, sums_to_one))
    torch.testing.assert_close(found, same[:, 0], rtol=1e-12, atol=1e-13)


def test_experts_that_attend_to_themselves_alone_are_weighted_by_the_router() -> None:
    given = experts()
    basis = torch.linalg.qr(given.outputs.transpose(1, 2)).Q.transpose(1, 2)  # [N, E, D], orthonormal
    large = Experts(basis * 100, given.logits, given.weights)
    attention = made(ExpertAttention)
    torch.testing.assert_close(attention.fuse(large), made(RouterWeighted).fuse(large), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention.watch(large)["self_attention"], torch.ones(N, dtype=torch.float64))


def test_small_experts_are_averaged_by_attention() -> None:
    given = experts(size=1e-5)
    sums_to_one = given.weights / given.weights.sum(-1, keepdim=True)
    small = Experts(given.outputs, given.logits, sums_to_one)
    found = made(ExpertAttention).fuse(small)
    torch.testing.assert_close(found, made(ExpertMean).fuse(small), rtol=0, atol=1e-13)
    share = made(ExpertAttention).watch(small)["self_attention"]
    torch.testing.assert_close(share, torch.full((N,), 1 / E, dtype=torch.float64))


def test_attention_weighs_only_what_the_router_chose() -> None:
    """An expert that nobody routes to still speaks, through those that attend to it."""
    given = experts()
    one = torch.zeros(N, E, dtype=torch.float64)
    one[:, 2] = 1
    found = made(ExpertAttention).fuse(Experts(given.outputs, given.logits, one))
    expected = [
        [sum(a * e_j[d] for a, e_j in zip(alpha(e)[2], e, strict=True)) for d in range(D)]
        for e in given.outputs.tolist()
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_attention_watches_how_much_experts_attend_to_themselves() -> None:
    given = experts()
    expected = [sum(found[m][m] for m in range(E)) / E for found in map(alpha, given.outputs.tolist())]
    watched = made(ExpertAttention).watch(given)
    assert watched.keys() == {"self_attention"}
    torch.testing.assert_close(watched["self_attention"], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("fusion", [ExpertMean, ExpertRouterAll, RouterWeighted], ids=lambda fusion: fusion.name)
def test_the_others_watch_nothing(fusion: type[Fusion]) -> None:
    assert made(fusion).watch(experts()) == {}
