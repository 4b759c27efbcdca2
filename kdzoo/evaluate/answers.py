"""A model's own answers to the prompts of rows: generated on all ranks, the likeliest of several candidates kept.

Rows are dealt out over ranks and come back in their order. Random numbers belong to a prompt and a seed, so that
answers depend neither on the number of ranks nor on batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Literal

import torch

from kdzoo.data.collate import Example, collate
from kdzoo.data.encode import Encoded, Encoder
from kdzoo.data.rows import Row
from kdzoo.data.template import prompt_of
from kdzoo.engine.distributed import rank, world
from kdzoo.engine.frozen import FrozenModel, gather
from kdzoo.evaluate.generation import Continuation, continue_prompts
from kdzoo.evaluate.scoring import in_order
from kdzoo.recipe.model import Answers, Decoding, Evaluation
from kdzoo.step.chunks import CHUNK_BYTES
from kdzoo.step.facts import predictions


@dataclass(frozen=True)
class OwnAnswer:
    """An answer, and how likely the model finds it."""

    text: str
    ended: bool
    """Whether the model has ended it. False: it was cut after the most tokens."""
    tokens: int
    """The model's own, with the end-of-sequence token where it has ended."""
    logprob: float
    """The model's log-likelihood of these tokens after the prompt at temperature 1, in nats."""


@dataclass(frozen=True)
class Candidates:
    """How candidates are generated, and which one is the answer."""

    decoding: Decoding
    """One candidate, or one per seed where it samples."""
    score: Literal["sum_logprob", "mean_logprob"]
    max_new_tokens: int
    batch: int
    """Prompts per batch and rank."""

    @classmethod
    def of(cls, stage: Answers, evaluation: Evaluation) -> Candidates:
        """What the stage leaves open is as in the evaluation."""
        return cls(
            stage.decoding,
            stage.score,
            evaluation.max_new_tokens if stage.max_new_tokens is None else stage.max_new_tokens,
            evaluation.batch if stage.batch is None else stage.batch,
        )

    @property
    def seeds(self) -> Sequence[int]:
        return self.decoding.seeds if self.decoding.sample else [0]


def own_answers(
    model: FrozenModel, encoder: Encoder, rows: Sequence[Row], wanted: Candidates, on_done: Callable[[int], None]
) -> list[OwnAnswer]:
    """The model's answer to every row. Every rank calls this together.

    `on_done` hears how many candidates this rank has generated.
    """
    mine = range(rank(), len(rows), world())
    prompts = [prompt_of(rows[i], encoder.data.template, encoder.tokenizer) for i in mine]
    batches = ceil(ceil(len(rows) / world()) / wanted.batch)
    candidates = []
    for number, seed in enumerate(wanted.seeds):
        found = continue_prompts(
            model.model,
            encoder.tokenizer,
            prompts,
            wanted.decoding,
            seed,
            max_new_tokens=wanted.max_new_tokens,
            max_prompt_length=encoder.data.max_prompt_length,
            batch=wanted.batch,
            add_special_tokens=not encoder.data.template.chat,
            synced=model.partitioned,
            on_batch=partial(_counted, on_done, number * len(mine)),
        )
        logprobs = log_likelihoods(model, int(encoder.tokenizer.pad_token_id), found, wanted.batch, batches)
        candidates.append([_answer(*pair) for pair in zip(found, logprobs, strict=True)])
    return in_order([best(of_row, wanted.score) for of_row in zip(*candidates, strict=True)], len(rows))


def best(candidates: Sequence[OwnAnswer], score: Literal["sum_logprob", "mean_logprob"]) -> OwnAnswer:
    """The likeliest candidate, the first of equals. One that is cut or empty loses to any other: its likelihood is
    that of a beginning, or says nothing of an answer."""

    def merit(answer: OwnAnswer) -> tuple[bool, bool, float]:
        per = answer.tokens if score == "mean_logprob" else 1
        return bool(answer.text), answer.ended, answer.logprob / per

    return max(candidates, key=merit)


def log_likelihoods(
    model: FrozenModel, pad_id: int, found: Sequence[Continuation], batch: int, batches: int
) -> list[float]:
    """The log-likelihood of every continuation under the model, summed over its tokens.

    Each of `batches` is a forward pass that all ranks take part in: a rank without continuations left joins in with a
    stand-in.
    """
    sums: list[float] = []
    for number in range(batches):
        chunk = found[number * batch : (number + 1) * batch]
        examples = [
            Example("", None, Encoded([*one.prompt_ids, *one.ids], len(one.prompt_ids), [], [], one.text), None)
            for one in chunk
        ]
        made = collate(examples, same_tokens=False, rows="response", pad_id_student=None, pad_id_teacher=pad_id)
        assert made.teacher is not None
        side = made.teacher.to(model.device)
        hidden = model.sites(side, {"hidden.last"})["hidden.last"]
        with gather(model.head.parameters):
            logprobs = predictions(hidden, model.head, side.labels, CHUNK_BYTES)["teacher.label_logprob"]
        total = torch.zeros(len(chunk), dtype=torch.float64, device=model.device)
        sums += total.index_add(0, side.sample, logprobs.double()).tolist()
    return sums


def _answer(found: Continuation, logprob: float) -> OwnAnswer:
    # A cut may fall into a character, whose first bytes are no text.
    text = found.text if found.ended else found.text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
    return OwnAnswer(text, found.ended, len(found.ids), logprob)


def _counted(on_done: Callable[[int], None], before: int, done: int) -> None:
    on_done(before + done)
