"""LoRA adapters, through peft, which is imported only where a recipe has one.

An adapter is put into a model in place: around its linear modules stand peft's, and everything else keeps the name
and the place that its family gave it. So a model adapter finds the parts of a model with LoRA as it does
without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.errors import ModelError, did_you_mean
from kdzoo.peft_private import ADAPTER, adapted_modules, as_wrapped, config_of, is_adapted
from kdzoo.quiet import quiet
from kdzoo.recipe.model import Lora
from kdzoo.transformers_private import Conv1D

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def add_lora(
    model: PreTrainedModel, model_adapter: ModelAdapter, lora: Lora, seed: int, address: str
) -> PreTrainedModel:
    """`model` with a new adapter, which alone is trained, in the model's dtype. It starts as nothing: B is zero.

    Raises `ModelError` where the targets are no modules of this model, or none that an adapter may stand on.
    """
    address = f"{address}.targets"
    if isinstance(lora.targets, list):
        _check_names(model, lora.targets, address)
    targets = lora.targets if isinstance(lora.targets, list) else all_linear(model, model_adapter)
    with torch.random.fork_rng(devices=[]), _one_line(f"{address}: cannot carry an adapter"):
        torch.manual_seed(seed)  # peft draws A on the CPU: the same on every rank
        wrapped = _wrapped(model, _config(model, lora, targets))
    _check_place(wrapped, model_adapter, address, "take it out")
    return wrapped.get_base_model()


def add_adapter(model: PreTrainedModel, model_adapter: ModelAdapter, folder: Path, address: str) -> PreTrainedModel:
    """`model` with the adapter in `folder` beside its weights; refused where it stands on more than linear modules."""
    wrapped = _loaded(model, folder, address, in_float32=False)
    _check_place(wrapped, model_adapter, address, "merge the adapter")
    return wrapped.get_base_model()


def merge_adapter(model: PreTrainedModel, folder: Path, address: str) -> PreTrainedModel:
    """`model` with the adapter in `folder` added to its weights, computed in float32; nothing of peft is left."""
    with quiet():
        return _loaded(model, folder, address, in_float32=True).merge_and_unload()


def save_adapter(out: Path, base: Path, named: str, lora: Lora, state: Mapping[str, Tensor]) -> None:
    """An adapter folder as peft writes it. `state` has the trained weights under the names that `add_lora` gave them.

    `base` is the folder of the model that it belongs to, `named` what a reader is told to load.
    """
    from peft import get_peft_model_state_dict

    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        adapted = adapted_modules(state)
        wrapped = _wrapped(model, _config(model, lora, lora.targets if isinstance(lora.targets, list) else adapted))
    config = config_of(wrapped)
    config.base_model_name_or_path, config.inference_mode = named, True
    weights = get_peft_model_state_dict(wrapped, state_dict=as_wrapped(state), save_embedding_layers=False)
    assert len(weights) == len(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, out / ADAPTER_WEIGHTS, {"format": "pt"})
    config.save_pretrained(out)


def all_linear(model: PreTrainedModel, model_adapter: ModelAdapter) -> list[str]:
    """The linear modules below the head, but for those of a mixture of experts.

    peft takes the names in a mixture for those of its experts, and would change parameters that are no modules.
    """
    blocks = range(len(model_adapter.blocks(model)))
    mixtures = [mixture.block for block in blocks if (mixture := model_adapter.mixture(model, block)) is not None]
    apart = {id(part) for mixture in mixtures for part in mixture.modules()}
    below = {id(part) for part in model_adapter.backbone(model).modules()} - apart
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D) and id(part) in below]


def _config(model: PreTrainedModel, lora: Lora, targets: Sequence[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]  # any number serves
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        # GPT-2 stores its matrices the other way round.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def _wrapped(model: PreTrainedModel, config: Any, in_float32: bool = False) -> Any:
    from peft import get_peft_model

    with quiet():
        return get_peft_model(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=in_float32)


def _loaded(model: PreTrainedModel, folder: Path, address: str, in_float32: bool) -> Any:
    from peft import LoraConfig, PeftConfig

    with quiet(), _one_line(f"{address}: '{folder}' does not fit the model"):
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ModelError(f"{address}: '{folder}' is an adapter of the kind {config.peft_type.value}, not LoRA")
        wrapped = _wrapped(model, config, in_float32)
        result = wrapped.load_adapter(
            str(folder),
            ADAPTER,
            torch_device="cpu",
            autocast_adapter_dtype=in_float32,
            low_cpu_mem_usage=next(model.parameters()).is_meta,
        )
    strange = [*result.unexpected_keys, *result.missing_keys]
    if strange:
        what = "has no place in it" if result.unexpected_keys else "is missing"
        raise ModelError(f"{address}: '{folder}' does not fit the model ('{strange[0]}' {what}); give its own adapter")
    return wrapped


def _check_names(model: nn.Module, targets: Sequence[str], address: str) -> None:
    """Each must match a module, at its end, as peft reads it; peft itself is content where one of them does."""
    names = [name for name, _ in model.named_modules()]
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            hint = did_you_mean(target, linear) or f"; its linear modules are {', '.join(map(repr, sorted(linear)))}"
            raise ModelError(f"{address}: the model has no module '{target}'{hint}")


def _check_place(wrapped: Any, model_adapter: ModelAdapter, address: str, advice: str) -> None:
    """Refuse an adapter that would not be seen, or not be whole where the model is sharded.

    The pass over the vocabulary reads the head's matrix and never calls its module; a mixture's parameters are read by
    their own module, sharded or not.
    """
    if config_of(wrapped).target_parameters:
        raise ModelError(f"{address}: a mixture's experts and router are no linear modules; {advice}")
    model = wrapped.get_base_model()
    head = {id(parameter) for parameter in model_adapter.head(model).parameters}
    for name, module in model.named_modules():
        if is_adapted(module) and any(id(parameter) in head for parameter in module.parameters()):
            raise ModelError(f"{address}: '{name}' is the head or tied to it, where LoRA cannot stand; {advice}")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever peft says against a model, an adapter's files or its targets, in one line."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, KeyError, OSError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        # torch lists what does not fit below a line that says that something does not.
        raise ModelError(f"{what} ({'; '.join(lines[:2]) or type(error).__name__})") from error
