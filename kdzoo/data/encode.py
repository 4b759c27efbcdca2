"""Prompts and responses as tokens, with the characters that each response token covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from kdzoo.recipe.model import Data

if TYPE_CHECKING:  # a worker that collates has no use for transformers, which takes a second to import
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Encoded:
    """One prompt with its response. `starts` and `ends` are of the response's tokens alone."""

    ids: Sequence[int]
    prompt_length: int
    starts: Sequence[int]  # first character of each response token in `text`; 0 for one that began in the prompt
    ends: Sequence[
        int
    ]  # one past its last character; the end-of-sequence token, if any, stands at (len(text), len(text))
    text: str  # the whole response, also where its tokens were cut

    @property
    def response_ids(self) -> Sequence[int]:
        return self.ids[self.prompt_length :]


class Encoder:
    """Tokenises for one model, by the lengths of `data`.

    Prompt and response are tokenised as one text, as they will be read; a token belongs to the response where
    it ends beyond the prompt. Special tokens are those that the tokenizer adds itself (a BOS for Gemma and
    Llama, none for GPT-2; none where a chat template has written them), then the end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, data: Data) -> None:
        self.tokenizer = tokenizer
        self.data = data

    def encode(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool] | None = None
    ) -> list[Encoded]:
        """Of every prompt its first `max_prompt_length` tokens, of both together `max_length`.

        `ended` tells of every response whether the end-of-sequence token follows it. None: it follows all.
        A response that is empty, or that finds no place, comes back without response tokens: the caller knows
        its row.
        """
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return [
            self._joined(encoding, prompt, response, end)
            for encoding, prompt, response, end in zip(
                self._encodings(texts), prompts, responses, ended or [True] * len(texts), strict=True
            )
        ]

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """The prompts alone, as generation begins with them: their first `max_prompt_length` tokens."""
        return [
            [token for token, _, _ in _without_closing(encoding)][: self.data.max_prompt_length]
            for encoding in self._encodings(prompts)
        ]

    def _encodings(self, texts: Sequence[str]) -> Sequence[Encoding]:
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=not self.data.template.chat,
            return_attention_mask=False,
            verbose=False,  # lengths are our business
        )
        assert batch.encodings is not None
        return batch.encodings

    def _joined(self, encoding: Encoding, prompt: str, response: str, ended: bool) -> Encoded:
        tokens = _without_closing(encoding)
        boundary = len(prompt)
        prompt_ids = [token for token, _, _ in takewhile(lambda token: token[2] <= boundary, tokens)]
        answer = [
            (token, max(start - boundary, 0), max(end - boundary, 0)) for token, start, end in tokens[len(prompt_ids) :]
        ]
        prompt_ids = prompt_ids[: self.data.max_prompt_length]
        if response and ended:
            eos = self.tokenizer.eos_token_id
            assert isinstance(eos, int)
            answer.append((eos, len(response), len(response)))
        answer = _cut(answer, self.data.max_length - len(prompt_ids))
        return Encoded(
            ids=[*prompt_ids, *(token for token, _, _ in answer)],
            prompt_length=len(prompt_ids),
            starts=[start for _, start, _ in answer],
            ends=[end for _, _, end in answer],
            text=response,
        )


def _without_closing(encoding: Encoding) -> list[tuple[int, int, int]]:
    """(id, start, end) of every token, but for special tokens that the tokenizer itself put at the end."""
    length = len(encoding.ids)
    while length and encoding.special_tokens_mask[length - 1]:
        length -= 1
    return [(token, start, end) for token, (start, end) in zip(encoding.ids[:length], encoding.offsets, strict=False)]


def _cut(answer: list[tuple[int, int, int]], room: int) -> list[tuple[int, int, int]]:
    """The first tokens that fit, without a last character in parts: every kept end is a place in the text."""
    keep = min(len(answer), max(room, 0))
    while 0 < keep < len(answer) and answer[keep][1] < answer[keep - 1][2]:
        keep -= 1
    return answer[:keep]
