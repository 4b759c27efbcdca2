"""The promises that token weights keep, tried beside a cross-entropy."""

from __future__ import annotations

from dataclasses import replace

import torch

from kdzoo.api import ops
from kdzoo.api.batch import Batch
from kdzoo.api.chunk import Logits
from kdzoo.api.loss import Loss, visit
from kdzoo.api.terms import Terms
from kdzoo.api.token_weights import WeighedTokens
from kdzoo.step.distiller import Distiller
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.weighing import Facts, Weighed, weigh_step
from kdzoo.testing.promises import checks
from kdzoo.testing.promises.checks import Check, Watched
from kdzoo.testing.promises.rearrange import rearranged
from kdzoo.testing.promises.world import FIVE_TOKENS, SLOT, World


class Carrier(Loss):
    """What is weighed: the cross-entropy, and both models' likelihoods of the gold tokens."""

    name = "carrier"
    paper = "none"
    formula = "L = 1/N sum_i - log q_i(y_i)"

    @visit
    def gold(self, student: Logits) -> Terms:
        return Terms().add("cross_entropy", ops.cross_entropy(student.logprobs(), student.labels))


def declarations(world: World) -> str:
    weights = _weights(world.term())
    if fault := weights.declared_fault():
        return f"the class {fault}"
    if unknown := world.subject.weight_needs.unknown_fact():
        return f"{unknown}; correct 'needs'"
    for name, _ in weights.named_parameters():
        return f"the parameter '{name}' would never be trained; make it a buffer, or a loss of its own"
    _ = world.whole
    return ""


def finite(world: World) -> str:
    for batch in (world.batch(), world.batch(FIVE_TOKENS)):
        (found,) = _weigh(world, [batch])
        values, tau = found.weights.values, found.weights.temperatures
        for what, value in {"weights": values, "temperatures": tau}.items():
            if value is None:
                continue
            if not (value.isfinite().all() and (value >= 0).all()):
                return f"some {what} are negative or not finite; keep divisions and logarithms away from 0"
            if value.requires_grad:
                return f"the {what} carry a gradient; detach what they are made of"
    return checks.finite(world)


def needs(world: World) -> str:
    """What is declared is read, and only that."""
    (facts,) = _facts(world, [world.batch()])
    batch = world.batch()
    assert batch.student is not None
    read = Watched(facts.get(SLOT, {})), Watched(batch.columns)
    term = world.term()
    seen = WeighedTokens(batch.student, *read)
    scores = _weights(term).score(seen)
    _weights(term).weigh(replace(seen, scores=scores, scores_of_step=scores))
    for kind, declared, found in (
        ("fact", term.weight_needs.facts, read[0].read),
        ("column", term.weight_needs.columns, read[1].read),
    ):
        for name in sorted(declared - found):
            return f"the {kind} '{name}' is declared and not read; take it out of 'needs'"
    return ""


def empty(world: World) -> str:
    found = _weigh(world, [world.batch(), replace(world.batch(()), counts=world.batch().counts)])
    assert found[1].batch.student is not None
    return checks.empty(world)


def split(world: World) -> str:
    """However the step is split, each token weighs the same, and so do all together."""
    batch = world.batch()
    (whole,) = _weigh(world, [batch])
    orders = ([0, 1], [2], [3])
    parts = _weigh(world, [rearranged(batch, order) for order in orders])
    values = torch.cat([part.weights.values for part in parts])
    if not torch.allclose(values, whole.weights.values):
        return "weights depend on how the step is split; compare tokens by 'scores_of_step', or within a sequence"
    for per, count in whole.counts.items():
        if not all(abs(part.counts[per] - count) < 1e-9 for part in parts):
            return f"the sum of weights over {per} depends on how the step is split"
    return ""


def state(world: World) -> str:
    """What moves is in buffers, and is saved."""
    term = world.term()
    weights = _weights(term)
    for step in range(3):
        before = {name: value.clone() for name, value in weights.named_buffers()}
        _weigh(world, [world.batch()], term)
        for name, value in weights.named_buffers():
            if not torch.equal(torch.nan_to_num(before[name]), torch.nan_to_num(value)):
                return f"the buffer '{name}' moves with every micro-batch; move it in 'after_step'"
        unsaved = checks.unsaved(weights)
        weights.after_step({"cross_entropy": 1.0 / (1 + step)}, (step + 1) / 3)
        for name, value in checks.unsaved(weights).items():
            if unsaved.get(name) != value:
                return f"'after_step' changes '{name}', which no checkpoint keeps; register it as a buffer"
    loaded = world.term()
    _weights(loaded).load_state_dict(weights.state_dict())
    one, other = (_weigh(world, [world.batch()], each)[0].factors for each in (term, loaded))
    return "" if torch.equal(one, other) else "saved and loaded, weights are others; keep what moves in buffers"


def _weights(term: LossTerm):  # type: ignore[no-untyped-def]
    assert term.weights is not None
    return term.weights


def _facts(world: World, batches: list[Batch], term: LossTerm | None = None) -> list[Facts]:
    term = term or world.term()
    distiller = Distiller(world.student, world.model_adapters[0], world.heads["student"], [term])
    return [
        distiller(batch=b, teacher=world.teacher_sites([term], b), teacher_head=world.heads["teacher"], aim=None)
        for b in batches
    ]


def _weigh(world: World, batches: list[Batch], term: LossTerm | None = None) -> list[Weighed]:
    term = term or world.term()
    return [found[SLOT] for found in weigh_step([term], batches, _facts(world, batches, term))]


CHECKS = (
    Check("declarations", "what it declares fits together, and a step runs", declarations, "same", blocks=True),
    Check("tokenizers", "two tokenizers work, or are refused", checks.tokenizers, "two", blocks=True),
    Check("finite", "weights are finite, not negative and without gradient", finite, blocks=True),
    Check("needs", "what 'needs' declares is read", needs),
    Check("empty", "a micro-batch without tokens is weighed too", empty),
    Check("padding", "padding and masked positions change nothing", checks.padding),
    Check("split", "a token weighs the same however the step is split", split),
    Check("order", "the order of sequences changes nothing", checks.order),
    Check("state", "saved and loaded it is the same, and what moves does so once per step", state),
)
