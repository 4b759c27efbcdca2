"""The student's token for each of the teacher's: the one that says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from kdzoo.data.tokenizer import load_tokenizer, student_ids, vocabulary


@pytest.fixture(scope="module")
def spaces_tokenizer(make_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """It decodes the bytes of its vocabulary, as Llama's does."""
    tokenizer = make_tokenizer("spaces")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_a_token_goes_to_the_one_that_says_the_same_however_it_is_spelt(
    bytes_tokenizer: PreTrainedTokenizerFast, spaces_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = student_ids(bytes_tokenizer, spaces_tokenizer, (len(bytes_tokenizer), len(spaces_tokenizer))).tolist()
    ours, theirs = bytes_tokenizer.get_vocab(), spaces_tokenizer.get_vocab()
    assert found[theirs["▁"]] == ours["Ġ"]
    assert found[theirs["on"]] == ours["on"]
    assert found[theirs["<0x0A>"]] == ours["Ċ"]
    assert found[theirs["</s>"]] == ours["<end>"]
    assert [found[theirs[token]] for token in ("<s>", "<unk>", "<0xE6>")] == [-1, -1, -1]
    matched = [token for token in found if token >= 0]
    assert len(set(matched)) == len(matched)


def test_a_letter_goes_before_the_byte_that_stands_for_it(
    bytes_tokenizer: PreTrainedTokenizerFast, spaces_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = student_ids(spaces_tokenizer, bytes_tokenizer, (len(spaces_tokenizer), len(bytes_tokenizer)))
    ours, theirs = spaces_tokenizer.get_vocab(), bytes_tokenizer.get_vocab()
    assert found[theirs["e"]] == ours["e"] != ours["<0x65>"]
    assert found[theirs["Ċ"]] == ours["<0x0A>"]  # which has no letter


def test_heads_of_other_sizes(
    bytes_tokenizer: PreTrainedTokenizerFast, spaces_tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = len(bytes_tokenizer), len(spaces_tokenizer)
    whole = student_ids(bytes_tokenizer, spaces_tokenizer, sizes)
    padded = student_ids(bytes_tokenizer, spaces_tokenizer, (sizes[0] + 7, sizes[1] + 5))
    assert padded[: sizes[1]].equal(whole) and padded[sizes[1] :].tolist() == [-1] * 5
    cut = student_ids(bytes_tokenizer, spaces_tokenizer, (50, 300))
    assert cut.equal(whole[:300].where(whole[:300] < 50, -1))


def test_one_tokenizer_is_its_own_partner_in_every_entry(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    assert student_ids(bytes_tokenizer, bytes_tokenizer, (6, 9)).tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), [("gpt2", "mistral-7b-v0.1"), ("tinyllama-1.1b", "qwen1.5-1.8b")])
def test_real_vocabularies_share_much(student: str, teacher: str, shared: Path) -> None:
    mine, yours = (load_tokenizer(shared / "tokenizers" / name) for name in (student, teacher))
    found = student_ids(mine, yours, (len(mine), len(yours)))
    ours, theirs = vocabulary(mine).texts, vocabulary(yours).texts
    matched = [(t, s) for t, s in enumerate(found.tolist()) if s >= 0]
    assert all(theirs[t] == ours[s] or (t, s) == (yours.eos_token_id, mine.eos_token_id) for t, s in matched)
    assert len(matched) > 0.4 * min(len(mine), len(yours))
    back = student_ids(yours, mine, (len(yours), len(mine)))
    assert all(back[s] == t for t, s in matched)
