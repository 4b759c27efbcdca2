"""Fixed alignment of the tokens of one response under two tokenizers."""

from __future__ import annotations

from typing import Literal

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from kdzoo import Aligner, Alignment, Params, Register, Tokens, hookimpl


class SameTokens(Aligner):
    """Token i belongs to token i, as far as both sides hold the same tokens."""

    name = "same_tokens"

    def align(self, student: Tokens, teacher: Tokens) -> Alignment:
        common = 0
        for mine, yours in zip(student.ids, teacher.ids, strict=False):
            if mine != yours:
                break
            common += 1
        return Alignment(
            pairs=[(i, i) for i in range(common)],
            spans=[(i, i + 1, i, i + 1) for i in range(common)],
        )


class ByPosition(Aligner):
    """Token k belongs to token k as far as both sides go, whatever they say."""

    name = "by_position"

    def align(self, student: Tokens, teacher: Tokens) -> Alignment:
        both = min(len(student.ids), len(teacher.ids))
        return Alignment(pairs=[(k, k) for k in range(both)], spans=[(k, k + 1, k, k + 1) for k in range(both)])


class ByBytes(Aligner):
    """Groups of tokens that cover the same text: the shortest ones, as a walk along both sides finds them.

    A group closes where both sides end at the same character and neither is inside one: the byte tokens that
    a character is split into all report its place, so an end counts only where the next token starts at or
    after it. Starts follow from ends, so that it does not matter on which side of a space a tokenizer cuts.
    The end-of-sequence token is a group of its own where both sides have one. Pairs are the groups of one
    token on either side.
    """

    name = "by_bytes"

    def align(self, student: Tokens, teacher: Tokens) -> Alignment:
        places_s, closes_s = _ends(student)
        places_t, closes_t = _ends(teacher)
        spans = []
        s = t = first_s = first_t = 0  # the tokens walked to, and the first ones of the open group
        while s < len(places_s) and t < len(places_t):
            here, there = places_s[s], places_t[t]
            if here == there and closes_s[s] and closes_t[t]:
                s, t = s + 1, t + 1
                spans.append((first_s, s, first_t, t))
                first_s, first_t = s, t
            else:
                s_waits, t_waits = there < here, here < there
                if here == there:
                    s_waits, t_waits = closes_s[s], closes_t[t]
                s, t = s + (not s_waits), t + (not t_waits)
        return Alignment(pairs=[(a, c) for a, b, c, d in spans if b - a == d - c == 1], spans=spans)


class ByWords(Aligner):
    """Groups of `by_bytes`, joined up to where the next token begins with a space on both sides.

    The end-of-sequence token begins with none: it belongs to the last word. (bminixhofer/tokenkit calls these "space".)
    """

    name = "by_words"

    def align(self, student: Tokens, teacher: Tokens) -> Alignment:
        spans: list[tuple[int, int, int, int]] = []
        for a, b, c, d in ByBytes(self.params).align(student, teacher).spans:
            begins = not spans or all(
                tokens.text.startswith(" ", tokens.ends[first - 1]) for tokens, first in ((student, a), (teacher, c))
            )
            if begins:
                spans.append((a, b, c, d))
            else:
                spans[-1] = (spans[-1][0], b, spans[-1][2], d)
        return Alignment(pairs=[(a, c) for a, b, c, d in spans if b - a == d - c == 1], spans=spans)


def _ends(tokens: Tokens) -> tuple[list[int], list[bool]]:
    """Where each token ends (one without text after all text that ends there), and if a group may close."""
    places = [2 * end + (start == end) for start, end in zip(tokens.starts, tokens.ends, strict=True)]
    closes = []
    for index, following in enumerate(tokens.starts[1:]):
        end = tokens.ends[index]
        if following > end and not tokens.text[end:following].isspace():
            # A normaliser composed characters (e and its accent) and reports the first alone.
            places[index] = 2 * following
        closes.append(following >= end)
    return places, [*closes, True]


class MinEdit(Aligner):
    """Dynamic time warping on the edit distance of tokens, spaces aside (MinED, as songmzhang/DSKD @ 077337a has it).

    Of all walks along both sides in step, the one whose tokens differ in the fewest characters. A group is what the
    walk passes without advancing on both sides at once; pairs are the groups of one token on either side. Tokens are
    compared by the text they cover, not by the pieces of their vocabularies: bytes and accents are then the same on
    both sides.
    """

    name = "min_edit"

    class Params(Params):
        rows: Literal["label", "input"] = "label"
        """Which token stands for a row: the one that it predicts, or the one before, which it has read (DSKD)."""

    def align(self, student: Tokens, teacher: Tokens) -> Alignment:
        mine, yours = (_texts(side, before=self.params.rows == "input") for side in (student, teacher))
        spans: list[tuple[int, int, int, int]] = []
        if mine and yours:
            groups = _warp(cdist(yours, mine, scorer=Levenshtein.distance, dtype=np.int32))
            spans = [(a, b, c, d) for c, d, a, b in groups]
        return Alignment(pairs=[(a, c) for a, b, c, d in spans if b - a == d - c == 1], spans=spans)


_NO_TEXT = "\0" * 8
"""An end, or what came before a response: the same on both sides, and far from every word."""


def _texts(tokens: Tokens, before: bool) -> list[str]:
    """What each token covers but for its spaces; with `before`, of the token before it."""
    texts = [
        tokens.text[start:end].replace(" ", "") if end > start else _NO_TEXT
        for start, end in zip(tokens.starts, tokens.ends, strict=True)
    ]
    return [_NO_TEXT, *texts[:-1]] if before and texts else texts


def _warp(costs: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The cheapest walk over `costs` [m, n] from its first to its last cell, as groups (start, end, start, end).

    Ties go to the diagonal step, then to the one in the first dimension, then to that in the second.
    """
    total = np.empty(costs.shape, dtype=np.int64)
    total[0] = costs[0].cumsum()
    for i in range(1, len(costs)):
        # A row from the one above: enter it at some place, from above or diagonally, and walk on to the right.
        enter = total[i - 1].copy()
        np.minimum(enter[1:], total[i - 1, :-1], out=enter[1:])
        walked = costs[i].cumsum()
        total[i] = walked + np.minimum.accumulate(enter - (walked - costs[i]))
    i, j = (size - 1 for size in costs.shape)
    groups = []
    end_i, end_j = i + 1, j + 1
    while i > 0 or j > 0:
        diagonal = total[i - 1, j - 1] if i and j else np.inf
        first = total[i - 1, j] if i else np.inf
        second = total[i, j - 1] if j else np.inf
        if diagonal <= min(first, second):
            groups.append((i, end_i, j, end_j))
            end_i, end_j = i, j
            i, j = i - 1, j - 1
        elif first <= second:
            i -= 1
        else:
            j -= 1
    return [(0, end_i, 0, end_j), *reversed(groups)]


@hookimpl
def register_plugins(register: Register) -> None:
    register(SameTokens)
    register(ByPosition)
    register(ByBytes)
    register(ByWords)
    register(MinEdit)
