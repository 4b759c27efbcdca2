"""Random float64 states of two models, for plugins to be replayed on and formulas to be computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdzoo import Logits, Loss, ModelInfo, ModelPair
from kdzoo.api.entries import EntryMap
from kdzoo.testing import Recorded, Replay, replay

S, D = 5, 6  # widths of student and teacher
V, W = 9, 11  # their vocabularies with two tokenizers; with one, both have V


@dataclass
class Recording:
    """Padded tensors [B, T, ...] of one model; prompt and padding have the label -100."""

    labels: Tensor
    ids: Tensor
    hidden: Tensor
    head: Tensor
    embed: Tensor
    chunks: Tensor | None = None

    def recorded(self) -> Recorded:
        return Recorded(
            self.labels,
            hidden=self.hidden.detach(),
            head=self.head.detach(),
            embed=self.embed,
            input_ids=self.ids,
            chunks=self.chunks,
        )

    def rows(self, b: int) -> Tensor:
        """[T] bool: the scored positions of a sequence."""
        return self.labels[b] != -100

    def logits(self, b: int) -> Tensor:
        """[rows, vocabulary]"""
        return self.hidden[b, self.rows(b)] @ self.head.T

    def gold(self, b: int) -> Tensor:
        """[rows]"""
        return self.labels[b, self.rows(b)]

    def wrong(self, b: int) -> Tensor:
        """[rows] whether the label is not the most likely token."""
        return self.logits(b).argmax(-1) != self.gold(b)

    def __len__(self) -> int:
        return len(self.labels)


def make_recording(rows: list[int], width: int, vocabulary: int, *, prompt: int = 2, trains: bool = False) -> Recording:
    """`prompt` positions, then so many scored rows per sequence, then padding."""
    length = prompt + max(rows) + 1
    labels = torch.full((len(rows), length), -100)
    for b, n in enumerate(rows):
        labels[b, prompt : prompt + n] = torch.randint(vocabulary, (n,))
    return Recording(
        labels,
        torch.randint(vocabulary, labels.shape),
        torch.randn(*labels.shape, width).double().requires_grad_(trains),
        torch.randn(vocabulary, width).double().requires_grad_(trains),
        torch.randn(vocabulary, width).double(),
    )


def make_models(
    same_tokens: bool, rows: tuple[list[int], list[int]] = ([4, 1, 5], [3, 1, 6]), seed: int = 0
) -> tuple[Recording, Recording]:
    """Student and teacher; with two tokenizers, spans of one or two rows on either side, some rows in none."""
    torch.manual_seed(seed)
    student = make_recording(rows[0], S, V, trains=True)
    if same_tokens:
        teacher = make_recording(rows[0], D, V)
        teacher.labels, teacher.ids = student.labels, student.ids
        return student, teacher
    teacher = make_recording(rows[1], D, W)
    spans = 3
    for side in (student, teacher):
        side.chunks = torch.zeros(*side.labels.shape, spans, dtype=torch.bool)
        for b in range(len(side)):
            for span, place in enumerate(side.rows(b).nonzero()[:, 0][: 2 * spans].tensor_split(spans)):
                side.chunks[b, place, span] = True
    return student, teacher


def make_right(teacher: Recording, which: Callable[[int, int], bool], student: Recording | None = None) -> None:
    """Change the labels so that the teacher is right on exactly the rows (sequence, number) that `which` says.

    `student` is given where both have one tokenizer, and so the same labels.
    """
    for b in range(len(teacher)):
        top = teacher.logits(b).argmax(-1)
        right = torch.tensor([which(b, i) for i in range(len(top))])
        labels = torch.where(right, top, (top + 1) % len(teacher.head))
        teacher.labels[b, teacher.rows(b)] = labels
    if student is not None:
        student.labels = teacher.labels


def assert_same(found: Replay, loss: Tensor, leaves: Mapping[str, Tensor], at: float = 1e-10) -> None:
    """The replay's loss and every gradient are those of a formula; a gradient that it lacks is zero."""
    torch.testing.assert_close(found.loss, loss.detach(), rtol=at, atol=at)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert found.gradients.keys() <= leaves.keys()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        ours = found.gradients.get(name, torch.zeros_like(leaf))
        theirs = torch.zeros_like(leaf) if gradient is None else gradient
        torch.testing.assert_close(ours, theirs, rtol=at, atol=at, msg=lambda m, name=name: f"{name}: {m}")


def make_pair(
    v: int, w: int, student_ids: Tensor | None = None, same_tokens: bool = True, entries: EntryMap | None = None
) -> ModelPair:
    """For a loss that is called by itself: a student with v entries and a teacher with w. `entries`: what the map
    `student_ids` is called."""
    student, teacher = ModelInfo(S, v, 1, "recorded"), ModelInfo(D, w, 1, "recorded")
    known = {} if entries is None or student_ids is None else {entries: student_ids}
    return ModelPair(student, teacher, same_tokens, student_ids, known)


def seen(**logits: Tensor) -> dict[str, Logits]:
    """What a visit sees of streams with these logits [n, V], whatever their labels."""
    return {name: Logits(name, x, torch.zeros(len(x), dtype=torch.long)) for name, x in logits.items()}


def make_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(*shape).double().requires_grad_() for name, shape in shapes.items()}


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[rows]"""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def of_logits(loss: type[Loss], teacher: Tensor, student: Tensor, **params: Any) -> Replay:
    """A loss of logits [n, V] of one sequence, every row scored, in chunks of a row or two."""
    labels = torch.zeros(1, len(teacher), dtype=torch.long)
    sides = (Recorded(labels, logits=x[None]) for x in (student, teacher))
    return replay({"kd": (loss, params, 1.0)}, *sides, same_tokens=True, chunk_bytes=100)


def visited(loss: type[Loss], teacher: Tensor, student: Tensor, **params: Any) -> tuple[Tensor, Tensor]:
    """The values [n] of a loss of one term, and the gradient of their sum by the student's logits [n, V]."""
    student = student.detach().requires_grad_()
    made = loss(loss.Params.model_validate(params), make_pair(teacher.shape[-1], teacher.shape[-1]), {})
    (term,) = made.tokens(**seen(teacher=teacher, student=student)).values.values()
    value = term.value
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]
