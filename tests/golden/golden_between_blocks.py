"""Losses between blocks, of what `make_between_blocks.py` writes: TinyBERT's states and MiniLM v2's relations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from golden_files import CHUNK_BYTES, INDEPENDENT, Golden, Pair, configuration, held

from kdzoo import Heads
from kdzoo.testing import Recorded, replay
from kdzoo_attention_relations import AttentionRelations
from kdzoo_hidden import Hidden


def tinybert_states(golden: Golden) -> Iterator[Pair]:
    configuration(golden, known=set())
    states = {model: golden.tensor(f"{model}_state") for model in ("student", "teacher")}
    student, teacher = (
        Recorded(
            torch.zeros(state.shape[:2], dtype=torch.long),  # the authors compare every position
            hidden=torch.zeros_like(state),
            head=torch.zeros(3, state.shape[-1]).double(),
            sites={"hidden.0": state},
        )
        for state in states.values()
    )
    found = replay(
        {"hidden": (Hidden, {"pairs": [[0, 0]]}, 1.0)},
        student,
        teacher,
        weights={f"hidden.projectors.0.{name}": golden[name] for name in ("weight", "bias")},
        same_tokens=True,
        chunk_bytes=CHUNK_BYTES,
    )
    ours = {f"grad_{name}": found.gradients[f"hidden.projectors.0.{name}"] for name in ("weight", "bias")}
    yield from held(golden, {"loss": found.loss, "grad_student_state": found.gradients["student_hidden.0"], **ours})


def minilm_relations(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"A_r", "relations"})
    relations = given["relations"]

    def recorded(model: str) -> Recorded:
        vectors = {f"{relation}.0": golden.tensor(f"{model}_{relation}") for relation in relations}
        width = next(iter(vectors.values())).shape[-1]
        mask = golden.tensor("attention_mask")
        return Recorded(
            torch.where(mask > 0, 0, -100),
            logits=torch.zeros(*mask.shape, 3).double(),
            attention_mask=mask,
            sites=vectors,
            heads=Heads(1, 1, width),
        )

    params = {"preset": "minilmv2.bb@0d78e20", "heads": given["A_r"], "relations": relations, "pairs": [[0, 0]]}
    found = replay(
        {"kd": (AttentionRelations, params, 1.0)},
        recorded("student"),
        recorded("teacher"),
        same_tokens=True,
        chunk_bytes=CHUNK_BYTES,
    )
    ours = {f"grad_student_{relation}": found.gradients[f"student_{relation}.0"] for relation in relations}
    yield from held(golden, {"loss": found.loss, **ours})


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    f"{INDEPENDENT}: general_distill rep_loss": tinybert_states,
    f"{INDEPENDENT}: minilmv2 MiniLM.forward": minilm_relations,
}
