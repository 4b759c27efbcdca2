"""Maps between the entries of two vocabularies: the same text, or else the fewest edits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import kdzoo.data.entries
from kdzoo import ops
from kdzoo.data.entries import cached_nearest, entry_maps, nearest
from kdzoo.data.tokenizer import load_tokenizer, student_ids, vocabulary


def saying(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of an end, the letter that texts begin with, and these words: spelt with a sign for a space."""
    entries = ["<end>", "x", *words]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<end>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def edits(a: str, b: str) -> int:
    """By its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def expected(ours: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """The partner of each of our texts among theirs; the end is entry 0 of both."""
    found = [0]
    for text in ours[1:]:
        by_distance = sorted((edits(text, other), entry) for entry, other in enumerate(theirs) if entry)
        distance, entry = by_distance[0]
        found.append(entry if distance == 0 or distance < len(text.strip()) else -1)
    return found


OURS = ["▁like", "▁distill", "ation", "▁lot", "zq", "▁", "like", "▁like▁it", "ab"]
THEIRS = ["▁dis", "till", "like", "▁likes", "▁lots", "ations", "ba", "a", "b"]


def test_a_partner_has_the_same_text_or_else_the_fewest_edits() -> None:
    ours, theirs = saying(*OURS), saying(*THEIRS)
    texts = [["", "x", *(word.replace("▁", " ") for word in words)] for words in (OURS, THEIRS)]
    found = nearest(ours, theirs).tolist()
    assert found == expected(*texts)
    assert found[2] == 4  # " like" goes to "like", the first of two at one edit
    assert found[6] == found[7] == -1  # "zq", and a space: nothing that they have in common with any other
    assert found[10] == 9  # "ab" goes to "a", the first of two


def test_the_map_in_the_other_direction_is_another() -> None:
    ours, theirs = saying("likely", "likes"), saying("like")
    assert nearest(ours, theirs).tolist() == [0, 1, 2, 2]
    assert nearest(theirs, ours).tolist() == [0, 1, 3]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = saying(*OURS), saying(*THEIRS)
    whole = nearest(ours, theirs)
    monkeypatch.setattr(kdzoo.data.entries, "BLOCK", 2)
    assert nearest(ours, theirs).equal(whole)


@pytest.fixture(scope="module")
def spaces_tokenizer(make_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """It decodes the bytes of its vocabulary, as Llama's does."""
    tokenizer = make_tokenizer("spaces")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_two_entries_of_one_text_have_the_same_partner(
    bytes_tokenizer: PreTrainedTokenizerFast, spaces_tokenizer: PreTrainedTokenizerFast
) -> None:
    found, entries = nearest(spaces_tokenizer, bytes_tokenizer), spaces_tokenizer.get_vocab()
    assert found[entries["e"]] == found[entries["<0x65>"]] == bytes_tokenizer.get_vocab()["e"]


def test_ends_belong_to_each_other_and_other_special_tokens_to_none(
    bytes_tokenizer: PreTrainedTokenizerFast, spaces_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = nearest(spaces_tokenizer, bytes_tokenizer)
    theirs = spaces_tokenizer.get_vocab()
    assert found[theirs["</s>"]] == bytes_tokenizer.eos_token_id
    assert [int(found[theirs[token]]) for token in ("<s>", "<unk>", "<0xE6>")] == [-1, -1, -1]
    exact = student_ids(bytes_tokenizer, spaces_tokenizer, (len(bytes_tokenizer), len(spaces_tokenizer)))
    assert found[exact >= 0].equal(exact[exact >= 0])


def test_heads_may_be_longer_or_shorter_than_tokenizers(cache: Path) -> None:
    student, teacher = saying(*THEIRS), saying(*OURS)
    whole = nearest(teacher, student)
    maps = entry_maps(["same_text", "nearest_in_student"], student, teacher, (len(student) + 3, len(teacher) + 2))
    assert maps["nearest_in_student"].tolist() == [*whole.tolist(), -1, -1]
    cut = entry_maps(["nearest_in_student"], student, teacher, (5, 6))["nearest_in_student"]
    assert cut.tolist() == whole[:6].where(whole[:6] < 5, -1).tolist()
    back = entry_maps(["nearest_in_teacher"], student, teacher, (5, 6))["nearest_in_teacher"]
    assert len(back) == 5 and back.max() < 6


def test_with_one_tokenizer_every_entry_is_its_own_partner(cache: Path) -> None:
    maps = entry_maps(["same_text", "nearest_in_student", "nearest_in_teacher"], saying("a"), saying("a"), (3, 5))
    assert maps["same_text"].equal(maps["nearest_in_student"])
    assert maps["same_text"].tolist() == [0, 1, 2, -1, -1] and maps["nearest_in_teacher"].tolist() == [0, 1, 2]


def test_a_map_is_computed_once_and_by_what_the_tokenizers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path))
    found = cached_nearest(saying(*OURS), saying(*THEIRS))
    with monkeypatch.context() as patch:
        patch.setattr(kdzoo.data.entries, "nearest", lambda *_: pytest.fail("computed again"))
        assert cached_nearest(saying(*OURS), saying(*THEIRS)).equal(found)
    assert not cached_nearest(saying(*THEIRS), saying(*OURS)).equal(found)
    assert len(list((tmp_path / "entries").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), [("mistral-7b-v0.1", "tinyllama-1.1b"), ("gpt2", "mistral-7b-v0.1")])
def test_real_vocabularies_are_mapped_in_seconds(ours: str, theirs: str, shared: Path) -> None:
    one, other = (load_tokenizer(shared / "tokenizers" / name) for name in (ours, theirs))
    began = time.perf_counter()
    found = nearest(one, other)
    assert time.perf_counter() - began < 60
    exact = student_ids(other, one, (len(other), len(one)))
    assert found[exact >= 0].equal(exact[exact >= 0])
    assert (found >= 0).float().mean() > 0.9 > (exact >= 0).float().mean()
    texts, others = vocabulary(one).texts, vocabulary(other).texts
    near = [
        (texts[i], others[j]) for i, j in enumerate(found.tolist()) if j >= 0 and exact[i] < 0 and len(texts[i]) < 6
    ]
    candidates = [text for text in dict.fromkeys(others) if text and "\ufffd" not in text and len(text) < 3]
    for text, partner in near[::500]:
        assert edits(text, partner) <= min(edits(text, candidate) for candidate in candidates)


def test_first_sources_are_the_inverse_of_a_map() -> None:
    partners = torch.tensor([2, -1, 0, 2, 4, 0])
    assert ops.first_sources(partners, 5).tolist() == [2, -1, 0, -1, 4]
    assert [entries.tolist() for entries in ops.linked_entries(partners)] == [[0, 2, 3, 4, 5], [2, 0, 2, 4, 0]]
    assert ops.first_sources(torch.full((3,), -1), 2).tolist() == [-1, -1]
