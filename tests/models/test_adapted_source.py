"""Models that come with an adapter, or as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdzoo.errors import ModelError
from kdzoo.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, add_adapter, add_lora, save_adapter
from kdzoo.models.source import LocalModel, resolve_model
from kdzoo.recipe.model import Adapter, Lora, ModelSource
from kdzoo_model_adapters import GPT2

pytestmark = pytest.mark.slow

CONFIG = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
LORA = Lora(rank=2, alpha=3)
IDS = torch.arange(16).reshape(2, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))


def resolved(source: ModelSource, role: Any = "teacher") -> LocalModel:
    return resolve_model(source, role, teacher_folder=None, model_adapters={"gpt2": GPT2()}, address=role)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def base() -> LocalModel:
    return resolved(ModelSource(config=CONFIG, tokenizer="lab:bytes"))


@pytest.fixture
def adapter(tmp_path: Path, base: LocalModel) -> Path:
    model = add_lora(plain(base.folder), GPT2(), LORA, 1, "l")
    torch.manual_seed(2)
    state = {name: torch.randn(p.shape) * 0.5 for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(tmp_path / "adapter", base.folder, str(base.folder), LORA, state)
    return tmp_path / "adapter"


@pytest.fixture
def expected(base: LocalModel, adapter: Path) -> torch.Tensor:
    found = logits(add_adapter(plain(base.folder), GPT2(), adapter, "a"))
    assert (found - logits(plain(base.folder))).abs().max() > 0.01
    return found


def test_an_adapter_is_merged_once_into_a_folder_of_its_own(
    base: LocalModel, adapter: Path, expected: torch.Tensor
) -> None:
    source = ModelSource(name=str(base.folder), adapter=Adapter(name=str(adapter)))
    found = resolved(source)
    assert found.adapter is None
    assert found.folder not in (base.folder, adapter)
    assert found.fingerprint != base.fingerprint
    assert found.description == f"{base.folder} with the adapter {adapter}"
    torch.testing.assert_close(logits(plain(found.folder)), expected, rtol=1e-5, atol=1e-5)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (found.folder, base.folder)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert resolved(source) == found
    assert resolved(source, "student").folder == found.folder


def test_an_adapter_that_is_not_merged_stays_where_it_is(base: LocalModel, adapter: Path) -> None:
    found = resolved(ModelSource(name=str(base.folder), adapter=Adapter(name=str(adapter), merge=False)))
    assert (found.folder, found.adapter) == (base.folder, adapter)
    assert found.fingerprint not in (base.fingerprint, resolved(ModelSource(name=str(adapter))).fingerprint)


def test_an_adapters_folder_is_the_model_that_it_makes(base: LocalModel, adapter: Path, expected: torch.Tensor) -> None:
    found = resolved(ModelSource(name=str(adapter)))
    torch.testing.assert_close(logits(plain(found.folder)), expected, rtol=1e-5, atol=1e-5)
    assert found.hub is None


def refused(source: ModelSource, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        resolved(source)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_is_not_there_is_named(base: LocalModel, adapter: Path, tmp_path: Path) -> None:
    def with_adapter(folder: Path) -> ModelSource:
        return ModelSource(name=str(base.folder), adapter=Adapter(name=str(folder)))

    refused(
        with_adapter(tmp_path / "adaptor"), r"^teacher\.adapter\.name: '.*adaptor': no such folder, did you mean 'ad"
    )
    refused(with_adapter(base.folder), r"^teacher\.adapter\.name: '.*' has no 'adapter_config.json'; give an adapter's")
    (adapter / ADAPTER_WEIGHTS).unlink()
    refused(with_adapter(adapter), r"^teacher\.adapter\.name: '.*' has no 'adapter_model.safetensors'")
    refused(ModelSource(name=str(adapter)), r"^teacher\.name: '.*' has no 'adapter_model.safetensors'")


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_of_another_model_is_refused(adapter: Path, merge: bool) -> None:
    source = ModelSource(
        config={**CONFIG, "n_embd": 24}, tokenizer="lab:bytes", adapter=Adapter(name=str(adapter), merge=merge)
    )
    refused(source, r"^teacher\.adapter\.name: '.*adapter' does not fit the model \(.*")


@pytest.mark.parametrize("base_name", [None, "", "/nowhere/at/all"])
def test_an_adapters_folder_whose_model_cannot_be_found_is_refused(adapter: Path, base_name: str | None) -> None:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": base_name}))
    refused(
        ModelSource(name=str(adapter)),
        r"^teacher\.name: '/nowhere/at/all': no such folder" if base_name else "does not name its base model",
    )
