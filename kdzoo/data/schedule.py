"""Which rows each rank reads in which forward pass of which optimizer step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from kdzoo.errors import RecipeError
from kdzoo.recipe.model import Stage


@dataclass(frozen=True)
class StepPlan:
    """A stage, as one rank sees it.

    The rows of an optimizer step do not depend on how it is split: forward pass `a` of rank `r` takes the
    slice of `micro_batch` rows that begins at `(a * ranks + r) * micro_batch`, which may be short or empty.
    """

    steps: int  # optimizer steps of the whole stage
    accumulation: int  # forward passes per optimizer step and rank
    micro_batch: int  # sequences per forward pass
    steps_per_epoch: int
    examples: int
    batch: int
    rank: int
    ranks: int
    seed: int

    def from_step(self, start: int = 0) -> Iterator[list[list[int]]]:
        """For every optimizer step from `start` on, `accumulation` lists of row indices."""
        for step in range(start, self.steps):
            rows = self.step_rows(step)
            parts = range(self.rank, self.accumulation * self.ranks, self.ranks)
            yield [rows[part * self.micro_batch : (part + 1) * self.micro_batch] for part in parts]

    def step_rows(self, step: int) -> list[int]:
        """The rows of one optimizer step over all ranks, in order; an epoch's last step may have fewer."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return _order(self.examples, self.seed, epoch)[within * self.batch : (within + 1) * self.batch]


def plan(examples: int, stage: Stage, rank: int, ranks: int, seed: int, address: str) -> StepPlan:
    """The plan of `stage` over `examples` rows for one rank of `ranks`.

    `seed` is the recipe's, used where the stage has none; `address` is the stage's (`stages.distill`). Raises
    `RecipeError` where the length is not said once, or the batch cannot be split so.
    """
    if (stage.steps is None) == (stage.epochs is None):
        both = stage.steps is not None
        what = "both 'steps' and 'epochs' are given" if both else "neither 'steps' nor 'epochs' is given"
        raise RecipeError(f"{address}: {what}; give exactly one (null removes an inherited one)")
    micro_batch = micro_batch_of(stage, ranks, address)
    steps_per_epoch = math.ceil(examples / stage.batch)
    steps = stage.steps if stage.steps is not None else math.ceil((stage.epochs or 0) * steps_per_epoch)
    return StepPlan(
        steps=steps,
        accumulation=stage.batch // (micro_batch * ranks),
        micro_batch=micro_batch,
        steps_per_epoch=steps_per_epoch,
        examples=examples,
        batch=stage.batch,
        rank=rank,
        ranks=ranks,
        seed=seed if stage.seed is None else stage.seed,
    )


def micro_batch_of(stage: Stage, ranks: int, address: str) -> int:
    """Sequences per forward pass. The recipe fixes the batch: a split that does not come out even is refused."""
    if stage.batch % ranks:
        raise RecipeError(
            f"{address}.batch: {stage.batch} sequences cannot be divided among {ranks} ranks; "
            f"run on {_listed(_divisors(stage.batch))} ranks, or change the batch"
        )
    share = stage.batch // ranks
    if stage.micro_batch is None:
        return share
    if share % stage.micro_batch:
        raise RecipeError(
            f"{address}.micro_batch: {stage.micro_batch} on {ranks} {'rank' if ranks == 1 else 'ranks'} does "
            f"not divide a batch of {stage.batch}; use {_listed(_divisors(share))}"
        )
    return stage.micro_batch


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> list[int]:
    """The permutation of one epoch, the same on every rank and machine."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.randperm(examples, generator=generator).tolist()


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
