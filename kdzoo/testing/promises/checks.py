"""The promises that every loss keeps, one function each: it returns what is wrong and what to do, or nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kdzoo.plugin.contracts import Loss, Needs
from kdzoo.step.batch import Batch, Side
from kdzoo.step.distiller import set_up, survey
from kdzoo.step.vocabulary import Slot
from kdzoo.testing.promises.watch import Constants, Heard, Reads, intercepted, with_heard_lexicons
from kdzoo.testing.promises.world import FIVE_ROWS, LENGTHS, SLOT, Outcome, World, clone, rearranged


@dataclass(frozen=True)
class Check:
    name: str
    promise: str
    fault: Callable[[World], str]
    worlds: Literal["each", "same", "two"] = "each"
    """Tried with one tokenizer and with two, where the loss fits both; or with one of these alone."""
    unless_coupled: bool = False
    """Not for what declares that it couples a batch."""
    blocks: bool = False
    """An exception that it meets is its own finding: the others would only repeat it."""


def finite(world: World) -> str:
    for lengths, what in ((FIVE_ROWS, "5 rows"), ((), "0 rows")):
        found = world.run([world.slot()], world.batch(lengths))
        numbers = {"loss": found.loss, **{f"gradient of '{n}'": g for n, g in found.gradients.items() if g is not None}}
        for name, number in numbers.items():
            if not number.isfinite().all():
                return f"the {name} on {what} is not finite; divide by counts ('per'), never by what may be 0"
    return ""


def needs(world: World) -> str:
    """What is declared is read, and only that."""
    reads = Reads()
    world.models = with_heard_lexicons(world.models, reads.lexicon)
    world.artefacts = Heard(world.artefacts, reads.artefacts.add)
    slot = intercepted(world.slot(), reads.around)
    recording = world.recorded(slot, world.batch())
    set_up([slot], world.heads)
    if slot.needs.survey:
        survey([slot], world.batch(), world.teacher_sites([slot], world.batch()))
    recording.run(slot)
    with torch.no_grad():  # as a trained stage is measured: with the visits that only watch
        recording.score(slot)
    for line in _unread(world.subject.loss, slot, reads):
        return line
    return _alignment(world) if not world.same_tokens else ""


def _unread(loss: type[Loss], slot: Slot, reads: Reads) -> Iterator[str]:
    declared = slot.needs
    for model in ("student", "teacher"):
        for site in sorted(_sites(declared, model) - reads.sites[model]):
            yield f"the {model}'s site '{site}' is declared and not read; take it out of 'needs'"
    for visit in declared.visits:
        for stream in visit.streams:
            if (visit.name, stream) not in reads.logits:
                yield f"the visit '{visit.name}' never reads the logits of '{stream}'; take it out of the visit"
        for fact in visit.facts:
            if (visit.name, fact) not in reads.visit_facts:
                yield f"the visit '{visit.name}' declares the fact '{fact}' and does not read it; take it out"
    for own in declared.streams:
        if not any(own.name in visit.streams for visit in declared.visits):
            yield f"the stream '{own.name}' is in no visit; give it one, or take it out"
    for fact in sorted(set(declared.facts) - reads.facts):
        yield f"the fact '{fact}' is declared and not read; take it out"
    for stage in sorted(declared.artefacts.keys() - reads.artefacts):
        yield f"the stage '{stage}' is declared and its tensors are not read; take it out of 'artefacts'"
    if declared.lexicons and not reads.lexicon:
        yield "'lexicons' is declared and none is read; take it out"
    if declared.survey != (loss.survey is not Loss.survey):
        yield "'survey' in 'needs' and the method 'survey' go together; declare it, or take it out"


def _sites(declared: Needs, model: str) -> frozenset[str]:
    return declared.student if model == "student" else declared.teacher


def _alignment(world: World) -> str:
    """Whether pairs and spans are read is whether it matters that there are any."""
    batch = world.batch()
    assert batch.teacher is not None
    none = replace(batch, pairs=batch.pairs[:0], teacher=_without_spans(batch.teacher))
    if batch.student is not None:
        none = replace(none, student=_without_spans(batch.student))
    reads = bool(world.run([world.slot()], batch).difference(world.run([world.slot()], none)))
    if reads and not world.needs.aligned:
        return "pairs or spans of the aligner change the loss; say 'aligned=True' in 'needs'"
    if world.needs.aligned and not reads:
        return "'aligned' is declared, and neither pairs nor spans change anything; take it out"
    return ""


def _without_spans(side: Side) -> Side:
    return replace(side, span=torch.full_like(side.span, -1))


def gradients(world: World) -> str:
    slot = world.slot()
    trained = [f"losses.{SLOT}.{name}" for name, p in slot.loss.named_parameters() if p.requires_grad]
    some, none = world.run([slot], world.batch()).gradients, world.run([slot], world.batch(())).gradients
    for name in trained:
        shown = name.removeprefix(f"losses.{SLOT}.")
        gradient = some[name]
        if gradient is None or not gradient.any():
            return (
                f"the parameter '{shown}' gets no gradient; use it in 'streams' or 'combine' (never in 'over_vocab'), "
                "or freeze it"
            )
        if none[name] is None:
            return (
                f"the parameter '{shown}' gets no gradient on a rank without rows, which would stall all others; run "
                "every module also on 0 rows, never branch around one"
            )
    return ""


def padding(world: World) -> str:
    batch = world.batch()
    found = _apart(world, rearranged(batch, range(len(LENGTHS)), padding=3))
    return found and f"padding changes something: {found}; read packed rows, or mask ('view.padded' has one)"


def chunks(world: World) -> str:
    batch = world.batch()
    whole = world.run([world.slot()], batch)
    for rows in (1, 2):
        size = 4 * rows * sum(world.vocabulary)
        if found := whole.difference(world.run([world.slot()], batch, chunk_bytes=size)):
            return f"chunks of {rows} rows change something: {found}; return sums over rows, and name 'per'"
    return ""


def split(world: World) -> str:
    batch = world.batch()
    parts = [world.run([world.slot()], rearranged(batch, order)) for order in ([0, 1], [2], [3])]
    found = world.run([world.slot()], batch).difference(parts[0].plus(parts[1]).plus(parts[2]))
    return found and (
        f"three micro-batches do not add up to one: {found}; return sums with 'per', or say 'batch_coupled=True'"
    )


def order(world: World) -> str:
    found = _apart(world, rearranged(world.batch(), [2, 0, 3, 1]))
    return found and f"the order of sequences changes something: {found}; let no sequence see its neighbours"


def _apart(world: World, other: Batch) -> str:
    return world.run([world.slot()], world.batch()).difference(world.run([world.slot()], other))


def coupling(world: World) -> str:
    """What says that it couples a batch does."""
    if not world.needs.batch_coupled or any(check(world) for check in (padding, split, order)):
        return ""
    return "'batch_coupled' is declared, and neither padding, nor a split, nor an order changes anything; take it out"


def divergence(world: World) -> str:
    """Zero where both models say the same, and never negative, if `needs` says so."""
    if not world.needs.divergence:
        return ""
    twins = World(world.subject, same_tokens=True, twins=True)
    slot = twins.slot()
    found = twins.recorded(slot, twins.batch()).run(slot)
    if found.loss.abs() > 1e-9:
        return f"the loss is {found.loss:.3g} where both models say the same; 'divergence' promises 0"
    for name, gradient in found.gradients.items():
        if gradient is not None and gradient.abs().max() > 1e-7:
            return f"where both models say the same, the gradient of '{name}' is not 0, as 'divergence' promises"
    for seed in range(5):
        other = World(world.subject, same_tokens=True, seed=seed)
        for name, value in other.run([other.slot()], other.batch(seed=seed)).terms.items():
            if value < 0:
                return f"the term '{name}' is {value:.3g}; 'divergence' promises that it is never negative"
    return ""


STEP = 1e-6


def finite_differences(world: World) -> str:
    """The gradient along random directions; what the loss makes constant stays so.

    Not of the head: its gradient follows from that of the states, but for streams that it does not learn from.
    """
    slot = world.slot()
    recording = world.recorded(slot, world.batch())
    constants = Constants()
    recording.score(intercepted(slot, constants.around))
    analytic = recording.run(clone(slot))

    def along(name: str, direction: Tensor, step: float) -> Tensor:
        moved, moved_slot = recording.to(torch.float64), intercepted(slot, constants.around)
        with torch.no_grad():
            moved.leaves(moved_slot)[name].add_(direction, alpha=step)
        constants.replay()
        return moved.score(moved_slot)[0].detach()

    generator = torch.Generator().manual_seed(5)
    leaves = {name: leaf for name, leaf in recording.leaves(slot).items() if name != "student head"}
    directions = {name: _direction(leaf, generator) for name, leaf in leaves.items()}
    for name, direction in directions.items():
        gradient = analytic.gradients[name]
        expected = 0.0 if gradient is None else float((gradient * direction).sum())
        found = float(along(name, direction, STEP) - along(name, direction, -STEP)) / (2 * STEP)
        if abs(found - expected) > 1e-8 + 1e-4 * max(abs(expected), abs(found)):
            return (
                f"the gradient of '{name}' says {expected:.6g} along a random direction, a finite difference "
                f"{found:.6g}; mend the backward pass, or detach what is meant to be constant"
            )
    return ""


def _direction(leaf: Tensor, generator: torch.Generator) -> Tensor:
    found = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
    return found / torch.linalg.vector_norm(found)


BF16_EPSILON = 2.0**-8
BF16_FLOOR, BF16_TIMES = 0.01, 4.0
"""bfloat16 may be off float64 by this part, and by so often what its rounding of the inputs alone makes."""


def bf16(world: World) -> str:
    """Loss and gradients against float64 on the same numbers.

    Where a method ranks or selects, rounding tips scales: how much is measured on inputs that are jittered as much.
    """
    slot = world.slot()
    rough = replace(slot, loss=clone(slot).loss.to(torch.bfloat16))
    fine = replace(slot, loss=clone(rough).loss.double())
    recording = world.recorded(rough, world.batch(), torch.bfloat16)
    exact = recording.to(torch.float64)
    found, expected = _in_numbers(recording.run(rough)), _in_numbers(exact.run(fine))
    jittered = [_in_numbers(exact.jittered(BF16_EPSILON, seed).run(fine)) for seed in range(3)]
    for name, value in expected.items():
        allowed = BF16_FLOOR * torch.linalg.vector_norm(value)
        allowed += BF16_TIMES * max(torch.linalg.vector_norm(other[name] - value) for other in jittered)
        off = torch.linalg.vector_norm(found[name] - value)
        if not off <= allowed:
            return (
                f"the {name} in bfloat16 is {off / torch.linalg.vector_norm(value):.0%} off float64, and "
                f"{allowed / torch.linalg.vector_norm(value):.0%} is what rounding explains; compute in float32"
            )
    return ""


def _in_numbers(found: Outcome) -> dict[str, Tensor]:
    gradients = {f"gradient of '{n}'": g.double() for n, g in found.gradients.items() if g is not None}
    return {"loss": found.loss.double()} | gradients


def tokenizers(world: World) -> str:
    """Two tokenizers, or a refusal."""
    slot = world.slot()
    world.run([slot], world.batch())
    return ""


def state(world: World) -> str:
    slot, batch = world.slot(), world.batch()
    for _ in range(3):
        world.run([slot], batch)
    with torch.no_grad():
        for parameter in slot.loss.parameters():
            parameter.mul_(1.5)
    stored = io.BytesIO()
    torch.save(slot.loss.state_dict(), stored)
    stored.seek(0)
    loaded = world.slot(seed=1)
    loaded.loss.load_state_dict(torch.load(stored))
    found = world.run([slot], batch).difference(world.run([loaded], batch))
    return found and f"saved and loaded, the loss is another: {found}; keep what it learns in parameters and buffers"


CHECKS = (
    Check("tokenizers", "two tokenizers work, or are refused", tokenizers, "two", blocks=True),
    Check("needs", "what 'needs' declares is read, and only that", needs, blocks=True),
    Check("finite", "on 5 rows and on none, loss and gradients are finite", finite),
    Check("gradients", "every parameter gets a gradient, also on a rank without rows", gradients),
    Check("chunks", "the size of chunks changes nothing", chunks),
    Check("padding", "padding and masked positions change nothing", padding, unless_coupled=True),
    Check("split", "micro-batches add up to the batch", split, unless_coupled=True),
    Check("order", "the order of sequences changes nothing", order, unless_coupled=True),
    Check("coupling", "what says that it couples a batch does", coupling),
    Check("divergence", "if declared: 0 where both models say the same, never negative", divergence, "same"),
    Check("derivative", "the gradient is that of finite differences in float64", finite_differences),
    Check("bf16", "bfloat16 is near float64", bf16),
    Check("state", "saved and loaded it is the same", state),
)
