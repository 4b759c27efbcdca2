"""Every group of `by_bytes` says the same under both tokenizers: read back from the tokens, not from their places."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdzoo import Tokens
from kdzoo.api.plugin import NoParams
from kdzoo.data.encode import Encoder
from kdzoo.data.rows import load_rows
from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.recipe.model import Data, Source
from kdzoo_aligners import ByBytes

pytestmark = pytest.mark.slow

REAL = ("gpt2", "mistral-7b-v0.1", "qwen1.5-1.8b", "tinyllama-1.1b")
SOME = {"dolly/train.jsonl": 60, "vicuna/test.jsonl": 10, "sni/test.jsonl": 40, "unni_short/test.jsonl": 40}
THOUSANDS = {
    "dolly/train.jsonl": 1500,
    "self_instruct/test.jsonl": 242,
    "vicuna/test.jsonl": 80,
    "sni/test.jsonl": 800,
    "unni_short/test.jsonl": 800,
}
"""File -> how many of its rows."""
HARD = [
    "🚀",
    "👩‍🚀👨‍👩‍👧‍👦 ok 🇩🇪🏳️‍🌈 ☺️ a\u200db",
    "漢字かな交じり文、中文。한국어 ไทย हिन्दी العربية עברית",
    "𠀀𠮷 𝕳𝖊𝖑𝖑𝖔 ﷽ Ω Å ﬁ Ⅷ ½",
    "e\u0301 naïve cafe\u0301 o\u0308\u0304 Ünïcödé \u1112\u1161\u11ab",
    "  two leading spaces",
    "\ta tab, \n a line\n\n\n three\r\n\r\nend  ",
    "     def f(x):\n\t    return x**2  # 12345.678  !==!=",
    "<s> </s> <|endoftext|> <unk> <|im_end|> [INST]",
    "don't DON'T it's  ' s",
    "\u00a0no-break\u2003wide\u3000ideographic\ufeffmark",
    "zero\u0000 and control\u0018 here",
    " ",
    "\n",
    "a",
]
by_bytes = ByBytes(NoParams())
Read = Callable[[Sequence[int]], str]


def shared() -> Path:
    folder = Path(os.environ.get("KDZOO_SHARED") or Path(__file__).parents[2].parent / "shared")
    if not (folder / "tokenizers").is_dir() or not (folder / "data").is_dir():
        pytest.skip(f"no real tokenizers and data at {folder}; set KDZOO_SHARED")
    return folder


@pytest.fixture(scope="module")
def real() -> Mapping[str, PreTrainedTokenizerFast]:
    return {name: load_tokenizer(shared() / "tokenizers" / name) for name in REAL}


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], prompt: str) -> list[Tokens]:
    encoder = Encoder(tokenizer, Data(train=Source(), max_length=100_000))
    encoded = encoder.encode([prompt] * len(texts), texts)
    return [Tokens(one.response_ids, one.starts, one.ends, one.text) for one in encoded]


def reader(tokenizer: PreTrainedTokenizerFast) -> Read:
    """What tokens say, in their vocabulary's own letters: no decoder that drops or cleans up spaces."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    by_letters = "ByteLevel" in tokenizer.backend_tokenizer.to_str()

    @cache
    def of(token: int) -> bytes:
        piece = pieces[token]
        if by_letters and token not in tokenizer.added_tokens_decoder:
            return bytes(letters[letter] for letter in piece)
        if piece.startswith("<0x") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    return lambda ids: b"".join(map(of, ids)).decode()  # strict: no group ends within a character


def byte_letters() -> list[str]:
    """How byte-level vocabularies write each byte: printable ones as they are, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def plain(text: str) -> str:
    """Without the spaces at its edges, where tokenizers cut differently, and with accents composed."""
    return unicodedata.normalize("NFC", text.replace("▁", " ")).strip()


def assert_says_the_same(student: Tokens, teacher: Tokens, read: tuple[Read, Read], unknown: int | None = None) -> None:
    """Every group, from end to end; the end-of-sequence tokens are a pair of their own. `unknown` cannot be read."""
    spans = by_bytes.align(student, teacher).spans
    assert spans[0][0] == spans[0][2] == 0
    assert spans[-1] == (len(student.ids) - 1, len(student.ids), len(teacher.ids) - 1, len(teacher.ids))
    for a, b, c, d in spans[:-1]:
        if unknown not in student.ids[a:b]:
            mine, yours = plain(read[0](student.ids[a:b])), plain(read[1](teacher.ids[c:d]))
            # A first token may have begun in the prompt, and says so.
            same = mine == yours if a else mine.endswith(yours) or yours.endswith(mine)
            assert same, f"{student.text!r}: {mine!r} beside {yours!r}"


@pytest.mark.parametrize("prompt", ["### Response:\n", "Say: ", ""], ids=["line", "space", "nothing"])
def test_hard_texts_behind_any_prompt(prompt: str, real: Mapping[str, PreTrainedTokenizerFast]) -> None:
    found = {name: tokens_of(tokenizer, HARD, prompt) for name, tokenizer in real.items()}
    read = {name: reader(tokenizer) for name, tokenizer in real.items()}
    for one, other in permutations(REAL, 2):
        for student, teacher in zip(found[one], found[other], strict=True):
            assert_says_the_same(student, teacher, (read[one], read[other]))


@pytest.mark.parametrize("sets", [SOME, pytest.param(THOUSANDS, marks=pytest.mark.slow)], ids=["some", "thousands"])
def test_real_responses(sets: Mapping[str, int], real: Mapping[str, PreTrainedTokenizerFast]) -> None:
    texts = [
        row.references[0]
        for file, limit in sets.items()
        for row in load_rows(Source(jsonl=str(shared() / "data" / file), limit=limit), "data.train")
    ]
    assert len(texts) == sum(sets.values())
    found = {name: tokens_of(tokenizer, texts, "### Response:\n") for name, tokenizer in real.items()}
    read = {name: reader(tokenizer) for name, tokenizer in real.items()}
    for one, other in permutations(REAL, 2):
        for student, teacher in zip(found[one], found[other], strict=True):
            assert_says_the_same(student, teacher, (read[one], read[other]))


def test_any_text(real: Mapping[str, PreTrainedTokenizerFast]) -> None:
    read = {name: reader(tokenizer) for name, tokenizer in real.items()}

    @settings(max_examples=100, deadline=None)
    @given(text=st.text(min_size=1, max_size=20), prompt=st.sampled_from(["A:\n", ""]))
    def any_text(text: str, prompt: str) -> None:
        found = {name: tokens_of(tokenizer, [text], prompt)[0] for name, tokenizer in real.items()}
        for one, other in permutations(REAL, 2):
            assert_says_the_same(found[one], found[other], (read[one], read[other]))

    any_text()


@pytest.mark.parametrize("name", REAL)
def test_what_a_tokenizer_does_not_know_leaves_the_other_groups_alone(
    name: str, real: Mapping[str, PreTrainedTokenizerFast]
) -> None:
    backend = Tokenizer(
        models.BPE({"<unk>": 0, "</s>": 1, **{c: i for i, c in enumerate("▁abcdefgh", 2)}}, [], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    ascii_only = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    texts = ["abc", "a🚀b cd", "漢字", "🚀 a", "éa e\u0301f ,h", "  b", "h.\n\nab"]
    read = reader(ascii_only), reader(real[name])
    sides = tokens_of(ascii_only, texts, "a:\n"), tokens_of(real[name], texts, "a:\n")
    for student, teacher in zip(*sides, strict=True):
        assert_says_the_same(student, teacher, read, unknown=ascii_only.unk_token_id)
