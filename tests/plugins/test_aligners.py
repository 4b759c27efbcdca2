from __future__ import annotations

import os
import time
from itertools import pairwise, permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdzoo import Alignment, Tokens
from kdzoo.api.plugin import NoParams
from kdzoo.data.encode import Encoder
from kdzoo.data.rows import load_rows
from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.recipe.model import Data, Source
from kdzoo_aligners import ByBytes, ByWords, SameTokens

REAL = ("gpt2", "mistral-7b-v0.1", "qwen1.5-1.8b", "tinyllama-1.1b")
HARD = [
    "👩‍🚀 and 🚀🚀, 漢字かな 한국어 العربية",
    "  two leading spaces, e\u0301 naïve ﬁ Ⅷ",
    "\n\na line\n\n\tindented\r\n  end  ",
    "12345.678 x**2 == y[i]; don't",
    "🚀",
    " ",
    "a",
]
by_bytes = ByBytes(NoParams())


def tokens(text: str, *ends: int, starts: tuple[int, ...] | None = None, eos: bool = False) -> Tokens:
    """Tokens that end at `ends`, each beginning where the last ended."""
    first = list(starts) if starts is not None else [0, *ends[:-1]]
    if eos:
        first, ends = [*first, len(text)], (*ends, len(text))
    return Tokens(range(len(ends)), first, ends, text)


def reach(side: Tokens, token: int) -> int:
    """Where a token ends, with a mark that a normaliser composed into it (it reports the character alone)."""
    following = side.starts[token + 1] if token + 1 < len(side.starts) else side.ends[token]
    gap = side.text[side.ends[token] : following]
    return following if gap and not gap.isspace() else side.ends[token]


def assert_sound(alignment: Alignment, student: Tokens, teacher: Tokens) -> None:
    """Disjoint, ascending groups that end at the same character on both sides, each after the last."""
    before = (0, 0, 0, 0)
    for span in alignment.spans:
        a, b, c, d = span
        assert before[1] <= a < b <= len(student.ids)
        assert before[3] <= c < d <= len(teacher.ids)
        assert reach(student, b - 1) == reach(teacher, d - 1)
        before = span
    for (_, b, _, d), (a, _, c, _) in pairwise(alignment.spans):
        assert (a, c) == (b, d)  # nothing is left out in between
    for a, b, c, d in alignment.spans:
        mine = student.text[student.starts[a] : reach(student, b - 1)]
        yours = teacher.text[teacher.starts[c] : reach(teacher, d - 1)]
        assert mine.strip() == yours.strip()
    assert list(alignment.pairs) == [(a, c) for a, b, c, d in alignment.spans if (b - a, d - c) == (1, 1)]


def test_groups_are_the_shortest_that_end_together() -> None:
    student, teacher = tokens("the cats sat", 3, 8, 12), tokens("the cats sat", 3, 7, 8, 10, 12)
    assert by_bytes.align(student, teacher) == Alignment([(0, 0)], [(0, 1, 0, 1), (1, 2, 1, 3), (2, 3, 3, 5)])


def test_the_end_of_a_sequence_is_its_own_pair() -> None:
    student, teacher = tokens("cats", 4, eos=True), tokens("cats", 2, 4, eos=True)
    assert by_bytes.align(student, teacher) == Alignment([(1, 2)], [(0, 1, 0, 2), (1, 2, 2, 3)])
    assert by_bytes.align(student, tokens("cats", 2, 4)).spans == [(0, 1, 0, 2)]


def test_an_end_is_never_grouped_with_text() -> None:
    student, teacher = tokens("cats ", 4, eos=True), tokens("cats ", 4, 5, eos=True)
    assert by_bytes.align(student, teacher).spans == [(0, 1, 0, 1), (1, 2, 1, 3)]
    assert by_bytes.align(tokens("cats ", 4, eos=True), tokens("cats ", 4, 5)).spans == [(0, 1, 0, 1)]


def test_parts_of_a_character_belong_to_one_group() -> None:
    whole = tokens("🚀x", 1, 2, eos=True)
    parts = tokens("🚀x", 1, 1, 1, 2, starts=(0, 0, 0, 1), eos=True)
    assert by_bytes.align(whole, parts).spans == [(0, 1, 0, 3), (1, 2, 3, 4), (2, 3, 4, 5)]
    assert by_bytes.align(parts, whole).spans == [(0, 3, 0, 1), (3, 4, 1, 2), (4, 5, 2, 3)]


def test_a_token_over_the_edge_of_a_character_keeps_the_group_open() -> None:
    over = tokens("🚀漢", 1, 2, 2, starts=(0, 0, 1), eos=True)
    assert by_bytes.align(over, tokens("🚀漢", 1, 2, eos=True)).spans == [(0, 3, 0, 2), (3, 4, 2, 3)]


def test_a_composed_accent_belongs_to_its_letter() -> None:
    composed = tokens("e\u0301x", 1, 3, starts=(0, 2), eos=True)
    assert by_bytes.align(tokens("e\u0301x", 1, 2, 3, eos=True), composed).spans == [
        (0, 2, 0, 1),
        (2, 3, 1, 2),
        (3, 4, 2, 3),
    ]


def test_a_response_that_was_cut_aligns_as_far_as_it_goes() -> None:
    assert by_bytes.align(tokens("the cats", 3), tokens("the cats", 3, 8, eos=True)).pairs == [(0, 0)]
    assert by_bytes.align(tokens("the cats", 3, 5), tokens("the cats", 3, 8, eos=True)).pairs == [(0, 0)]


def test_words_are_groups_that_begin_with_a_space_on_both_sides() -> None:
    by_words, text = ByWords(NoParams()), "the cats sat."
    student, teacher = tokens(text, 3, 8, 12, 13, eos=True), tokens(text, 2, 3, 7, 8, 12, 13, eos=True)
    assert by_words.align(student, teacher) == Alignment([], [(0, 1, 0, 2), (1, 2, 2, 4), (2, 5, 4, 7)])
    # Where offsets leave a space out, or a token ends with one.
    trimmed = tokens(text, 3, 8, 12, 13, starts=(0, 4, 9, 12), eos=True)
    assert by_words.align(trimmed, teacher).spans == by_words.align(student, teacher).spans
    behind = tokens(text, 4, 9, 13, eos=True)
    assert by_words.align(behind, behind).spans == [(0, 4, 0, 4)]
    assert by_words.align(tokens("a b", 1, 3), tokens("a b", 1, 3)).pairs == [(0, 0), (1, 1)]
    assert by_words.align(tokens("ab", 1), tokens("ab", 2)) == Alignment([], [])


def test_the_same_tokens_are_paired_as_far_as_they_agree() -> None:
    same = SameTokens(NoParams())
    student, teacher = (
        Tokens([5, 6, 7], [0] * 3, [1] * 3, "abc"),
        Tokens([5, 6, 8, 7], [0] * 4, [1] * 4, "abc"),
    )
    assert same.align(student, teacher) == Alignment([(0, 0), (1, 1)], [(0, 1, 0, 1), (1, 2, 1, 2)])
    assert same.align(student, student).pairs == [(0, 0), (1, 1), (2, 2)]


@st.composite
def split(draw: st.DrawFn, text: str) -> Tokens:
    """Any split of `text` into tokens of bytes: each part of a character reports the whole one's place."""
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    cuts = sorted(draw(st.sets(st.integers(1, max(len(owner) - 1, 1))))) if len(owner) > 1 else []
    edges = [0, *(cut for cut in cuts if cut < len(owner)), len(owner)]
    starts = [owner[first] for first, _ in pairwise(edges)]
    ends = [owner[last - 1] + 1 for _, last in pairwise(edges)]
    return Tokens(range(len(ends) + 1), [*starts, len(text)], [*ends, len(text)], text)


@given(st.data(), st.text("ab é漢🚀", min_size=1, max_size=12))
def test_any_two_splits_of_a_text_align_soundly_and_to_the_end(data: st.DataObject, text: str) -> None:
    student, teacher = data.draw(split(text)), data.draw(split(text))
    alignment = by_bytes.align(student, teacher)
    assert_sound(alignment, student, teacher)
    assert alignment.spans[-1] == (
        len(student.ids) - 1,
        len(student.ids),
        len(teacher.ids) - 1,
        len(teacher.ids),
    )
    mirrored = by_bytes.align(teacher, student)
    assert [(c, d, a, b) for a, b, c, d in mirrored.spans] == alignment.spans


def shared() -> Path:
    folder = Path(os.environ.get("KDZOO_SHARED") or Path(__file__).parents[2].parent / "shared")
    if not (folder / "tokenizers").is_dir():
        pytest.skip(f"no real tokenizers and data at {folder}; set KDZOO_SHARED")
    return folder


@pytest.fixture(scope="module")
def real_responses() -> dict[str, list[Tokens]]:
    """Real and hard responses under the four real tokenizers."""
    rows = load_rows(Source(jsonl=str(shared() / "data" / "dolly" / "train.jsonl"), limit=300), "data.train")
    responses = [*HARD, *(row.references[0] for row in rows)]
    found = {}
    for name in REAL:
        encoder = Encoder(load_tokenizer(shared() / "tokenizers" / name), Data(train=Source(), max_length=4096))
        encoded = encoder.encode(["### Response:\n"] * len(responses), responses)
        found[name] = [Tokens(one.response_ids, one.starts, one.ends, one.text) for one in encoded]
    return found


@pytest.mark.parametrize(("one", "other"), list(permutations(REAL, 2)))
def test_real_tokenizers_align_soundly_and_to_the_end(
    one: str, other: str, real_responses: dict[str, list[Tokens]]
) -> None:
    for student, teacher in zip(real_responses[one], real_responses[other], strict=True):
        alignment = by_bytes.align(student, teacher)
        assert_sound(alignment, student, teacher)
        assert alignment.spans[0][0] == alignment.spans[0][2] == 0
        assert alignment.spans[-1][1::2] == (len(student.ids), len(teacher.ids))
        assert alignment.pairs[-1] == (len(student.ids) - 1, len(teacher.ids) - 1)


def test_real_alignment_is_fine_grained(real_responses: dict[str, list[Tokens]]) -> None:
    student, teacher = real_responses["gpt2"], real_responses["mistral-7b-v0.1"]
    paired = sum(len(by_bytes.align(*sides).pairs) for sides in zip(student, teacher, strict=True))
    assert paired > 0.8 * sum(len(side.ids) for side in student)


def test_alignment_costs_less_than_a_millisecond_for_512_tokens(
    real_responses: dict[str, list[Tokens]],
) -> None:
    sides = [real_responses[name][:300] for name in ("gpt2", "tinyllama-1.1b")]
    began = time.process_time()
    for student, teacher in zip(*sides, strict=True):
        by_bytes.align(student, teacher)
    per_token = (time.process_time() - began) / sum(len(side.ids) for side in sides[0])
    assert per_token * 512 < 1e-3
