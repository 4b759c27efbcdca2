"""Tokenizers that are made on the spot, and the shared folder with real ones where it is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Name the tallest mountain of Europe.",
    "Mont Blanc, or Elbrus.",
    "Response: Instruction: Input:",
] * 3


def _made(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer in one of two styles: `bytes` (as GPT-2) or `spaces` (as Llama, with a BOS)."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(TEXTS, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """For tests that change theirs; others share the two below."""
    return _made


@pytest.fixture(scope="session")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    return _made("bytes")


@pytest.fixture(scope="session")
def spaces_tokenizer() -> PreTrainedTokenizerFast:
    return _made("spaces")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real tokenizers and data beside the checkout; its tests are skipped without it."""
    folder = Path(os.environ.get("KDZOO_SHARED") or Path(__file__).parents[2].parent / "shared")
    if not (folder / "tokenizers").is_dir():
        pytest.skip(f"no real tokenizers and data at {folder}; set KDZOO_SHARED")
    return folder
