"""Fused experts of a sharded teacher are those of plain torch, whatever tokens a rank has and whoever asked before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdzoo import Fusion, Side
from kdzoo.testing.ranks import on_ranks
from kdzoo.testing.tiny import save_tiny_model, tiny_batch

V = 61
LENGTHS = [[(3, 40, 40), (5, 17, 17)], [(6, 1, 1)], []]
"""The sequences of three calls' batches; ranks take them in turn: 57 tokens, one token, none."""
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
CALLS: list[tuple[str, ...]] = [
    ("fused.attention", "fused.router", "hidden.last"),
    ("hidden.last",),
    ("fused.attention",),
    ("fused.router", "hidden.last"),
    ("hidden.0", "hidden.last"),
    ("fused.attention", "fused.router", "fused.early", "experts.last", "router.0"),
    ("hidden.last",),
]
"""What the calls ask for, one after the other: with experts, without, and again."""


def batch(call: int, rank: int) -> Side:
    side = tiny_batch(LENGTHS[(call + rank) % 3], V, V, same_tokens=True, seed=10 * call + rank).teacher
    assert side is not None
    return side


def fusions(registry: Any) -> dict[str, Any]:
    slots = {"attention": "expert_attention", "router": "router_weighted", "early": "expert_attention"}
    made = {name: registry.of(Fusion)[use] for name, use in slots.items()}
    return {name: kind(kind.Params(layer=0 if name == "early" else -1)) for name, kind in made.items()}


def engine(folder: Path) -> dict[str, Any]:
    """Every call's sites on this rank, and the shapes of the teacher's parameters after each."""
    from kdzoo.engine.distributed import rank
    from kdzoo.engine.frozen import FrozenModel
    from kdzoo.plugin.registry import load_plugins

    registry = load_plugins()
    teacher = FrozenModel(folder, registry.model_adapters, "fp32", CONFIG, torch.device("cpu"), fusions(registry))
    found, shapes = [], []
    for call, sites in enumerate(CALLS):
        found.append({name: value.clone() for name, value in teacher.sites(batch(call, rank()), sites).items()})
        shapes.append({tuple(p.shape) for p in teacher.model.parameters()})
    sharded = all(p.ds_numel > 0 for p in teacher.model.parameters())
    teacher.close()
    return {"found": found, "shapes": shapes, "sharded": sharded}


def plain_torch(folder: Path, rank: int) -> list[dict[str, Tensor]]:
    from transformers import AutoModelForCausalLM

    from kdzoo.plugin.registry import load_plugins
    from kdzoo.step.capture import capture

    registry = load_plugins()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    adapter = registry.model_adapters[model.config.model_type]
    with torch.no_grad():
        return [
            capture(model, adapter, batch(call, rank), sites, fusions(registry)) for call, sites in enumerate(CALLS)
        ]


FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def engines(folder: Path) -> dict[str, dict[str, Any]]:
    """Of every family: starting ranks takes longer than their calls."""
    return {family: engine(folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    for family in FAMILIES:
        save_tiny_model(folder / family, family, V, seed=2)
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def results(request: pytest.FixtureRequest, teachers: Path) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(request.param, teachers / f"ranks{request.param}", engines, teachers)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_states_equal_plain_torch_on_one_and_two_ranks(
    teachers: Path, results: list[dict[str, dict[str, Any]]], family: str
) -> None:
    for rank, found in enumerate(results):
        result = found[family]
        assert result["sharded"]
        assert result["shapes"] == [{(0,)}] * len(CALLS), "a parameter of the teacher stays gathered after a call"
        for call, expected in enumerate(plain_torch(teachers / family, rank)):
            sites = result["found"][call]
            assert sites.keys() == expected.keys()
            for name, value in expected.items():
                assert len(value) == len(batch(call, rank))
                torch.testing.assert_close(sites[name], value, rtol=1e-5, atol=1e-5, msg=f"call {call}: {name}")
