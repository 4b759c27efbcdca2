"""One model on one set of rows: answers with Rouge-L, cross-entropy and token accuracy on the gold responses.

Rows are dealt out over ranks and come back in their order: greedy scores do not depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import mean
from typing import Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from kdzoo.data.collate import build_examples, collate
from kdzoo.data.encode import Encoder
from kdzoo.data.rows import Row
from kdzoo.data.template import prompt_of
from kdzoo.engine.distributed import gathered, rank, summed, world
from kdzoo.engine.frozen import FrozenModel, gather
from kdzoo.evaluate import ModelScores, RougeScores
from kdzoo.evaluate.generation import continue_prompts
from kdzoo.evaluate.rouge import mean_score, rouge_l
from kdzoo.recipe.model import Decoding, Evaluation
from kdzoo.step.chunks import CHUNK_BYTES
from kdzoo.step.facts import predictions

Item = TypeVar("Item")


@dataclass(frozen=True)
class Answer:
    """One generated answer and what it was scored against."""

    id: str
    seed: int | None
    prompt: str
    prediction: str
    references: list[str]
    rouge_l: float


@dataclass(frozen=True)
class Scored:
    """A model's scores on a set, with its answers by decoding."""

    scores: ModelScores
    answers: Mapping[str, list[Answer]]


class Generate(Protocol):
    """Answers to prompts in their order; the seed counts where they are drawn. `on_batch` hears how many are done."""

    def __call__(
        self, prompts: Sequence[str], decoding: Decoding, seed: int, on_batch: Callable[[int], None]
    ) -> list[str]: ...


def score_model(
    model: FrozenModel,
    encoder: Encoder,
    rows: Sequence[Row],
    evaluation: Evaluation,
    address: str,
    on_done: Callable[[int], None],
) -> Scored:
    """Generate under every decoding and seed, and read the gold responses. Every rank calls this together.

    `on_done` hears how many answers this rank has, counted over all decodings and seeds.
    """
    generator = own_generator(model.model, encoder, evaluation, synced=model.partitioned)
    rouge, answers = score_answers(generator, encoder, rows, evaluation.decoding, on_done)
    entropy, accuracy = read_gold(model, encoder, rows, evaluation.batch, address)
    return Scored(ModelScores(rouge_l=rouge, cross_entropy=entropy, token_accuracy=accuracy), answers)


def own_generator(model: PreTrainedModel, encoder: Encoder, evaluation: Evaluation, synced: bool = False) -> Generate:
    """Our own generation with a loaded model; `synced` where it is partitioned over ranks."""

    def answer(prompts: Sequence[str], decoding: Decoding, seed: int, on_batch: Callable[[int], None]) -> list[str]:
        found = continue_prompts(
            model,
            encoder.tokenizer,
            prompts,
            decoding,
            seed,
            max_new_tokens=evaluation.max_new_tokens,
            max_prompt_length=encoder.data.max_prompt_length,
            batch=evaluation.batch,
            add_special_tokens=not encoder.data.template.chat,
            synced=synced,
            on_batch=on_batch,
        )
        return [one.text for one in found]

    return answer


def score_answers(
    generator: Generate,
    encoder: Encoder,
    rows: Sequence[Row],
    decodings: Mapping[str, Decoding],
    on_done: Callable[[int], None],
) -> tuple[dict[str, RougeScores], dict[str, list[Answer]]]:
    """Rouge-L and answers by decoding. Every rank calls this together and generates for its share of the rows."""
    prompts = [prompt_of(row, encoder.data.template, encoder.tokenizer) for row in rows]
    mine = range(rank(), len(rows), world())
    rouge: dict[str, RougeScores] = {}
    answers: dict[str, list[Answer]] = {}
    before = 0
    for name, decoding in decodings.items():
        answers[name] = []
        per_seed = []
        for seed in decoding.seeds if decoding.sample else [None]:
            own = generator(
                [prompts[i] for i in mine],
                decoding,
                seed or 0,
                lambda done, before=before: on_done(before + done),  # type: ignore[misc]
            )
            before += len(mine)
            texts = in_order(own, len(rows))
            scores = rouge_l(texts, [row.references for row in rows])
            answers[name] += [
                Answer(row.id, seed, prompt, text, list(row.references), score)
                for row, prompt, text, score in zip(rows, prompts, texts, scores, strict=True)
            ]
            per_seed.append(mean_score(scores))
        rouge[name] = RougeScores(mean=mean(per_seed), per_seed=per_seed)
    return rouge, answers


def read_gold(
    model: FrozenModel, encoder: Encoder, rows: Sequence[Row], batch: int, address: str
) -> tuple[float, float]:
    """Cross-entropy (nats per response token) and the share of response tokens that are the model's first choice."""
    pad_id = int(encoder.tokenizer.pad_token_id)
    mine = list(range(rank(), len(rows), world()))
    examples = build_examples([rows[i] for i in mine], None, encoder, None, False, address)
    totals = torch.zeros(3, dtype=torch.float64, device=model.device)
    # The same number of batches on every rank, since each is a forward pass that all take part in.
    for number in range(ceil(ceil(len(rows) / world()) / batch)):
        chunk = collate(
            examples[number * batch : (number + 1) * batch],
            same_tokens=False,
            rows="response",
            pad_id_student=None,
            pad_id_teacher=pad_id,
        )
        assert chunk.teacher is not None
        side = chunk.teacher.to(model.device)
        hidden = model.sites(side, {"hidden.last"})["hidden.last"]
        with gather(model.head.parameters):
            facts = predictions(hidden, model.head, side.labels, CHUNK_BYTES)
        totals += torch.stack(
            [
                -facts["teacher.label_logprob"].sum().double(),
                facts["teacher.correct"].sum().double(),
                torch.tensor(float(len(side)), dtype=torch.float64, device=model.device),
            ]
        )
    found = summed({"nll": totals[0], "right": totals[1], "count": totals[2]}, model.device)
    return found["nll"] / found["count"], found["right"] / found["count"]


def copied_input(rows: Sequence[Row], decodings: Iterable[str]) -> Scored:
    """What repeating the input (or, without one, the instruction) scores: whatever is decoded, the same."""
    texts = [row.input or row.instruction for row in rows]
    scores = rouge_l(texts, [row.references for row in rows])
    value = mean_score(scores)
    answers = [
        Answer(row.id, None, "", text, list(row.references), score)
        for row, text, score in zip(rows, texts, scores, strict=True)
    ]
    rouge = {name: RougeScores(mean=value, per_seed=[value]) for name in decodings}
    return Scored(ModelScores(rouge_l=rouge, cross_entropy=None, token_accuracy=None), {"copy": answers})


def in_order(own: Sequence[Item], count: int) -> list[Item]:
    """Items of all ranks, dealt out as row i to rank i mod ranks, back in the order of the rows."""
    dealt = gathered(own)
    return [dealt[row % world()][row // world()] for row in range(count)]
