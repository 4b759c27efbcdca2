from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from kdzoo.data.tokenizer import load_tokenizer, same_tokens, tokens_fingerprint, vocabulary
from kdzoo.errors import ModelError

Make = Callable[[str], PreTrainedTokenizerFast]

REAL = ("gpt2", "mistral-7b-v0.1", "qwen1.5-1.8b", "tinyllama-1.1b")


@pytest.mark.parametrize("name", REAL)
def test_real_folders_load_quietly(name: str, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id is not None
    assert capfd.readouterr() == ("", "")


def test_a_folder_with_vocabulary_and_merges_alone_loads(shared: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "config.json"):
        (tmp_path / name).write_bytes((shared / "tokenizers" / "gpt2" / name).read_bytes())
    bare, whole = load_tokenizer(tmp_path), load_tokenizer(shared / "tokenizers" / "gpt2")
    assert same_tokens(bare, whole)


def test_sameness_is_of_tokens_not_of_size(shared: Path) -> None:
    mistral, tiny = (load_tokenizer(shared / "tokenizers" / name) for name in (REAL[1], REAL[3]))
    assert len(mistral) == len(tiny)
    assert not same_tokens(mistral, tiny)
    assert same_tokens(tiny, load_tokenizer(shared / "tokenizers" / REAL[3]))


def test_one_vocabulary_with_other_merges_is_another_tokenizer(
    make_tokenizer: Make, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    content = json.loads(bytes_tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][:3]
    other = make_tokenizer("bytes")
    other._tokenizer = other.backend_tokenizer.from_str(json.dumps(content))
    assert other.get_vocab() == bytes_tokenizer.get_vocab()
    assert not same_tokens(bytes_tokenizer, other)
    assert same_tokens(bytes_tokenizer, make_tokenizer("bytes"))
    assert (
        tokens_fingerprint(other) != tokens_fingerprint(bytes_tokenizer) == tokens_fingerprint(make_tokenizer("bytes"))
    )


def test_the_lab_has_two_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path))
    assert not same_tokens(load_tokenizer("lab:bytes"), load_tokenizer("lab:words"))
    with pytest.raises(ModelError, match=r"^student.tokenizer: .*lab:bites"):
        load_tokenizer("lab:bites", "student.tokenizer")


def test_a_missing_padding_token_is_the_end(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("spaces")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id


def test_a_missing_end_token_is_refused(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("spaces")
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^student.tokenizer: .* has no end-of-sequence token"):
        load_tokenizer(tmp_path, "student.tokenizer")


def test_missing_places_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(ModelError, match=r"^here: .*no such folder, did you mean 'gpt2'\?$"):
        load_tokenizer(tmp_path / "gpt3", "here")
    with pytest.raises(ModelError, match=r"^here: no tokenizer can be loaded from .*configuration$"):
        load_tokenizer(tmp_path / "gpt2", "here")

    def unreachable(*args: object, **options: object) -> str:
        raise ConnectionError("no route\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"^here: 'a/b' is not a local folder .*\(ConnectionError: no route\); check"):
        load_tokenizer("a/b", "here")


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_a_lexicon_has_what_tokens_add_to_a_text(kind: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(kind)
    found = vocabulary(tokenizer)
    assert len(found.texts) == len(tokenizer)
    ids = tokenizer("Name the tallest mountain", add_special_tokens=False)["input_ids"]
    assert "".join(found.texts[token] for token in ids).strip() == "Name the tallest mountain"
    assert any(text.startswith(" ") for text in found.texts)
    assert found.special == set(tokenizer.all_special_ids)
    assert found.end == tokenizer.eos_token_id


@pytest.mark.parametrize("name", REAL)
def test_a_lexicon_knows_spaces_lines_and_bytes_of_real_tokenizers(name: str, shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    found = vocabulary(tokenizer)
    entries = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    spelt = {"Ġ": " ", "▁": " ", "Ċ": "\n"} if name in ("gpt2", "qwen1.5-1.8b") else {"▁": " ", "<0x0A>": "\n"}
    for entry, text in zip(entries, found.texts, strict=True):
        for begins, character in spelt.items():
            assert not entry.startswith(begins) or text.startswith(character), entry
    assert "\ufffd" in "".join(found.texts)  # single bytes
    assert found.texts[tokenizer.eos_token_id] == tokenizer.eos_token
