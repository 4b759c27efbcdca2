"""The rows of every split, made one by one from the split's name and the row's number."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kdzoo.data.lab.draw import Draw
from kdzoo.data.lab.tasks import ENDINGS, TASKS, Slots, World
from kdzoo.data.lab.words import SEEN, UNSEEN

_ALTERNATIVES = re.compile(r"\[([^\]]*)\]")

TRAINING = World(SEEN, items=(3, 5), facts=(2, 4))
LONGER = World(SEEN, items=(6, 7), facts=(5, 6))
UNFAMILIAR = World(UNSEEN.among(SEEN), items=(3, 5), facts=(2, 4), new_questions=True)

BUCKETS = 24


@dataclass(frozen=True)
class Split:
    """`buckets` are hash buckets of questions: no two splits share one, so no question is in two."""

    rows: int
    world: World
    buckets: range


SPLITS: dict[str, Split] = {
    "teacher": Split(40_000, TRAINING, range(0, 18)),
    "train": Split(2_400, TRAINING, range(18, 20)),
    "held_out": Split(400, TRAINING, range(20, 21)),
    "eval_seen": Split(400, TRAINING, range(21, 22)),
    "eval_longer": Split(400, LONGER, range(22, 23)),
    "eval_phrasing": Split(400, UNFAMILIAR, range(23, 24)),
}


def _worded(draw: Draw, text: str, slots: Slots) -> str:
    """`text` with its alternatives chosen and its slots filled; starts with a capital letter."""
    chosen = _ALTERNATIVES.sub(lambda found: draw.one(found[1].split("|")), text).format(**slots)
    return chosen[0].upper() + chosen[1:]


def _bucket(instruction: str, text: str) -> int:
    digest = hashlib.sha256(f"{instruction}\n{text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % BUCKETS


def _row(split: str, index: int) -> dict[str, str]:
    """The first instance drawn for this place whose question falls into the split's own buckets."""
    wanted, world = SPLITS[split].buckets, SPLITS[split].world
    draw = Draw("kdzoo lab", split, index)
    while True:
        task = draw.one(TASKS)
        slots = task.draw(draw, world)
        question = draw.one(task.new_questions if world.new_questions else task.questions)
        instruction = _worded(draw, question, slots)
        shown = "" if "{shown}" in question else slots["shown"]
        if _bucket(instruction, shown) in wanted:
            answer = _worded(draw, draw.one(task.answers), slots)
            answer += "" if answer.endswith("?") else draw.one(ENDINGS)
            return {"id": f"{split}-{index}", "instruction": instruction, "input": shown, "output": answer}


def rows_of(split: str, count: int) -> Iterator[dict[str, str]]:
    for index in range(count):
        yield _row(split, index)
