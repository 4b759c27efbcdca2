"""The same sequences in another batch: in another order, with more padding, or said several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdzoo.api.batch import Batch, Side


def rearranged(batch: Batch, order: Sequence[int], padding: int = 0) -> Batch:
    """These sequences of a batch, in this order, with so many positions of padding more; counts are the whole's."""
    index = torch.tensor(order, dtype=torch.long)
    student = None if batch.student is None else _side(batch.student, index, padding)
    teacher = None if batch.teacher is None else _side(batch.teacher, index, padding)
    pairs = batch.pairs[:0]
    if student is not None and teacher is not None:
        moved = torch.stack([student[1][batch.pairs[:, 0]], teacher[1][batch.pairs[:, 1]]], dim=1)
        moved = moved[(moved >= 0).all(1)]
        pairs = moved[moved[:, 0].argsort()]
    spans = torch.cat([side[0].span for side in (student, teacher) if side is not None])
    number = {span: n for n, span in enumerate(_in_order(spans, student, teacher))}

    def numbered(side: Side) -> Side:
        return replace(side, span=torch.tensor([number.get(s, -1) for s in side.span.tolist()], dtype=torch.long))

    columns = {}
    if student is not None:
        kept = torch.empty(len(student[0]), dtype=torch.long)
        kept[student[1][student[1] >= 0]] = (student[1] >= 0).nonzero().squeeze(-1)
        columns = {name: column[kept] for name, column in batch.columns.items()}
    return replace(
        batch,
        student=None if student is None else numbered(student[0]),
        teacher=None if teacher is None else numbered(teacher[0]),
        pairs=pairs,
        columns=columns,
    )


def _side(side: Side, order: Tensor, padding: int) -> tuple[Side, Tensor]:
    """The side's sequences `order`, and where each of its tokens went (-1: nowhere)."""
    width = side.input_ids.shape[1]
    generator = torch.Generator().manual_seed(99)
    more = torch.randint(1, int(side.input_ids.max()) + 1, (len(order), padding), generator=generator)
    ids = torch.cat([side.input_ids[order], more], dim=1)
    mask = torch.cat([side.attention_mask[order], torch.zeros_like(more)], dim=1)
    kept = torch.cat([(side.sample == b).nonzero().squeeze(-1) for b in order])
    sample = torch.repeat_interleave(torch.arange(len(order)), torch.bincount(side.sample, minlength=len(mask))[order])
    if not len(order):
        kept = sample = torch.zeros(0, dtype=torch.long)
    went = torch.full_like(side.positions, -1)
    went[kept] = torch.arange(len(kept))
    positions = side.positions[kept] % width + sample * ids.shape[1]
    return Side(ids, mask, positions, side.labels[kept], side.inputs[kept], sample, side.span[kept]), went


def _in_order(spans: Tensor, *sides: tuple[Side, Tensor] | None) -> list[int]:
    """The spans by the sequence that they stand in, and within it as they were."""
    of: dict[int, int] = {}
    for side in sides:
        if side is not None:
            of |= dict(zip(side[0].span.tolist(), side[0].sample.tolist(), strict=True))
    return sorted({s for s in spans.tolist() if s >= 0}, key=lambda span: (of[span], span))


@dataclass(frozen=True)
class Repeated:
    """A side whose sequences, or whose responses, are said several times over."""

    side: Side
    tokens: Tensor
    """[n] which of the first side's tokens each of its tokens is."""
    positions: Tensor
    """[B * T] which of the first side's positions each of its positions is."""
    first: Tensor
    """[N, times] where each of the first side's tokens is now."""

    def site(self, name: str, value: Tensor) -> Tensor:
        """A site of the first side [N, ...], [B * T, ...] or [1, ...] as one of this."""
        if name == "embed.zero":
            return value
        return value[self.positions if name.endswith("@all") else self.tokens]


def repeated(batch: Batch, times: int, longer: bool) -> tuple[Batch, dict[str, Repeated]]:
    """Every sequence `times` times; or, if `longer`, every response `times` times as long, by repeating its tokens.

    Counts are those of the new batch. By model, also where everything comes from.
    """
    make = _longer if longer else _more
    sides = {"student": batch.student, "teacher": batch.teacher}
    most = 1 + max(int(side.span.max()) for side in sides.values() if side is not None and len(side))
    found = {model: make(side, times, most) for model, side in sides.items() if side is not None}
    pairs = batch.pairs[:0]
    if len(found) == 2:
        columns = [found[model].first[batch.pairs[:, n]] for n, model in enumerate(("student", "teacher"))]
        pairs = torch.stack(columns, dim=-1).flatten(0, 1)
        pairs = pairs[pairs[:, 0].argsort()]
    spans = torch.cat([each.side.span for each in found.values()]).unique()
    found = {model: replace(each, side=_renumbered(each.side, spans)) for model, each in found.items()}
    student, teacher = (found[model].side if model in found else None for model in ("student", "teacher"))
    made = replace(batch, student=student, teacher=teacher, pairs=pairs)
    return replace(made, counts=made.local_counts()), found


def _renumbered(side: Side, spans: Tensor) -> Side:
    """`spans`: those there are, ascending; -1 is none."""
    known = spans[spans >= 0]
    return replace(side, span=torch.where(side.span < 0, -1, torch.searchsorted(known, side.span)))


def _more(side: Side, times: int, spans: int) -> Repeated:
    """Sequences b, b + B, b + 2B, ... are the same."""
    b, t = side.input_ids.shape
    n = len(side)
    tokens, positions = torch.arange(n).repeat(times), torch.arange(b * t).repeat(times)
    copy = torch.arange(times).repeat_interleave(n)
    again = Side(
        side.input_ids.repeat(times, 1),
        side.attention_mask.repeat(times, 1),
        side.positions[tokens] + copy * b * t,
        side.labels[tokens],
        side.inputs[tokens],
        side.sample[tokens] + copy * b,
        torch.where(side.span[tokens] < 0, -1, side.span[tokens] + copy * spans),
    )
    return Repeated(again, tokens, positions, torch.arange(n * times).view(times, n).T)


def _longer(side: Side, times: int, spans: int) -> Repeated:
    """Copies of a response follow each other; what stands behind it follows the last."""
    b, t = side.input_ids.shape
    lengths = side.sample.bincount(minlength=b)
    width = t + (times - 1) * int(lengths.max())
    rows, tokens, places = [], [], []
    for sequence in range(b):
        mine = (side.sample == sequence).nonzero().squeeze(-1)
        at = side.positions[mine] - sequence * t
        start, stop = (int(at[0]), int(at[-1]) + 1) if len(at) else (t, t)
        row = [*range(start), *[*range(start, stop)] * times, *range(stop, t)]
        behind = [t - 1] * (width - len(row))
        copies = torch.arange(times)[:, None] * (stop - start)
        places.append((at + copies).flatten() + sequence * width)
        tokens.append(mine.repeat(times))
        rows.append(torch.tensor([*row, *behind]) + sequence * t)
    token, positions = torch.cat(tokens), torch.cat(rows)
    real = torch.cat([torch.arange(width) < t + (times - 1) * n for n in lengths.tolist()])
    mask = side.attention_mask.flatten()[positions] * real
    order = token.argsort(stable=True)  # the copies of a token, first to last, side by side
    copy = torch.empty_like(token)
    copy[order] = torch.arange(times).repeat(len(side))
    # Every copy of a sequence's spans stands behind those of the one before.
    span = (side.sample[token] * times + copy) * spans + side.span[token]
    again = Side(
        side.input_ids.flatten()[positions].view(b, width),
        mask.view(b, width),
        torch.cat(places),
        side.labels[token],
        side.inputs[token],
        side.sample[token],
        torch.where(side.span[token] < 0, -1, span),
    )
    return Repeated(again, token, positions, order.view(-1, times))
