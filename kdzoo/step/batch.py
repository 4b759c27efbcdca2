"""What one micro-batch holds, on the CPU first: token ids, the rows that are scored, and every denominator.

Shape legend, used in every room: N student rows, M teacher rows, P aligned pairs, B sequences, S / D student /
teacher width, A the low width, V / W student / teacher vocabulary, E experts.

A *row* is one position whose next token is scored: position t of sequence b predicts `input_ids[b, t + 1]`.
Rows are packed in order of sequence and position; prompts and padding have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

Per = Literal["rows", "teacher_rows", "pairs", "spans", "sequences"]


@dataclass(frozen=True)
class Side:
    """One model's tokens of a micro-batch, right-padded, with its rows packed."""

    input_ids: Tensor  # [B, T] long
    attention_mask: Tensor  # [B, T] long, 1 on real tokens
    rows: Tensor  # [N] long, b * T + t of every scored position, ascending
    labels: Tensor  # [N] long, the token that each row predicts
    inputs: Tensor  # [N] long, the token that stands at each row
    sample: Tensor  # [N] long, the sequence b of each row, ascending
    span: Tensor  # [N] long, which aligned span the row's label belongs to (counted over the batch), -1 for none

    @property
    def sequences(self) -> int:
        return self.input_ids.shape[0]

    def __len__(self) -> int:
        return self.rows.shape[0]

    def every_token(self) -> Side:
        """The same sequences with a row for every real token, prompts included. Labels are unknown there (-100)."""
        rows = self.attention_mask.flatten().nonzero().squeeze(-1)
        ids, nothing = self.input_ids.flatten()[rows], torch.full_like(rows, -100)
        sample = rows // self.input_ids.shape[1]
        return Side(self.input_ids, self.attention_mask, rows, nothing, ids, sample, torch.full_like(rows, -1))

    def to(self, device: torch.device | str) -> Side:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class Batch:
    """A micro-batch for student and teacher. `student` is absent where only the teacher runs.

    `counts` are the denominators of the whole optimizer step: summed over accumulation and ranks before the first
    forward pass, so that a sum divided by its count means the same however the step was split.
    """

    student: Side | None
    teacher: Side | None
    pairs: Tensor  # [P, 2] long, (student row, teacher row), each row at most once on either side
    same_tokens: bool  # both sides hold the same tokens: N == M and row i is row i
    counts: Mapping[Per, float]

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            student=None if self.student is None else self.student.to(device),
            teacher=None if self.teacher is None else self.teacher.to(device),
            pairs=self.pairs.to(device),
        )

    def local_counts(self) -> dict[Per, float]:
        """This micro-batch's own share of the denominators.

        A sequence without rows (the stand-in of a rank that got none) does not count, nor does a span that has none on
        one side.
        """
        scored = self.student if self.student is not None else self.teacher
        assert scored is not None
        return {
            "rows": float(0 if self.student is None else len(self.student)),
            "teacher_rows": float(0 if self.teacher is None else len(self.teacher)),
            "pairs": float(len(self.pairs)),
            "spans": float(self._spans()),
            "sequences": float(scored.sample.unique().numel()),
        }

    def _spans(self) -> int:
        """How many aligned spans have rows on both sides."""
        if self.student is None or self.teacher is None:
            return 0
        ours, theirs = self.student.span.unique(), self.teacher.span.unique()
        return int(torch.isin(ours[ours >= 0], theirs).sum())
