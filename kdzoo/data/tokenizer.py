"""Tokenizers by name or folder, and whether two of them are one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdzoo.api.models import Vocabulary
from kdzoo.data.place import hub_folder, local_folder, one_line
from kdzoo.errors import KdzooError, ModelError
from kdzoo.quiet import quiet

LAB = "lab:"
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")

# What tokenizers differ on where their vocabularies agree: spaces, lines, digits, bytes, special tokens.
_PROBES = (
    "Hello, world! It's 12345.67 degrees.",
    "  two  spaces\tand a tab\n\n\nthree lines ",
    "naïve café, Ünïcödé, e\u0301",
    "漢字かな交じり文 한국어 العربية",
    "👩‍🚀🚀 😀",
    "def f(x):\n    return x ** 2  # UPPER lower",
    "<s> </s> <|endoftext|> <unk>",
)


def load_tokenizer(
    name: str | Path, address: str = "tokenizer", revision: str | None = None
) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder, a hub name or the lab (`lab:bytes`), with an end-of-sequence token.

    A missing padding token becomes the end-of-sequence token: padded positions are masked and never scored.
    Raises `ModelError`, one line that begins with `address`.
    """
    folder = _folder(str(name), address, revision)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # every tokenizer class has its own way to fail on a file that it lacks
        raise ModelError(
            f"{address}: no tokenizer can be loaded from '{name}' ({one_line(error)}); a folder needs "
            "'tokenizer.json', or 'vocab.json' and 'merges.txt', with a configuration"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{address}: '{name}' has no fast tokenizer ({type(tokenizer).__name__}), and alignment "
            "needs the character offsets of one; give a folder with 'tokenizer.json'"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{address}: the tokenizer '{name}' has no end-of-sequence token; set 'eos_token' in its "
            "'tokenizer_config.json'"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def same_tokens(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers are one: the same entries, the same ends, the same encodings of a few hard
    texts.

    Never decided by size: Mistral's and TinyLlama's both have 32,000 entries.
    """
    if a is b:
        return True
    return (
        len(a) == len(b)
        and a.eos_token_id == b.eos_token_id
        and a.get_vocab() == b.get_vocab()
        and all(a(text)["input_ids"] == b(text)["input_ids"] for text in _PROBES)
    )


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """What every token says after other text; by decoding, so that it does not matter how entries are spelt."""
    before = tokenizer("x", add_special_tokens=False)["input_ids"]
    decode = tokenizer.backend_tokenizer.decode_batch
    start, *texts = decode([before, *([*before, token] for token in range(len(tokenizer)))], skip_special_tokens=False)
    assert isinstance(tokenizer.eos_token_id, int)
    return Vocabulary(
        tuple(text.removeprefix(start) for text in texts), frozenset(tokenizer.all_special_ids), tokenizer.eos_token_id
    )


def student_ids(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, sizes: tuple[int, int]) -> Tensor:
    """[W] the student's token with the text of each teacher token, -1 where it has none; ends belong to each other.

    Where both tokenizers are one, every token is its own. `sizes` are the entries of the student's and the teacher's
    head, which may be more or fewer than the tokenizers'.
    """
    if same_tokens(student, teacher):
        every = torch.arange(sizes[1])
        return torch.where(every < sizes[0], every, -1)
    mine, yours = tokens_by_text(student), tokens_by_text(teacher)
    found = torch.full((sizes[1],), -1)
    for text, token in yours.items():
        if token < sizes[1] and mine.get(text, sizes[0]) < sizes[0]:
            found[token] = mine[text]
    return found


def tokens_by_text(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """What a token says, spaces included -> the token, the first of several. The end says nothing.

    No tokenizer spells a letter by its byte where it has the letter: `<0x41>` comes after "A".
    """
    texts = speaking_tokens(tokenizer)
    spelt = dict(zip(texts, tokenizer.convert_ids_to_tokens(list(texts)), strict=True))
    tokens = sorted(texts, key=lambda token: (spelt[token].startswith("<0x"), token), reverse=True)
    assert isinstance(tokenizer.eos_token_id, int)
    return {texts[token]: token for token in tokens} | {"": tokenizer.eos_token_id}


def speaking_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Every token that says something by itself -> what it says. Parts of characters and special tokens say nothing."""
    known = vocabulary(tokenizer)
    return {t: text for t, text in enumerate(known.texts) if text and "\ufffd" not in text and t not in known.special}


def tokens_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that decides encodings, for cache keys."""
    ends = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id} {tokenizer.chat_template}"
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}\n{ends}".encode()).hexdigest()[:20]


def _folder(name: str, address: str, revision: str | None) -> Path:
    if name.startswith(LAB):
        from kdzoo.data.lab import lab_tokenizer

        try:
            return lab_tokenizer(name.removeprefix(LAB))
        except KdzooError as error:
            raise ModelError(f"{address}: {error}") from error
    return local_folder(name, address, ModelError) or hub_folder(name, revision, TOKENIZER_FILES, address, ModelError)
