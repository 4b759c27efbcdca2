"""Maps between two vocabularies: which entry of the one stands for an entry of the other. Part of `kdzoo.ops`.

A map is a tensor [n] long: for each entry of one vocabulary its partner in the other, -1 where it has none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdzoo.errors import KdzooError

EntryMap = Literal["same_text", "nearest_in_student", "nearest_in_teacher"]
"""The maps that there are, by name. "same_text" [W]: the student's entry that says what each of the teacher's says; the
two ends of a sequence say the same. "nearest_in_student" [W]: the same, and for what the student cannot say the entry
that differs in the fewest characters. "nearest_in_teacher" [V]: that of the teacher, for each of the student's."""


def entries_by_student(student_ids: Tensor, left_out: int | None = None) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's entries that say the same [O], in the student's order, without `left_out`.

    `student_ids` [W]: the student's token with the text of each teacher token, -1 where it has none.
    """
    kept = student_ids >= 0
    if left_out is not None:
        kept &= student_ids != left_out
    theirs = kept.nonzero().squeeze(-1)
    mine, order = student_ids[theirs].sort()
    return mine, theirs[order]


def shared_entries(student_ids: Tensor, v: int, w: int) -> dict[str, Tensor]:
    """The entries that two vocabularies of v and w tokens share, in the order of the teacher's [K], and the others.

    `student_ids` [W]: the student's token with the text of each teacher token, -1 where it has none. A `KdzooError`
    where they share none.
    """
    theirs, mine = linked_entries(student_ids)
    if not len(mine):
        raise KdzooError("the vocabularies of student and teacher share no entry; take a loss that compares none")
    rest = {
        f"{model}_rest": torch.ones(size, dtype=torch.bool).index_fill(0, entries, False).nonzero().squeeze(-1)
        for model, size, entries in (("student", v, mine), ("teacher", w, theirs))
    }
    return {"student_shared": mine, "teacher_shared": theirs, **rest}


def linked_entries(partners: Tensor) -> tuple[Tensor, Tensor]:
    """The entries that have a partner, ascending, and those partners [K] each."""
    linked = (partners >= 0).nonzero().squeeze(-1)
    return linked, partners[linked]


def first_sources(partners: Tensor, size: int) -> Tensor:
    """[size] the first entry whose partner each entry of the other vocabulary is, -1 where it is nobody's.

    `partners` [n]: a map into a vocabulary of `size` entries.
    """
    sources = partners.new_full((size + 1,), len(partners))
    place = torch.where(partners >= 0, partners, size)
    sources = sources.scatter_reduce(0, place, torch.arange(len(partners), device=partners.device), "amin")[:size]
    return torch.where(sources < len(partners), sources, -1)
