"""Relations between positions inside attention: MiniLM versions 1 and 2, and TinyBERT's attention maps.

A relation is the scaled products of two positions' vectors: query with query, key with key, value with value (MiniLM
v2), or query with key as attention itself compares them. A row holds those of one position with all that it may attend
to, and student and teacher are compared row by row, head by head.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from kdzoo import Heads, Loss, Needs, RecipeError, Register, Step, Terms, View, hookimpl, ops

SITES = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "attention": ("attention_query", "attention_key"),
}
"""By relation: what of a block it is made of."""


class AttentionRelations(Loss):
    """The student's positions relate to each other as the teacher's do, whatever the widths of both."""

    name = "attention_relations"
    paper = (
        "Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained "
        "Transformers, Findings of ACL 2021, arxiv.org/abs/2012.15828"
    )
    formula = "L = sum_r w_r 1/N sum_i 1/R sum_h KL(softmax(x_i x^T / sqrt(d))_h of the teacher || of the student)"
    deviations = (
        "MiniLM's authors published no training code; bloomberg/minilmv2.bb @ 0d78e20 stands in for it, whose rows are "
        "all positions and see all of a sequence (`rows`, `causal`).",
        "`general_distill.py` of TinyBERT (huawei-noah/Pretrained-Language-Model @ 1bb9b3e) sets masked scores to 0 "
        "and divides by all entries of the padded batch; here a row is divided by the positions that it sees.",
        "Where a group of query heads shares keys and values, of which no paper speaks, they are there once for every "
        "query head, as attention uses them.",
    )

    class Params(ops.BlockParams):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"minilmv2.bb@0d78e20": {"rows": "all", "causal": False}}
        preset: Literal["minilmv2.bb@0d78e20"] | None = None
        """Whose code: what is not given beside it is as there."""
        relations: dict[Literal["query", "key", "value", "attention"], PositiveFloat] = Field(
            {"query": 1.0, "key": 1.0, "value": 1.0}, min_length=1
        )
        """The weight of each. "query", "key" and "value": of what the projections make, before the rotation and norm
        that some families have. "attention": the scores of attention, after both. MiniLM v1 has "attention" and
        "value", TinyBERT "attention"."""
        distance: ops.RelationDistance = "kl"
        """"kl": KL of a row's softmaxes (MiniLM). "mse": the mean square between scores before the softmax (TinyBERT).
        "mse_of_softmax": the same after it."""
        heads: int | None = Field(None, ge=1)
        """R: into how many relation heads the vectors of all attention heads are split anew; it divides the widths of
        both models. MiniLM v2 has 48 or 64. Default: the student's attention heads. Not of "attention"."""
        rows: Literal["response", "all"] = "response"
        """Which positions have a row. "all": every real one, prompts included; the loss is then the mean over sequences
        of the means over their rows."""
        causal: bool = True
        """Whether a row ends at its own position; a row of "attention" always does."""

    @classmethod
    def needs(cls, params, same_tokens):
        return cls.reading(params, [("<block>", "<block>")])

    @classmethod
    def needs_of(cls, params, pair):
        mine, its = pair.student.heads, pair.teacher.heads
        for model in (pair.student, pair.teacher):
            if model.heads is None:
                raise RecipeError(f"relations: the model adapter of '{model.model_type}' names no attention; add it")
        if "attention" in params.relations and mine.query != its.query:
            raise RecipeError(
                f"relations: 'attention' compares head by head, and the student has {mine.query} heads and the teacher "
                f"{its.query}; take 'query', 'key' and 'value'"
            )
        heads = params.heads or mine.query
        if params.relations.keys() != {"attention"} and (mine.width % heads or its.width % heads):
            raise RecipeError(f"heads: {heads} does not divide the widths {mine.width} and {its.width}; take another")
        return cls.reading(params, params.blocks(pair))

    @classmethod
    def reading(cls, params, blocks):
        parts = [part for relation in params.relations for part in SITES[relation]]
        mine, its = ({f"{part}.{block}@all" for part in parts for block in side} for side in zip(*blocks, strict=True))
        return Needs(frozenset(mine), frozenset(its), tokenizers="same", divergence=True)

    def build(self, student, teacher, artifacts):
        self.blocks = self.params.blocks(self.pair)
        self.heads = self.params.heads or student.heads.query

    def relation(self, view: View, relation: str, block: ops.Block, heads: Heads) -> ops.Relation:
        parts = [view[f"{part}.{block}@all"] for part in SITES[relation]]
        return ops.attention_of(*parts, heads) if len(parts) == 2 else ops.relation_of(*parts, heads, self.heads)

    def finish(self, step: Step) -> Terms:
        scored, params, terms = step.student.side, self.params, Terms()
        rows = scored if params.rows == "response" else scored.every_token()
        for (mine, its), (relation, weight) in itertools.product(self.blocks, params.relations.items()):
            ours = self.relation(step.student, relation, mine, self.pair.student.heads)
            theirs = self.relation(step.teacher, relation, its, self.pair.teacher.heads)
            causal = params.causal or relation == "attention"
            value = weight * ops.relation_distance(ours, theirs, rows, params.distance, causal=causal)
            if params.rows == "response":
                terms.add(f"{relation}_{mine}_to_{its}", value)
            else:
                value = ops.means_of_sequences(value, rows, scored)
                terms.add(f"{relation}_{mine}_to_{its}", value, per="sequences")
        return terms


@hookimpl
def register_plugins(register: Register) -> None:
    register(AttentionRelations)
