"""Rows become examples once; examples become batches, again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from kdzoo.api.aligner import Alignment, Tokens
from kdzoo.api.batch import Batch, Side
from kdzoo.data.encode import Encoded, Encoder
from kdzoo.data.rows import Row
from kdzoo.data.template import prompt_of
from kdzoo.errors import DataError

Align = Callable[[Sequence[Tokens], Sequence[Tokens]], Sequence[Alignment]]
"""The alignments of many responses: the student's tokens of each, the teacher's."""


@dataclass(frozen=True)
class Example:
    """One row, tokenised for the models that run. `alignment` where both do."""

    id: str
    student: Encoded | None
    teacher: Encoded | None
    alignment: Alignment | None
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What token weights read, for each of the student's tokens of the response."""


def build_examples(
    rows: Sequence[Row],
    student_encoder: Encoder | None,
    teacher_encoder: Encoder | None,
    align: Align | None,
    same: bool,
    address: str,
    columns: Sequence[str] = (),
) -> list[Example]:
    """Tokenises and aligns every row, with its first reference as the response, and with these columns of the rows.

    `same`: both models have one tokenizer; one encoding serves both sides and the alignment is the identity.
    Otherwise `align` is needed where both encoders are there. Rows without a response token are a
    `DataError` at `address`, with their number and the first one's id; so is a column with a number for each token,
    where these are not the student's tokens.
    """
    examples = _tokenised(rows, student_encoder, teacher_encoder, align, same, address)
    if student_encoder is None or not columns:
        return examples
    return [
        example
        if example.student is None
        else replace(example, columns=_columns(row, columns, example.student, address))
        for row, example in zip(rows, examples, strict=True)
    ]


def _tokenised(
    rows: Sequence[Row],
    student_encoder: Encoder | None,
    teacher_encoder: Encoder | None,
    align: Align | None,
    same: bool,
    address: str,
) -> list[Example]:
    if student_encoder is None or teacher_encoder is None:
        nobody = [None] * len(rows)
        students = nobody if student_encoder is None else _encode(rows, student_encoder, address)
        teachers = nobody if teacher_encoder is None else _encode(rows, teacher_encoder, address)
        return [
            Example(row.id, student, teacher, None)
            for row, student, teacher in zip(rows, students, teachers, strict=True)
        ]
    if same:
        shared = _encode(rows, student_encoder, address)
        return [
            Example(row.id, encoded, encoded, _identity(len(encoded.ends)))
            for row, encoded in zip(rows, shared, strict=True)
        ]
    assert align is not None
    students, teachers = _encode(rows, student_encoder, address), _encode(rows, teacher_encoder, address)
    alignments = align(list(map(_tokens, students)), list(map(_tokens, teachers)))
    return [Example(row.id, s, t, found) for row, s, t, found in zip(rows, students, teachers, alignments, strict=True)]


def collate(
    examples: Sequence[Example],
    *,
    same_tokens: bool,
    rows: Literal["response", "sequence"],
    pad_id_student: int | None,
    pad_id_teacher: int | None,
    columns: Sequence[str] = (),
) -> Batch:
    """A micro-batch on the CPU, with its own counts (the caller sums them over the step).

    A side exists where its pad id is given. `rows` "sequence" scores every real token of the teacher; the
    student's rows are always those of the response. Without examples the batch is a stand-in that every
    module can run on: one sequence of padding without rows.
    """
    numbers = list(accumulate((len(_spans(example)) for example in examples), initial=0))
    student = teacher = None
    if pad_id_student is not None:
        student = _Scored(
            [_present(example.student) for example in examples],
            [[(start, end) for start, end, _, _ in _spans(example)] for example in examples],
            whole=False,
        )
    if pad_id_teacher is not None:
        teacher = _Scored(
            [_present(example.teacher) for example in examples],
            [[(start, end) for _, _, start, end in _spans(example)] for example in examples],
            whole=rows == "sequence",
        )
    assert not (same_tokens and student and teacher and rows == "sequence"), "both sides must have the same rows"
    batch = Batch(
        student=None if student is None or pad_id_student is None else student.side(pad_id_student, numbers),
        teacher=None if teacher is None or pad_id_teacher is None else teacher.side(pad_id_teacher, numbers),
        pairs=_pairs(examples, student, teacher),
        same_tokens=same_tokens,
        counts={},
        columns={name: _column(name, examples, student) for name in columns},
    )
    return replace(batch, counts=batch.local_counts())


class _Scored:
    """One side's sequences with the positions that are scored: from `first[b]` to the last but one."""

    def __init__(self, sequences: list[Encoded], ranges: list[list[tuple[int, int]]], whole: bool) -> None:
        self.sequences = sequences
        self.ranges = ranges  # of response tokens, one per span
        self.first = [0 if whole else max(encoded.prompt_length - 1, 0) for encoded in sequences]
        sizes = (len(encoded.ids) - 1 - first for encoded, first in zip(sequences, self.first, strict=True))
        self.offset = list(accumulate(sizes, initial=0))

    def row(self, b: int, token: int) -> int | None:
        """The packed row that predicts response token `token` of sequence b; a text's first has none."""
        within = self.sequences[b].prompt_length + token - 1 - self.first[b]
        return None if within < 0 else self.offset[b] + within

    def side(self, pad_id: int, numbers: Sequence[int]) -> Side:
        """`numbers[b]` is the number, over the batch, of sequence b's first span."""
        if not self.sequences:
            return _stand_in(pad_id)
        width = max(len(encoded.ids) for encoded in self.sequences)
        input_ids = torch.full((len(self.sequences), width), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        rows: list[int] = []
        span: list[int] = []
        for b, (encoded, first) in enumerate(zip(self.sequences, self.first, strict=True)):
            length = len(encoded.ids)
            input_ids[b, :length] = torch.tensor(encoded.ids)
            attention_mask[b, :length] = 1
            rows.extend(range(b * width + first, b * width + length - 1))
            owner = [-1] * length
            for number, (start, end) in enumerate(self.ranges[b], start=numbers[b]):
                owner[encoded.prompt_length + start : encoded.prompt_length + end] = [number] * (end - start)
            span.extend(owner[first + 1 :])
        packed = torch.tensor(rows, dtype=torch.long)
        flat = input_ids.flatten()
        return Side(
            input_ids=input_ids,
            attention_mask=attention_mask,
            positions=packed,
            labels=flat[packed + 1],
            inputs=flat[packed],
            sample=packed // width,
            span=torch.tensor(span, dtype=torch.long),
        )


def _column(name: str, examples: Sequence[Example], student: _Scored | None) -> Tensor:
    """[N] of the student's tokens; a text's first token is scored nowhere, and left out."""
    assert student is not None, "columns are of the student's tokens"
    values: list[float] = []
    for b, example in enumerate(examples):
        own = example.columns[name]
        values.extend(own if student.row(b, 0) is not None else own[1:])
    return torch.tensor(values, dtype=torch.float32)


def _columns(row: Row, columns: Sequence[str], encoded: Encoded, address: str) -> dict[str, Sequence[float]]:
    """What these columns of the row say of each token of the response."""
    count, cut = len(encoded.ends), encoded.ends[-1] != encoded.starts[-1]
    found: dict[str, Sequence[float]] = {}
    for name in columns:
        value = row.columns[name]
        if isinstance(value, float):
            found[name] = [value] * count
        elif len(value) == count or (cut and len(value) > count):
            found[name] = value[:count]
        elif len(value) == count - 1 and not cut:
            found[name] = [*value, value[-1] if value else 1.0]
        else:
            raise DataError(
                f"{address}: field '{name}' of row '{row.id}' has {len(value)} numbers, and the response has "
                f"{count - (not cut)} tokens{'' if cut else ' and an end'}; give one for each, or a number for the row"
            )
    return found


def _pairs(examples: Sequence[Example], student: _Scored | None, teacher: _Scored | None) -> Tensor:
    """[P, 2] (student row, teacher row)"""
    pairs: list[tuple[int, int]] = []
    if student is not None and teacher is not None:
        for b, example in enumerate(examples):
            for s, t in () if example.alignment is None else example.alignment.pairs:
                student_row, teacher_row = student.row(b, s), teacher.row(b, t)
                if student_row is not None and teacher_row is not None:
                    pairs.append((student_row, teacher_row))
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def _stand_in(pad_id: int) -> Side:
    none = torch.zeros(0, dtype=torch.long)
    input_ids = torch.full((1, 2), pad_id)
    return Side(input_ids, torch.ones_like(input_ids), positions=none, labels=none, inputs=none, sample=none, span=none)


def _encode(rows: Sequence[Row], encoder: Encoder, address: str) -> list[Encoded]:
    prompts = [prompt_of(row, encoder.data.template, encoder.tokenizer) for row in rows]
    encoded = encoder.encode(prompts, [row.references[0] for row in rows], [row.ended for row in rows])
    silent = [row for row, tokens in zip(rows, encoded, strict=True) if not tokens.ends]
    if silent:
        count = "1 row has" if len(silent) == 1 else f"{len(silent)} rows have"
        why = (
            "has an empty response; remove it"
            if not silent[0].references[0]
            else f"has a prompt as long as 'data.max_length' ({encoder.data.max_length} tokens); raise it, or lower "
            f"'data.max_prompt_length' ({encoder.data.max_prompt_length})"
        )
        raise DataError(f"{address}: {count} no response token; the first, '{silent[0].id}', {why}")
    return encoded


def _tokens(encoded: Encoded) -> Tokens:
    return Tokens(encoded.response_ids, encoded.starts, encoded.ends, encoded.text)


def _identity(length: int) -> Alignment:
    return Alignment(
        pairs=[(index, index) for index in range(length)],
        spans=[(index, index + 1, index, index + 1) for index in range(length)],
    )


def _spans(example: Example) -> Sequence[tuple[int, int, int, int]]:
    return () if example.alignment is None else example.alignment.spans


def _present(encoded: Encoded | None) -> Encoded:
    assert encoded is not None, "a pad id was given for a side that the examples do not have"
    return encoded
