"""Sites of experts, through real models of every family that mixes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kdzoo import Experts, Fusion, FusionParams, ModelAdapter
from kdzoo.api.batch import Side
from kdzoo.errors import KdzooError
from kdzoo.step.capture import capture
from kdzoo.testing.tiny import tiny_batch, tiny_model
from kdzoo_fusions import ExpertAttention, ExpertMean, RouterWeighted
from kdzoo_model_adapters import Llama, Mixtral, Qwen2MoE, QwenMoE, Routed

V, E, D = 61, 4, 48
LENGTHS = [(4, 9, 9), (6, 1, 1), (3, 14, 14)]
TOKENS, POSITIONS = 24, 51
ADAPTERS: dict[str, ModelAdapter] = {f: kind() for kind in (Mixtral, Routed, QwenMoE, Qwen2MoE) for f in kind.families}
MODELS = [
    ("mixtral", {}),
    *((family, {"norm_topk_prob": norm}) for family in ("olmoe", "qwen2_moe", "qwen3_moe") for norm in (True, False)),
]

each_model = pytest.mark.parametrize(
    ("family", "settings"), MODELS, ids=[f"{family} {settings}" if settings else family for family, settings in MODELS]
)
each_precision = pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)


def model_of(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = tiny_model(family, V, **settings).to(dtype).eval()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product of Transformers has no float64
    return model


def side_of(lengths: list[tuple[int, int, int]] = LENGTHS) -> Side:
    side = tiny_batch(lengths, V, V, same_tokens=True).teacher
    assert side is not None
    return side


def slot(fusion: type[Fusion] = RouterWeighted, **params: Any) -> dict[str, Fusion]:
    return {"x": fusion(fusion.Params(**params))}


def captured(model: Any, sites: list[str], fusions: dict[str, Fusion] | None = None, side: Side | None = None) -> Any:
    with torch.no_grad():
        adapter = ADAPTERS.get(model.config.model_type, Llama())
        return capture(model, adapter, side_of() if side is None else side, sites, fusions or {})


def block_inputs(model: Any, layer: int) -> Tensor:
    """What router and experts of block `layer` read, [B * T, D]."""
    kept: list[Tensor] = []
    handle = model.model.layers[layer].mlp.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    side = side_of()
    with torch.no_grad():
        model(input_ids=side.input_ids, attention_mask=side.attention_mask, use_cache=False)
    handle.remove()
    return kept[0].flatten(0, 1)


def outputs_of(mlp: Any, x: Tensor) -> Tensor:
    """Every expert's own output [n, E, D], straight from its weights."""
    found = []
    for up_and_gate, down in zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True):
        gate, up = up_and_gate[: len(up_and_gate) // 2], up_and_gate[len(up_and_gate) // 2 :]
        found.append((silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return torch.stack(found, 1).detach()


@each_precision
@each_model
def test_weighing_experts_as_the_router_does_gives_the_models_own_state(
    family: str, settings: dict[str, Any], dtype: torch.dtype, close: float
) -> None:
    model = model_of(family, dtype, **settings)
    found = captured(model, ["fused.x", "hidden.last"], slot())
    assert found["fused.x"].shape == (TOKENS, D)
    torch.testing.assert_close(found["fused.x"], found["hidden.last"], rtol=0, atol=close)
    other = captured(model, ["fused.x"], slot(ExpertMean))["fused.x"]
    assert (other - found["hidden.last"]).abs().max() > 0.1, "the experts decide nothing: the test shows nothing"


@each_precision
@each_model
def test_experts_and_router_of_a_block_are_their_own_formulas(
    family: str, settings: dict[str, Any], dtype: torch.dtype, close: float
) -> None:
    model, tokens = model_of(family, dtype, **settings), side_of().positions
    found = captured(model, ["experts.last", "router.last", "experts.0", "router.0"])
    for name, layer in (("last", 1), ("0", 0)):
        mlp, x = model.model.layers[layer].mlp, block_inputs(model, layer)[tokens]
        torch.testing.assert_close(found[f"experts.{name}"], outputs_of(mlp, x), rtol=close, atol=close)
        torch.testing.assert_close(found[f"router.{name}"], (x @ mlp.gate.weight.T).detach(), rtol=close, atol=close)


@each_model
def test_the_routers_weights_are_what_the_model_itself_uses(family: str, settings: dict[str, Any]) -> None:
    seen: list[Experts] = []

    class Spy(RouterWeighted):
        def fuse(self, experts: Experts) -> Tensor:
            seen.append(experts)
            return super().fuse(experts)

    captured(model_of(family, **settings), ["fused.x"], slot(Spy))
    (experts,) = seen
    probabilities = experts.logits.double().softmax(-1)
    kept, which = probabilities.topk(2)
    if settings.get("norm_topk_prob", True):
        kept = kept / kept.sum(-1, keepdim=True)
    expected = torch.zeros_like(probabilities).scatter(1, which, kept)
    torch.testing.assert_close(experts.weights.double(), expected, rtol=1e-5, atol=1e-6)


@each_model
def test_every_position_is_there_where_asked_for_and_only_there(family: str, settings: dict[str, Any]) -> None:
    model, side = model_of(family, **settings), side_of()
    names = ["experts.last", "router.last", "fused.x", "hidden.last"]
    shapes = {"experts.last": (E, D), "router.last": (E,), "fused.x": (D,), "hidden.last": (D,)}
    packed = captured(model, names, slot())
    everywhere = captured(model, [f"{name}@all" for name in names], slot())
    both = captured(model, [*names, *(f"{name}@all" for name in names)], slot())
    for name in names:
        assert packed[name].shape == (TOKENS, *shapes[name])
        assert everywhere[f"{name}@all"].shape == (POSITIONS, *shapes[name])
        torch.testing.assert_close(everywhere[f"{name}@all"][side.positions], packed[name], rtol=1e-5, atol=1e-5)
        for one in (name, f"{name}@all"):
            torch.testing.assert_close(both[one], (packed | everywhere)[one], rtol=1e-5, atol=1e-5)
    real = side.attention_mask.flatten() == 1
    torch.testing.assert_close(both["fused.x@all"][real], both["hidden.last@all"][real], rtol=0, atol=1e-5)


@each_model
def test_only_scored_tokens_are_computed(
    family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = model_of(family, **settings), []
    for layer in model.model.layers:
        forward = layer.mlp.experts.forward

        def spy(x: Tensor, *routing: Tensor, forward: Any = forward) -> Tensor:
            seen.append(len(x))
            return forward(x, *routing)

        monkeypatch.setattr(layer.mlp.experts, "forward", spy)
    captured(model, ["fused.x", "experts.last", "router.last"], slot())
    assert sorted(seen) == sorted([POSITIONS, POSITIONS, E * TOKENS])


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_modules_with_weights_are_called_as_without_experts(family: str) -> None:
    """What the sharded engine sees. (Qwen2-MoE's shared expert does run twice: inside a block that is whole.)"""
    model, called = model_of(family), []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters()):
            module.register_forward_pre_hook(lambda _module, _args, name=name: called.append(name))
    captured(model, ["hidden.last"])
    without, called[:] = tuple(called), []
    captured(model, ["fused.x", "experts.0", "router.last"], slot(ExpertAttention))
    assert tuple(called) == without


@each_model
def test_a_batch_without_tokens_gives_none(family: str, settings: dict[str, Any]) -> None:
    names = ["fused.x", "experts.last", "router.last", "hidden.last"]
    fusions = slot(ExpertAttention)
    for lengths in ([], [(5, 0, 0), (3, 0, 0)]):
        found = captured(model_of(family, **settings), names, fusions, side_of(lengths))
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        assert shapes == {
            "fused.x": (0, D),
            "fused.x/self_attention": (0,),
            "experts.last": (0, E, D),
            "router.last": (0, E),
            "hidden.last": (0, D),
        }


@pytest.mark.parametrize("fusion", [ExpertAttention, ExpertMean, RouterWeighted], ids=lambda fusion: fusion.name)
@each_model
def test_alone_is_the_fused_output_and_nothing_else(
    family: str, settings: dict[str, Any], fusion: type[Fusion]
) -> None:
    model, fusions = model_of(family, **settings), slot(fusion, into="alone")
    seen: list[Tensor] = []

    class Spy(fusion):  # type: ignore[misc, valid-type]
        def fuse(self, experts: Experts) -> Tensor:
            seen.append(fusions["x"].fuse(experts))
            return seen[-1]

    found = captured(model, ["fused.x", "experts.last"], {"x": Spy(fusions["x"].params)})
    torch.testing.assert_close(found["fused.x"], seen[0], rtol=0, atol=0)
    if fusion is ExpertMean:
        torch.testing.assert_close(found["fused.x"], found["experts.last"].mean(1), rtol=1e-5, atol=1e-5)


@each_model
def test_another_block_goes_through_the_final_norm_too(family: str, settings: dict[str, Any]) -> None:
    model = model_of(family, **settings)
    for layer in (0, -2):
        found = captured(model, ["fused.x", "hidden.0"], slot(layer=layer))
        with torch.no_grad():
            expected = model.model.norm(found["hidden.0"])
        torch.testing.assert_close(found["fused.x"], expected, rtol=0, atol=1e-5)


def test_two_slots_of_two_blocks_do_not_mix() -> None:
    model = model_of("qwen2_moe")
    fusions: dict[str, Fusion] = {
        "first": ExpertAttention(FusionParams(layer=0, into="alone")),
        "last": ExpertMean(FusionParams()),
    }
    both = captured(model, ["fused.first", "fused.last"], fusions)
    for name in fusions:
        torch.testing.assert_close(both[f"fused.{name}"], captured(model, [f"fused.{name}"], fusions)[f"fused.{name}"])


def test_what_a_fusion_watches_comes_with_it() -> None:
    model = model_of("mixtral")
    found = captured(model, ["fused.x", "experts.last"], slot(ExpertAttention))
    e = found["experts.last"].double()
    alpha = torch.einsum("nmd,njd->nmj", e, e).div(D**0.5).softmax(-1)
    expected = torch.stack([alpha[:, m, m] for m in range(E)]).mean(0)
    torch.testing.assert_close(found["fused.x/self_attention"].double(), expected, rtol=1e-5, atol=1e-6)
    assert captured(model, ["fused.x@all"], slot(ExpertAttention)).keys() == {"fused.x@all"}


def test_the_model_is_left_as_it_was() -> None:
    def hooks(model: nn.Module) -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    model = model_of("qwen3_moe")
    before = captured(model, ["hidden.last"])["hidden.last"]
    count = hooks(model)
    during = captured(model, ["fused.x", "experts.0", "hidden.last"], slot(ExpertAttention))["hidden.last"]
    assert during.equal(before)
    assert hooks(model) == count
    assert captured(model, ["hidden.last"])["hidden.last"].equal(before)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("fused.y", "site 'fused.y': the recipe's 'fuse' has no 'y'"),
        ("fused.far", "site 'fused.far': the model has 2 blocks, counted from 0"),
        ("experts.2", "site 'experts.2': the model has 2 blocks, counted from 0"),
        ("router.-3", "site 'router.-3': the model has 2 blocks, counted from 0"),
        ("experts.first", "site 'experts.first': no such site; there are "),
        ("fused.", "site 'fused.': no such site; there are "),
        ("fused.x@some", "site 'fused.x@some': no such site; there are "),
    ],
)
def test_a_site_that_is_not_there_is_one_line(site: str, message: str) -> None:
    fusions: dict[str, Fusion] = slot() | {"far": ExpertMean(FusionParams(layer=5))}
    with pytest.raises(KdzooError) as caught:
        captured(model_of("mixtral"), [site], fusions)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("site", ["fused.x", "experts.1", "experts.last", "router.-1"])
def test_a_dense_block_has_no_experts(site: str) -> None:
    model = model_of("qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(KdzooError) as caught:
        captured(model, [site], slot())
    assert str(caught.value) == f"site '{site}': block 1 of the model has no experts"
    assert captured(model, ["experts.0"])["experts.0"].shape == (TOKENS, E, D)


def test_a_family_without_experts_has_none() -> None:
    with pytest.raises(KdzooError, match=r"^site 'fused\.x': block 1 of the model has no experts$"):
        captured(model_of("llama"), ["fused.x"], slot())
