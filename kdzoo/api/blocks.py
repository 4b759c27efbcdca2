"""Which blocks of student and teacher belong together. Part of `kdzoo.ops`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kdzoo.api.models import ModelInfo, ModelPair, Role
from kdzoo.api.plugin import Params
from kdzoo.errors import RecipeError

Block = int | Literal["last"]


class BlockParams(Params):
    """Parameters of a method between blocks, for its own to inherit."""

    pairs: Literal["uniform"] | Annotated[list[tuple[Block, Block]], Field(min_length=1)] = Field([("last", "last")])
    """[[student, teacher], ...]: blocks counted from 0, or from the end (-1 is the last). "last" is the last block, and
    of hidden states what the head reads, after the final norm. "uniform": block i of the student with block
    (i + 1) * (teacher's blocks) / (student's blocks) - 1 of the teacher, rounded down (TinyBERT's)."""
    every: int = Field(1, ge=1)
    """Of "uniform": every so many-th block of the student; 2 of six blocks are the second, the fourth and the last."""

    def blocks(self, pair: ModelPair) -> list[tuple[Block, Block]]:
        """The pairs, counted from 0. A `RecipeError` where a model does not have a block, or a pair is there twice."""
        student, teacher = pair.student, pair.teacher
        if self.pairs == "uniform":
            last = range(student.layers - 1, -1, -self.every)
            return [(i, max(0, (i + 1) * teacher.layers // student.layers - 1)) for i in reversed(last)]
        found = [(_counted(mine, student, "student"), _counted(its, teacher, "teacher")) for mine, its in self.pairs]
        for one in found:
            if found.count(one) > 1:
                raise RecipeError(f"pairs: {list(one)} is there twice; take one out")
        return found


def _counted(block: Block, model: ModelInfo, role: Role) -> Block:
    """From 0."""
    if block == "last":
        return block
    if not -model.layers <= block < model.layers:
        raise RecipeError(
            f"pairs: the {role} has {model.layers} blocks, counted from 0 or from the end, not {block}; "
            f"name one from 0 to {model.layers - 1}"
        )
    return block % model.layers
