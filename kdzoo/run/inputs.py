"""The data of a run: rows, read once; corpora, tokenised for the models of a stage; and all that a stage works on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from kdzoo.data.alignments import cached_alignments
from kdzoo.data.collate import Align, Example, build_examples
from kdzoo.data.loader import MicroBatches
from kdzoo.data.rows import Row, load_rows
from kdzoo.data.tokenizer import tokens_fingerprint
from kdzoo.engine.distributed import rank, world
from kdzoo.engine.frozen import FrozenModel
from kdzoo.recipe.model import Source
from kdzoo.run.context import ModelRole, RunContext

Artifacts = Mapping[str, Mapping[str, Tensor]]
"""Artifact stage -> the state of the module that it has trained."""


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source of the recipe."""

    address: str
    """The source's place in the recipe: errors begin with it."""
    source: Source
    rows: Sequence[Row]
    fingerprint: str


@dataclass(frozen=True)
class Corpus:
    """Rows of one source, tokenised for the models of a stage."""

    source: SourceRows
    batches: MicroBatches

    @property
    def examples(self) -> Sequence[Example]:
        return self.batches.examples


@dataclass(frozen=True)
class StageInputs:
    """What a stage works on: which student, from which weights, which teacher, which rows."""

    student: ModelRole | None
    student_folder: Path | None
    teacher: FrozenModel | None
    corpus: Corpus
    artifacts: Mapping[str, Artifacts]
    """By loss term."""


class AlignedShares(NamedTuple):
    """Which shares of the student's response tokens an alignment reaches, 0 to 1."""

    spans: float
    pairs: float


def read_source(source: Source, address: str, columns: Sequence[str] = ()) -> SourceRows:
    """Rows with these columns of numbers. Raises DataError, which begins with `address`."""
    rows = load_rows(source, address, columns)
    return SourceRows(address, source, rows, rows_fingerprint(rows))


def tokenise(
    context: RunContext,
    source: SourceRows,
    *,
    student: ModelRole | None,
    teacher: ModelRole | None,
    rows: Literal["response", "sequence"] = "response",
    columns: Sequence[str] = (),
) -> Corpus:
    """`student` and `teacher` are the models whose tokens are wanted; the rows of both are aligned. `columns` are those
    that token weights read, on the student's tokens."""
    same = context.same_tokens and student is not None and teacher is not None
    examples = build_examples(
        source.rows,
        None if student is None else student.encoder,
        None if teacher is None else teacher.encoder,
        None if student is None or teacher is None else _aligner_of(context, source.fingerprint, student, teacher),
        same,
        source.address,
        columns,
    )
    batches = MicroBatches(
        examples,
        same_tokens=same,
        rows=rows,
        pad_id_student=None if student is None else student.pad_id,
        pad_id_teacher=None if teacher is None else teacher.pad_id,
        columns=tuple(columns),
    )
    return Corpus(source, batches)


def _aligner_of(context: RunContext, rows: str, student: ModelRole, teacher: ModelRole) -> Align:
    """The recipe's aligner, of these rows; what it has found before is read from the cache."""
    used = context.recipe.align
    code = [file.read_bytes() for file in context.registry.providers["aligner", used.use].code()]
    made_from = {
        "rows": rows,
        "encoding": encoding_key(context, student, teacher),
        "aligner": used.use,
        "params": context.aligner.params.model_dump(),
        "code": [hashlib.sha256(content).hexdigest() for content in code],
    }
    return partial(cached_alignments, context.aligner, made_from)


def aligned_shares(examples: Sequence[Example]) -> AlignedShares:
    """Of rows that are tokenised for two models."""
    alignments = [example.alignment for example in examples if example.alignment is not None]
    in_spans = sum(end - start for alignment in alignments for start, end, _, _ in alignment.spans)
    in_pairs = sum(len(alignment.pairs) for alignment in alignments)
    tokens = sum(len(example.student.ends) for example in examples if example.student)
    return AlignedShares(in_spans / tokens, in_pairs / tokens)


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """A hash of the text of the rows, and of which responses were cut."""
    digest = hashlib.sha256()
    for row in rows:
        cut = [] if row.ended else ["cut"]
        digest.update(json.dumps([row.instruction, row.input, row.references, *cut], ensure_ascii=False).encode())
    return digest.hexdigest()[:20]


def columns_fingerprint(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A hash of what the rows say in these columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.columns[name] for name in columns]).encode())
    return digest.hexdigest()[:20]


def encoding_key(context: RunContext, *roles: ModelRole) -> dict[str, Any]:
    """What decides how rows become tokens."""
    data = context.recipe.data
    return {
        "template": data.template.model_dump(),
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "tokenizers": [tokens_fingerprint(role.encoder.tokenizer) for role in roles],
    }


def deal(count: int, micro_batch: int) -> list[list[int]]:
    """The first `count` rows dealt out to this rank in micro-batches, as many on every rank."""
    stride = micro_batch * world()
    starts = range(rank() * micro_batch, -(-count // stride) * stride, stride)
    return [list(range(start, min(start + micro_batch, count))) for start in starts]
