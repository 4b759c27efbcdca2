"""The stage `answers`: the teacher's own answers to the prompts of `distill`, from the cache, and the rows with them.

Answers of another model are `cached_answers` with its role, its key and a way to open it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import kdzoo
from kdzoo.cache import cached_folder, cached_path, content_key
from kdzoo.data.mixing import Response, row_order, taken, with_responses
from kdzoo.data.rows import Row
from kdzoo.engine.close import release
from kdzoo.engine.distributed import barrier, from_rank_0, rank, world
from kdzoo.engine.frozen import FrozenModel
from kdzoo.errors import ModelError
from kdzoo.evaluate.answers import Candidates, OwnAnswer, own_answers
from kdzoo.recipe.model import Answers
from kdzoo.run import messages
from kdzoo.run.context import ModelRole, RunContext
from kdzoo.run.inputs import SourceRows, encoding_key, rows_fingerprint
from kdzoo.run.progress import StageProgress, print_message, stage_progress

PART = 512
"""Rows, at most, whose answers are one entry of the cache: an interrupted run loses no more."""


@dataclass(frozen=True)
class AnsweredRows:
    """The rows of `distill` with answers in place of responses."""

    source: SourceRows
    """Its fingerprint is that of these rows."""
    answers: Mapping[int, OwnAnswer]
    """By the number of the row; also those that are empty, whose rows keep the data's response."""

    @property
    def replaced(self) -> int:
        """How many rows have an answer as their response."""
        return sum(bool(answer.text) for answer in self.answers.values())

    def metrics(self) -> dict[str, float]:
        """What is logged: tokens are the teacher's, per answer; log-likelihoods are in nats; the others are shares."""
        found = self.answers.values()
        logprob, tokens = sum(answer.logprob for answer in found), sum(answer.tokens for answer in found)
        return {
            "share": self.replaced / len(self.source.rows),
            "tokens": tokens / len(found),
            "cut": fmean(not answer.ended for answer in found),
            "empty": fmean(not answer.text for answer in found),
            "logprob_per_token": logprob / tokens,
            "logprob_per_answer": logprob / len(found),
        }

    def to_json(self) -> list[dict[str, Any]]:
        """An object per answer, in the order of the rows."""
        rows = self.source.rows
        return [{"id": rows[number].id, **asdict(answer)} for number, answer in sorted(self.answers.items())]


def answered_rows(
    context: RunContext, stage: Answers, source: SourceRows, key: str, open_teacher: Callable[[], FrozenModel]
) -> AnsweredRows:
    """The rows of `source`, as many as the stage says with the answers of the teacher whose weights `key` names."""
    rows, wanted = source.rows, Candidates.of(stage, context.recipe.evaluation)
    order = row_order(len(rows), stage.seed)[: taken(len(rows), stage.share)]
    found = cached_answers(context, context.teacher, [rows[i] for i in order], wanted, key, open_teacher)
    if not any(answer.text for answer in found):
        raise ModelError(
            "stages.answers: every answer of the teacher is empty, so that nothing is learnt from it; is it trained, "
            "and for these prompts?"
        )
    answers = dict(zip(order, found, strict=True))
    mixed = with_responses(rows, {i: Response(answer.text, answer.ended) for i, answer in answers.items()})
    answered = AnsweredRows(replace(source, rows=mixed, fingerprint=rows_fingerprint(mixed)), answers)
    for text in messages.answers(len(rows), answered.replaced, answered.metrics(), wanted.max_new_tokens):
        print_message(text, enabled=rank() == 0)
    return answered


def cached_answers(
    context: RunContext,
    role: ModelRole,
    rows: Sequence[Row],
    wanted: Candidates,
    key: str,
    open_model: Callable[[], FrozenModel],
) -> list[OwnAnswer]:
    """An answer to every row, by the model in this role whose weights `key` names. Every rank calls this together.

    Only where some are not in the cache, the model is opened.
    """
    parts = [rows[start : start + PART] for start in range(0, len(rows), PART)]
    contents = [_key(context, role, part, wanted, key) for part in parts]
    there = from_rank_0([_file(content).exists() for content in contents])
    if any(there):
        print_message(messages.answers_in_cache(sum(there), len(there)), enabled=rank() == 0)
    if not all(there):
        missing = [(part, content) for part, content, found in zip(parts, contents, there, strict=True) if not found]
        _generate(role, missing, wanted, open_model())
        release()
        barrier()
    return [answer for content in contents for answer in _read(_file(content))]


def _generate(
    role: ModelRole, parts: Sequence[tuple[Sequence[Row], Mapping[str, Any]]], wanted: Candidates, model: FrozenModel
) -> None:
    """Part by part into the cache, under one bar; when this returns, nothing holds the model."""
    shares = [len(wanted.seeds) * -(-len(rows) // world()) for rows, _ in parts]
    before = 0
    with stage_progress("answers", sum(shares), enabled=rank() == 0) as bar:
        for (rows, content), share in zip(parts, shares, strict=True):
            on_done = partial(_shown, bar, before)
            found = own_answers(model, role.encoder, rows, wanted, on_done)
            if rank() == 0:
                _write(content, found)
            before += share
    model.close()


def _shown(bar: StageProgress, before: int, done: int) -> None:
    bar.update(before + done)


def _key(context: RunContext, role: ModelRole, rows: Sequence[Row], wanted: Candidates, key: str) -> dict[str, Any]:
    """What answers depend on. How the work was split is no part of it, nor are the data's responses."""
    encoding = encoding_key(context, role)
    return {
        "kdzoo": kdzoo.__version__,
        "model": key,
        "prompts": content_key([[row.instruction, row.input] for row in rows]),
        "encoding": {name: value for name, value in encoding.items() if name != "max_length"},
        "decoding": wanted.decoding.model_dump(mode="json"),
        "score": wanted.score,
        "max_new_tokens": wanted.max_new_tokens,
        "precision": context.recipe.precision,
    }


def _file(content: Mapping[str, Any]) -> Path:
    return cached_path("answers", content) / "answers.json"


def _read(file: Path) -> list[OwnAnswer]:
    return [OwnAnswer(**answer) for answer in json.loads(file.read_text(encoding="utf-8"))]


def _write(content: Mapping[str, Any], found: Sequence[OwnAnswer]) -> None:
    def build(out: Path) -> None:
        text = json.dumps([asdict(answer) for answer in found], ensure_ascii=False)
        (out / "answers.json").write_text(text, encoding="utf-8")

    cached_folder("answers", content, build)
