"""Two tokenizers that differ in kind, vocabulary and sequences, trained once on lab text and cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kdzoo.cache import cached_folder, content_key
from kdzoo.data.lab.rows import rows_of
from kdzoo.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_VERSION = 1
_TEXT_ROWS = 4_000
BYTES_VOCABULARY = 512
WORDS_VOCABULARY = 800


def _text() -> list[str]:
    """What the tokenizers are trained on: rows of the teacher's split, in the words of the lab's template."""
    return [
        "\n".join(filter(None, [row["instruction"], row["input"], "Answer:", row["output"]]))
        for row in rows_of("teacher", _TEXT_ROWS)
    ]


def _bytes(text: list[str]) -> Tokenizer:
    """Byte-level BPE, as GPT-2's: a token may begin with its space; no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # the space belongs to its token
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES_VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def _words(text: list[str]) -> Tokenizer:
    """BPE over words behind a metaspace, as Llama's; lines and punctuation stand alone. ASCII is known."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Punctuation(behavior="isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS_VOCABULARY,
        special_tokens=["<unk>", "</s>", "<pad>"],
        initial_alphabet=["\n", "▁", *(chr(code) for code in range(33, 127))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


_TRAINED: dict[str, tuple[Callable[[list[str]], Tokenizer], dict[str, str]]] = {
    "bytes": (_bytes, {"eos_token": "<eos>", "pad_token": "<pad>"}),
    "words": (_words, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
}


def lab_tokenizer(name: str) -> Path:
    """The folder of the lab tokenizer `name` ("bytes" or "words"), for `AutoTokenizer.from_pretrained`.

    Raises `ModelError` for another name.
    """
    if name not in _TRAINED:
        known = ", ".join(sorted(_TRAINED))
        raise ModelError(
            f"tokenizer 'lab:{name}': is not one of the lab's ({known}){did_you_mean(name, _TRAINED)}; use one of them"
        )
    train, special_tokens = _TRAINED[name]
    text = _text()

    def build(folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(
            tokenizer_object=train(text),
            model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False,
            **special_tokens,
        ).save_pretrained(folder)

    return cached_folder("lab_tokenizer", {"name": name, "version": _VERSION, "text": content_key(text)}, build)
