"""What one micro-batch holds, on the CPU first: token ids, the tokens that are scored, and every denominator.

Shape legend, used in every room: N student tokens, M teacher tokens, P aligned pairs, B sequences, S / D student /
teacher width, A the low width, V / W student / teacher vocabulary, E experts.

A *token* in these shapes is one that is scored: a token of the response, stood for by the position that predicts it.
Position t of sequence b predicts `input_ids[b, t + 1]`. Tokens are packed in order of sequence and position; prompts
and padding have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["tokens", "teacher_tokens", "pairs", "spans", "sequences"]
"""What a sum is divided by: how many of these the whole optimizer step has."""


@dataclass(frozen=True)
class Side:
    """One model's sequences of a micro-batch, right-padded, with its scored tokens packed."""

    input_ids: Tensor  # [B, T] long
    attention_mask: Tensor  # [B, T] long, 1 on real tokens
    positions: Tensor  # [N] long, b * T + t of every scored position, ascending
    labels: Tensor  # [N] long, the token that each position predicts
    inputs: Tensor  # [N] long, the token that stands at each position
    sample: Tensor  # [N] long, the sequence b of each token, ascending
    span: Tensor  # [N] long, which aligned span the label belongs to (counted over the batch), -1 for none

    @property
    def sequences(self) -> int:
        return self.input_ids.shape[0]

    def __len__(self) -> int:
        return self.positions.shape[0]

    def every_token(self) -> Side:
        """The same sequences with every real token scored, prompts included. Labels are unknown there (-100)."""
        positions = self.attention_mask.flatten().nonzero().squeeze(-1)
        ids, nothing = self.input_ids.flatten()[positions], torch.full_like(positions, -100)
        sample = positions // self.input_ids.shape[1]
        none = torch.full_like(positions, -1)
        return Side(self.input_ids, self.attention_mask, positions, nothing, ids, sample, none)

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
    pairs: Tensor  # [P, 2] long, (student token, teacher token), each at most once on either side
    same_tokens: bool  # both sides hold the same tokens: N == M and token i is token i
    counts: Mapping[Reduction, float]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] columns of the rows that token weights read, on the student's tokens."""

    @property
    def scored(self) -> Side:
        """The student's side, or the teacher's where only the teacher runs."""
        side = self.student if self.student is not None else self.teacher
        assert side is not None, "a batch has a side"
        return side

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            student=None if self.student is None else self.student.to(device),
            teacher=None if self.teacher is None else self.teacher.to(device),
            pairs=self.pairs.to(device),
            columns={name: column.to(device) for name, column in self.columns.items()},
        )

    def local_counts(self) -> dict[Reduction, float]:
        """This micro-batch's own share of the denominators.

        A sequence without tokens (the stand-in of a rank that got none) does not count, nor does a span that has none
        on one side.
        """
        return {
            "tokens": float(0 if self.student is None else len(self.student)),
            "teacher_tokens": float(0 if self.teacher is None else len(self.teacher)),
            "pairs": float(len(self.pairs)),
            "spans": float(self._spans()),
            "sequences": float(self.scored.sample.unique().numel()),
        }

    def _spans(self) -> int:
        """How many aligned spans have tokens on both sides."""
        if self.student is None or self.teacher is None:
            return 0
        ours, theirs = self.student.span.unique(), self.teacher.span.unique()
        return int(torch.isin(ours[ours >= 0], theirs).sum())
