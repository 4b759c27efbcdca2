"""Fixed alignment of the tokens of one response under two tokenizers."""

from __future__ import annotations

from collections.abc import Callable

from kdzoo import Aligner, Alignment, Tokens, hookimpl


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


@hookimpl
def register_aligners(register: Callable[[type[Aligner]], None]) -> None:
    register(SameTokens)
    register(ByBytes)
