"""Answers to prompts, in batches, such that batch size, order and number of ranks do not change them.

Padding is masked and counts neither for positions nor for repeated n-grams. A sampled answer is drawn with
random numbers of its own, made on the host from the seed and the text of its prompt. So an answer depends on
the model, its prompt, the decoding and the seed only, up to the rounding of the model's own products (in
bfloat16 a near tie may fall the other way in another batch). Two equal prompts get one answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Encoding
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from kdzoo.errors import ModelError
from kdzoo.recipe.model import Decoding


@dataclass(frozen=True)
class Continuation:
    """What a model has said after a prompt, in its own tokens and as text."""

    prompt_ids: list[int]
    """As the model has read them."""
    ids: list[int]
    """The new tokens, with the end-of-sequence token where the model has ended."""
    text: str
    """After the prompt, stripped."""
    ended: bool
    """Whether the model has ended it itself. False: it was cut after the most tokens."""


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    decoding: Decoding,
    seed: int,
    *,
    max_new_tokens: int,
    max_prompt_length: int,
    batch: int,
    add_special_tokens: bool,
    synced: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> list[Continuation]:
    """The model's continuation of every prompt, in their order.

    Prompts keep their first `max_prompt_length` tokens, as in training. `seed` matters where `decoding`
    samples; the global random state is neither read nor moved. Nothing of the model's own generation
    configuration is used: an answer ends at the tokenizer's end-of-sequence token or after `max_new_tokens`.
    `on_batch` gets, after each batch, how many prompts are done.

    With `synced`, for a model partitioned over ranks, every rank must call at the same time and may bring any
    number of prompts, also none: a rank with fewer batches than another joins in with a stand-in.

    Raises ModelError where prompt and answer do not fit the model's positions.
    """
    texts = [*prompts, ""]  # the last one is the stand-in
    tokens = prompt_tokens(tokenizer, texts, max_prompt_length, add_special_tokens)
    require_positions(model.config, max(map(len, tokens)), max_new_tokens)
    # Similar lengths together: little padding. Long ones first: what exceeds the memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(tokens[i]))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    if synced:
        batches += [[len(prompts)]] * (_most_of_all_ranks(len(batches), model.device) - len(batches))

    end = tokenizer.eos_token_id
    assert isinstance(end, int), "training ends every answer with this token"
    config = _generation_config(model, tokenizer, max_new_tokens)
    answers: list[Continuation | None] = [None] * len(texts)
    done = 0
    with _ready_to_generate(model):
        for indices in batches:
            ids, mask = _left_padded([tokens[i] for i in indices], end, model.device)
            draws = [_uniforms(seed, texts[i], max_new_tokens) for i in indices] if decoding.sample else []
            new = _continue(model, ids, mask, config, _processors(decoding, mask, draws), synced)
            for i, row in zip(indices, new.tolist(), strict=True):
                answers[i] = _continuation(tokenizer, tokens[i], row)
            done = min(done + len(indices), len(prompts))
            if on_batch is not None:
                on_batch(done)
    return [answer for answer in answers[: len(prompts)] if answer is not None]


def require_positions(
    config: PreTrainedConfig,
    max_prompt_length: int,
    max_new_tokens: int,
    address: str = "evaluation.max_new_tokens",
) -> None:
    """Raises ModelError where the longest prompt and its answer do not fit: worth asking before training."""
    # A family without positions of its own has no such key in its configuration.
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_prompt_length + max_new_tokens > positions:
        raise ModelError(
            f"{address}: {max_new_tokens} tokens after a prompt of {max_prompt_length} do "
            f"not fit the {positions} positions of the model; lower it, or 'data.max_prompt_length'"
        )


class NoRepeatNgram(LogitsProcessor):
    """Forbids the tokens that would repeat an n-gram of the prompt or the answer.

    The rule of transformers' processor of that name, which however takes padding for text, and walks through
    every token on the host.
    """

    def __init__(self, size: int, mask: Tensor) -> None:
        self.size = size
        self.padding = mask.shape[1] - mask.sum(1)  # [B] tokens on the left that are none

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, T], [B, V]
        length, vocabulary = input_ids.shape[1], scores.shape[1]
        if length < self.size:
            return scores
        ngrams = input_ids.unfold(1, self.size, 1)  # [B, T - size + 1, size]
        tail = input_ids[:, length - self.size + 1 :]  # [B, size - 1]
        start = torch.arange(ngrams.shape[1], device=input_ids.device)
        seen = (ngrams[..., :-1] == tail[:, None]).all(-1) & (start >= self.padding[:, None])
        # One column more than the vocabulary takes what is not forbidden.
        last = torch.where(seen, ngrams[..., -1], vocabulary)
        forbidden = torch.zeros(len(scores), vocabulary + 1, dtype=torch.bool, device=scores.device)
        return scores.masked_fill(forbidden.scatter_(1, last, True)[:, :vocabulary], -torch.inf)


class Draw(LogitsProcessor):
    """Draws from softmax(scores) with one given uniform number per row and step; only that token remains.

    Inverse transform sampling. Greedy decoding behind it takes the drawn token, so that no random state is
    shared between the rows of a batch.
    """

    def __init__(self, uniforms: Tensor, prompt_width: int) -> None:
        self.uniforms = uniforms  # [B, new tokens] in [0, 1)
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, T], [B, V]
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_width]
        # Double: in single precision the sum over a large vocabulary loses its improbable tokens.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        level = (uniform * cumulative[:, -1])[:, None]
        token = torch.searchsorted(cumulative, level, right=True).clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_length: int, add_special_tokens: bool
) -> list[list[int]]:
    """The first tokens of every prompt, as in training: special tokens that would close it are left out.

    At least one, since a model cannot continue nothing: the beginning of a sequence, or the end of the last.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    # Not verbose: what exceeds the tokenizer's own limit is cut right here.
    batch = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
    return [_without_closing(encoding)[:max_length] or [start] for encoding in batch.encodings or []]


def _without_closing(encoding: Encoding) -> list[int]:
    """Token ids up to the last one that the tokenizer did not add itself; one it put before them stays."""
    added = encoding.special_tokens_mask
    length = len(added)
    while length > 1 and added[length - 1]:
        length -= 1
    return encoding.ids[:length]


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T], both long, prompts at the right edge. Nothing reads `pad`."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_new_tokens: int
) -> GenerationConfig:
    """Greedy as far as transformers is concerned: what decoding adds is in the processors."""
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    width: int = model.config.get_text_config().vocab_size
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        # A head padded beyond the vocabulary: no loss has trained those rows.
        suppress_tokens=list(range(vocabulary, width)) or None,
    )


def _processors(decoding: Decoding, mask: Tensor, draws: Sequence[Sequence[float]]) -> LogitsProcessorList:
    """What a decoding does to the scores, in the order of transformers' own sampling."""
    processors = LogitsProcessorList()
    if decoding.no_repeat_ngram_size:
        processors.append(NoRepeatNgram(decoding.no_repeat_ngram_size, mask))
    if decoding.sample:
        if decoding.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_p < 1.0:
            processors.append(TopPLogitsWarper(decoding.top_p))
        uniforms = torch.tensor(draws, dtype=torch.float64, device=mask.device)
        processors.append(Draw(uniforms, mask.shape[1]))
    return processors


def _uniforms(seed: int, prompt: str, count: int) -> list[float]:
    """Random numbers of one prompt, the same on every machine: Python seeds with a hash of the text."""
    generator = random.Random(f"{seed}\n{prompt}")
    return [generator.random() for _ in range(count)]


def _continue(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    synced: bool,
) -> Tensor:
    """The new tokens [B, at most max_new_tokens] after prompts [B, T]; position ids follow from the mask."""
    generator: Any = model  # transformers types `generate` for a protocol that its own models do not meet
    whole = generator.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=processors,
        synced_gpus=synced,
    )
    return whole[:, ids.shape[1] :]


def _continuation(tokenizer: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> Continuation:
    """`new` goes on behind the end where others of the batch were longer."""
    said = list(takewhile(lambda token: token != tokenizer.eos_token_id, new))
    ended = len(said) < len(new)
    return Continuation(prompt, new[: len(said) + ended], answer_text(tokenizer, said), ended)


def answer_text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """An answer as text: cut at its end, without special tokens, stripped."""
    answer = list(takewhile(lambda token: token != tokenizer.eos_token_id, ids))
    text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.strip()


def _most_of_all_ranks(own: int, device: torch.device) -> int:
    """The largest number that any rank brings. A collective call."""
    most = torch.tensor(own, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


@contextmanager
def _ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and a blank generation configuration (transformers would mix it in); put back after."""
    training = [module for module in model.modules() if module.training]
    own = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
        for module in training:
            module.training = True
