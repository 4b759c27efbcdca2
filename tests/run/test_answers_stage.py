"""The stage `answers`: what is generated is found again by what it was made from, part by part, and mixed in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kdzoo.data.encode import Encoder
from kdzoo.data.mixing import row_order
from kdzoo.data.rows import Row
from kdzoo.data.tokenizer import load_tokenizer
from kdzoo.engine.frozen import FrozenModel
from kdzoo.errors import ModelError
from kdzoo.evaluate.answers import OwnAnswer
from kdzoo.recipe.model import Answers, Data, Evaluation, Source, Template
from kdzoo.run import answers
from kdzoo.run.answers import AnsweredRows, answered_rows
from kdzoo.run.context import ModelRole, RunContext
from kdzoo.run.inputs import SourceRows, rows_fingerprint

ROWS = [Row(f"r{i}", f"ask {i}", "", (f"gold {i}",)) for i in range(10)]
SOURCE = SourceRows("data.train", Source(lab="train"), ROWS, rows_fingerprint(ROWS))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer("lab:bytes"), context_of().recipe.data)


def context_of(encoder: Encoder | None = None, **changed: Any) -> RunContext:
    template = changed.pop("prompt", "{instruction}:")
    data = Data(train=Source(), template=Template(prompt=template), max_length=changed.pop("max_length", 64))
    recipe = SimpleNamespace(
        data=data,
        evaluation=Evaluation(max_new_tokens=16, batch=4),
        precision=changed.pop("precision", "fp32"),
    )
    role = None if encoder is None else ModelRole("teacher", cast(Any, None), encoder, None)
    assert not changed
    return cast(RunContext, SimpleNamespace(recipe=recipe, teacher=role))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of the rows of every part that a model was asked for."""
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(answers, "PART", 4)
    parts: list[list[str]] = []

    def answer(model: Any, encoder: Any, rows: list[Row], *_: Any) -> list[OwnAnswer]:
        parts.append([row.id for row in rows])
        return [OwnAnswer(f"re: {row.instruction}", True, 4, -2.0) for row in rows]

    monkeypatch.setattr(answers, "own_answers", answer)
    return parts


def open_model() -> FrozenModel:
    return cast(FrozenModel, SimpleNamespace(close=lambda: None))


def answer(encoder: Encoder, stage: Answers, key: str = "teacher-1", source: SourceRows = SOURCE, **changed: Any):
    return answered_rows(context_of(encoder, **changed), stage, source, key, open_model)


def test_rows_are_asked_in_parts_and_only_those_of_the_share(encoder, asked):
    found = answer(encoder, Answers(share=0.6))
    order = row_order(10, seed=0)[:6]
    assert asked == [[f"r{i}" for i in order[:4]], [f"r{i}" for i in order[4:]]]
    assert set(found.answers) == set(order)
    for number, (before, after) in enumerate(zip(ROWS, found.source.rows, strict=True)):
        assert after.references == ((f"re: ask {number}",) if number in order else before.references)


def test_what_is_in_the_cache_is_neither_asked_nor_opened_again(encoder, asked, capsys):
    first = answer(encoder, Answers(share=0.8))
    assert len(asked) == 2

    def nobody() -> FrozenModel:
        raise AssertionError("there is nothing to generate")

    again = answered_rows(context_of(encoder), Answers(share=0.8), SOURCE, "teacher-1", nobody)
    assert again == first
    assert "answers: made before, found in the cache (2 of 2 parts)" in capsys.readouterr().err
    answer(encoder, Answers(share=1.0))  # of a larger share, the parts that are not there
    assert len(asked) == 3


def test_an_interruption_loses_no_part_that_was_done(encoder, asked, monkeypatch):
    whole = answers.own_answers

    def interrupted(*arguments: Any) -> list[OwnAnswer]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(answers, "own_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(encoder, Answers())
    monkeypatch.setattr(answers, "own_answers", whole)
    answer(encoder, Answers())
    assert len(asked) == 3


OTHERS: dict[str, Callable[[Encoder], Any]] = {
    "weights": lambda encoder: answer(encoder, Answers(), key="teacher-2"),
    "length": lambda encoder: answer(encoder, Answers(max_new_tokens=17)),
    "decoding": lambda encoder: answer(encoder, Answers.model_validate({"decoding": {"sample": True, "top_p": 0.9}})),
    "score": lambda encoder: answer(encoder, Answers(score="mean_logprob")),
    "template": lambda encoder: answer(encoder, Answers(), prompt="{instruction}?"),
    "precision": lambda encoder: answer(encoder, Answers(), precision="bf16"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_conditions_are_other_answers(encoder, asked, what):
    answer(encoder, Answers())
    before = len(asked)
    OTHERS[what](encoder)
    assert len(asked) == 2 * before


def test_neither_the_datas_responses_nor_the_split_nor_what_follows_the_prompt_matter(encoder, asked):
    answer(encoder, Answers())
    before = len(asked)
    others = [Row(row.id, row.instruction, row.input, ("another response",)) for row in ROWS]
    answer(encoder, Answers(), source=SourceRows("data.train", SOURCE.source, others, "x"))
    answer(encoder, Answers(batch=1))
    answer(encoder, Answers(), max_length=100)
    assert len(asked) == before


def test_the_fingerprint_follows_from_the_mixed_rows(encoder, asked):
    half, whole = answer(encoder, Answers(share=0.5)), answer(encoder, Answers())
    assert len({SOURCE.fingerprint, half.source.fingerprint, whole.source.fingerprint}) == 3
    assert whole.source.fingerprint == rows_fingerprint(whole.source.rows)
    cut = [Row(row.id, row.instruction, row.input, row.references, ended=False) for row in ROWS]
    assert rows_fingerprint(cut) != rows_fingerprint(ROWS)


def replies(monkeypatch: pytest.MonkeyPatch, said: list[OwnAnswer]) -> None:
    monkeypatch.setattr(answers, "own_answers", lambda model, encoder, rows, *_: said[: len(rows)])


def test_what_was_cut_and_what_is_empty_is_counted_and_said(encoder, asked, monkeypatch, capsys):
    cut, empty, whole = OwnAnswer("cu", False, 16, -8.0), OwnAnswer("", True, 1, -1.0), OwnAnswer("yes", True, 3, -3.0)
    replies(monkeypatch, [cut, empty, whole, whole])
    source = SourceRows("data.train", SOURCE.source, ROWS[:4], "x")
    found = answer(encoder, Answers(), source=source)
    assert [row.ended for row in found.source.rows].count(False) == 1
    assert sum(row.references[0].startswith("gold") for row in found.source.rows) == 1
    assert found.metrics() == {
        "share": 0.75,
        "tokens": 23 / 4,
        "cut": 0.25,
        "empty": 0.25,
        "logprob_per_token": -15 / 23,
        "logprob_per_answer": -15 / 4,
    }
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "answers: 3 of 4 rows have the teacher's answer as their response",
        "answers: 5.8 tokens and a log-likelihood of -3.75 per answer, -0.652 per token",
        "answers: 25.0% cut after 16 tokens; no end is taught there",
        "answers: 25.0% empty; these rows keep the data's response",
    ]


def test_a_teacher_without_a_word_is_refused(encoder, asked, monkeypatch):
    replies(monkeypatch, [OwnAnswer("", True, 1, -1.0)] * 4)
    with pytest.raises(ModelError, match=r"^stages\.answers: every answer of the teacher is empty"):
        answer(encoder, Answers())


def test_every_answer_is_listed_with_its_row():
    found = AnsweredRows(SOURCE, {3: OwnAnswer("b", True, 2, -1.0), 1: OwnAnswer("", False, 2, -1.5)})
    assert json.loads(json.dumps(found.to_json())) == [
        {"id": "r1", "text": "", "ended": False, "tokens": 2, "logprob": -1.5},
        {"id": "r3", "text": "b", "ended": True, "tokens": 2, "logprob": -1.0},
    ]
