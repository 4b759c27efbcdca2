"""LoRA on a model in place: what is trained, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.errors import ModelError
from kdzoo.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, add_adapter, add_lora, merge_adapter, save_adapter
from kdzoo.quiet import quiet
from kdzoo.recipe.model import Lora
from kdzoo.step.capture import capture
from kdzoo.testing.tiny import save_tiny_model, tiny_batch
from kdzoo_model_adapters import GPT2, Llama, Mixtral, Qwen2MoE

V = 61
SHAPES: dict[str, ModelAdapter] = {"gpt2": GPT2(), "llama": Llama(), "mixtral": Mixtral()}
LORA = Lora(rank=3, alpha=5, dropout=0.1)
FAMILIES = pytest.mark.parametrize("family", SHAPES)
IDS = torch.arange(24).reshape(2, 12) % V


@pytest.fixture
def base(tmp_path: Path, family: str) -> Path:
    save_tiny_model(tmp_path / "base", family, V, seed=1)
    return tmp_path / "base"


@pytest.fixture
def family() -> str:
    return "gpt2"


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(folder: Path, family: str, lora: Lora = LORA) -> PreTrainedModel:
    """The model with an adapter that has learnt something."""
    model = opened(folder)
    model = add_lora(model, SHAPES[family], lora, 7, "student.lora").eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def saved(model: PreTrainedModel, out: Path, base: Path, lora: Lora = LORA) -> Path:
    save_adapter(out, base, str(base), lora, {name: p.detach() for name, p in trained(model).items()})
    return out


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


@FAMILIES
def test_only_the_adapters_train_and_the_head_is_none_of_them(base: Path, family: str) -> None:
    model = opened(base)
    before = logits(model)
    model = add_lora(model, SHAPES[family], LORA, 7, "student.lora").eval()
    assert type(model).__name__ == type(opened(base)).__name__
    torch.testing.assert_close(logits(model), before)
    names = trained(model)
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert not SHAPES[family].head(model).weight.requires_grad


@FAMILIES
def test_a_model_adapter_finds_every_site_of_an_adapted_model(base: Path, family: str) -> None:
    model, model_adapter = adapted(base, family), SHAPES[family]
    side = tiny_batch([(4, 9, 7)], V, V, True).student
    assert side is not None
    sites = capture(model, model_adapter, side, {"hidden.last", "hidden.0", "embed.input"})
    plain = capture(opened(base), model_adapter, side, {"hidden.last", "hidden.0", "embed.input"})
    assert (sites["hidden.last"] - plain["hidden.last"]).abs().max() > 1e-2
    torch.testing.assert_close(sites["embed.input"], plain["embed.input"])
    model.train()
    sites["hidden.last"].pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())


@pytest.mark.parametrize("targets", ["all-linear", None])
@FAMILIES
def test_live_merged_and_reloaded_adapters_say_the_same(
    tmp_path: Path, base: Path, family: str, targets: str | None
) -> None:
    from peft import PeftModel

    own = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    lora = LORA if targets else LORA.model_copy(update={"targets": own})
    live = adapted(base, family, lora)
    folder = saved(live, tmp_path / "adapter", base, lora)
    expected = logits(live)
    assert (expected - logits(opened(base))).abs().max() > 0.1

    merge_adapter(opened(base), folder, "adapter").save_pretrained(tmp_path / "merged")
    merged = opened(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    beside = opened(base)
    beside = add_adapter(beside, SHAPES[family], folder, "adapter").eval()
    with quiet():
        by_peft = PeftModel.from_pretrained(opened(base), str(folder)).eval()
    for model in (merged, beside, by_peft):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    greedy = [
        model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for model in (live, merged, beside, by_peft)
    ]
    assert all(torch.equal(answer, greedy[0]) for answer in greedy)
    assert json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(base)


def test_all_linear_leaves_a_mixture_of_experts_alone(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "qwen2_moe", V, seed=1)
    model = add_lora(opened(tmp_path / "base"), Qwen2MoE(), LORA, 7, "student.lora")
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    save_tiny_model(tmp_path / "mixtral", "mixtral", V, seed=1)
    with pytest.raises(ModelError, match=r"l\.targets: a mixture's experts and router are no linear modules; take"):
        add_lora(opened(tmp_path / "mixtral"), Mixtral(), Lora(targets=["gate"]), 7, "l")


def test_the_start_is_the_same_for_the_same_seed_alone(base: Path) -> None:
    def started(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)
        model = opened(base)
        return next(iter(trained(add_lora(model, GPT2(), LORA, seed, "l")).values())).detach()

    assert torch.equal(started(1), started(1))
    assert not torch.equal(started(1), started(2))


def test_adapters_have_the_models_dtype(base: Path) -> None:
    model = opened(base).bfloat16()
    model = add_lora(model, GPT2(), LORA, 1, "student.lora")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_atn"], r"student.lora.targets: the model has no module 'c_atn', did you mean 'c_attn'\?"),
        (["c_attn", "zzz"], r"the model has no module 'zzz'; its linear modules are 'c_attn', 'c_fc', 'c_proj', 'lm_h"),
        (["ln_1"], r"student.lora.targets: cannot carry an adapter \(Target module LayerNorm"),
        (["lm_head"], r"student.lora.targets: 'lm_head' is the head or tied to it, where LoRA cannot stand; take it o"),
        (["c_attn", "wte"], r"student.lora.targets: 'transformer.wte' is the head or tied to it"),
    ],
)
def test_targets_that_cannot_be_are_refused_in_one_line(base: Path, targets: list[str], message: str) -> None:
    model = opened(base)
    with pytest.raises(ModelError, match=message) as caught:
        add_lora(model, GPT2(), Lora(targets=targets), 0, "student.lora")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", ["another width", "another family", "a part of it"])
def test_an_adapter_of_another_model_is_refused_in_one_line(tmp_path: Path, base: Path, other: str) -> None:
    folder = saved(adapted(base, "gpt2"), tmp_path / "adapter", base)
    if other == "a part of it":
        weights = load_file(folder / ADAPTER_WEIGHTS)
        save_file(dict(list(weights.items())[1:]), folder / ADAPTER_WEIGHTS)
        target = base
    else:
        sizes = {"n_embd": 16} if other == "another width" else {}
        save_tiny_model(tmp_path / "other", "gpt2" if sizes else "llama", V, seed=1, **sizes)
        target = tmp_path / "other"
    for load in (merge_adapter, lambda model, *rest: add_adapter(model, SHAPES[model.config.model_type], *rest)):
        with pytest.raises(ModelError, match=r"teacher\.adapter\.name: '.*adapter' does not fit the model") as caught:
            load(opened(target), folder, "teacher.adapter.name")
        assert "\n" not in str(caught.value)


def test_an_adapter_of_another_kind_is_refused(tmp_path: Path, base: Path) -> None:
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    with quiet():
        get_peft_model(opened(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"t: '.*adapter' is an adapter of the kind IA3, not LoRA"):
        merge_adapter(opened(base), tmp_path / "adapter", "t")
