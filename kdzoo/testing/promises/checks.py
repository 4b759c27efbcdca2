"""The promises that every loss keeps, one function each: it returns what is wrong and what to do, or nothing."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdzoo.api import ops
from kdzoo.api.batch import Batch, Side
from kdzoo.api.chunk import Logits
from kdzoo.api.loss import Loss, Needs, visit
from kdzoo.api.terms import Terms
from kdzoo.api.token_weights import TokenWeights, WeighedTokens, Weights
from kdzoo.step.chunks import CHUNK_BYTES
from kdzoo.step.distiller import start_from_heads
from kdzoo.step.loss_term import LossTerm, in_precision
from kdzoo.testing.promises.rearrange import rearranged
from kdzoo.testing.promises.watch import (
    Calls,
    Constants,
    Divisors,
    Edits,
    Heard,
    Reads,
    Untouched,
    intercepted,
    with_heard_entries,
    with_heard_vocabularies,
)
from kdzoo.testing.promises.world import FIVE_TOKENS, LENGTHS, SLOT, Outcome, Recording, World, clone


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
    """What it finds would only be found again by the checks after it."""


def declarations(world: World) -> str:
    """A step with one tokenizer, in training and as a trained stage is measured: faults are exceptions of the pass."""
    if fault := world.subject.loss.declared_fault():
        return f"the class {fault}"
    _ = world.whole
    with torch.no_grad():
        world.run([world.term()], world.batch())
    return ""


def tokenizers(world: World) -> str:
    """Two tokenizers, or a refusal."""
    _ = world.whole
    return ""


def finite(world: World) -> str:
    for found in (world.whole, world.run([world.term()], world.batch(FIVE_TOKENS))):
        if fault := _not_finite(found):
            return f"{fault}; keep logarithms, roots and divisions away from 0"
    return ""


def empty(world: World) -> str:
    found = world.run([world.term()], world.batch(()))
    if fault := _not_finite(found):
        return f"{fault} on a rank without tokens; divide by counts ('per'), never by what may be 0"
    for name in _trained(world.term()):
        if found.gradients[name] is None and world.whole.gradients[name] is not None:
            return (
                f"the parameter '{_shown(name)}' gets no gradient on a rank without tokens, which would stall all "
                "others; run every module also on 0 tokens, never branch around one"
            )
    return ""


def _not_finite(found: Outcome) -> str:
    numbers = {"loss": found.loss, **{f"gradient of '{n}'": g for n, g in found.gradients.items() if g is not None}}
    return next((f"the {name} is not finite" for name, number in numbers.items() if not number.isfinite().all()), "")


def _trained(term: LossTerm) -> list[str]:
    """The parameters of its own, as an outcome names them."""
    return [f"losses.{SLOT}.{name}" for name, p in term.loss.named_parameters() if p.requires_grad]


def _shown(name: str) -> str:
    return name.removeprefix(f"losses.{SLOT}.")


def modules(world: World) -> str:
    """Parameters are in modules that every rank calls alike: ZeRO-3 gathers them there, on all ranks together."""
    for name, _ in world.term().loss.named_parameters(recurse=False):
        return (
            f"the parameter '{name}' is the loss's own, of which every rank holds an empty part under ZeRO-3; put it "
            "in a submodule and call that"
        )
    term = world.term()
    if not any(True for _ in term.loss.parameters()):
        return ""
    whole = _calls(world, LENGTHS)
    for name, module in term.loss.named_modules():
        parents = {name[:end] for end in range(len(name)) if name[end] == "."}
        if any(True for _ in module.parameters(recurse=False)) and not {name, *parents} & set(whole):
            return f"the module '{name}' is never called, and ZeRO-3 gathers its weights only then; call it, or drop it"
    tries = {
        "on a rank without tokens": _calls(world, ()),
        "on a single sequence": _calls(world, LENGTHS[:1]),
        "with smaller chunks": _calls(world, LENGTHS, chunk_bytes=4),
    }
    for where, calls in tries.items():
        if calls != whole:
            return (
                f"modules are called {len(calls)} times {where} and {len(whole)} times elsewhere; call every module "
                "equally often on each rank, whatever tokens it has, and never in a visit"
            )
    return ""


def _calls(world: World, lengths: Sequence[tuple[int, int, int]], chunk_bytes: int = CHUNK_BYTES) -> list[str]:
    term, calls = world.term(), Calls()
    calls.listen(term.loss)
    world.run([term], world.batch(lengths), chunk_bytes)
    return calls.made


class Watched(dict[str, Tensor]):
    """A mapping that remembers what was read of it."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def needs(world: World) -> str:
    """What is declared is read, and only that."""
    reads, heard = Reads(), World(world.subject, world.same_tokens)
    heard.pair = with_heard_entries(with_heard_vocabularies(world.pair, reads.vocabulary), reads.entries)
    heard.artifacts = Heard(world.artifacts, reads.artifacts.add)
    term = intercepted(heard.term(), reads.around)
    recording = world.recorded(term, world.batch())
    start_from_heads([term], world.heads)
    world.statistics([term], world.batch())
    recording.run(term)
    with torch.no_grad():  # as a trained stage is measured: with the visits that only watch
        recording.score(term)
    for line in _unread(term, reads):
        return line
    return _alignment(world) if not world.same_tokens else ""


def _unread(term: LossTerm, reads: Reads) -> Iterator[str]:
    declared = term.needs
    for model in ("student", "teacher"):
        for site in sorted(_sites(declared, model) - reads.sites[model]):
            yield f"the {model}'s site '{site}' is declared and not read; take it out of 'needs'"
    for one in term.visits:
        for stream in one.streams:
            there = stream in reads.streams or stream in ("student", "teacher")
            if there and (one.method, stream) not in reads.logits:
                yield f"the visit '{one.name}' never reads the logits of '{stream}'; take it out of the arguments"
    seen = {stream for one in term.visits for stream in one.streams}
    for stream in sorted(reads.streams - seen):
        yield f"the stream '{stream}' is in no visit; give it one, or take it out"
    for fact in sorted(declared.facts - reads.facts):
        yield f"the fact '{fact}' is declared and not read; take it out"
    for stage in sorted(declared.artifacts.keys() - reads.artifacts):
        yield f"the stage '{stage}' is declared and its tensors are not read; take it out of 'artifacts'"
    if declared.vocabularies and not reads.vocabulary:
        yield "'vocabularies' is declared and none is read; take it out"
    for name in sorted(declared.entries - reads.entries):
        yield f"the map of entries '{name}' is declared and not read; take it out"


def _sites(declared: Needs, model: str) -> frozenset[str]:
    return declared.student if model == "student" else declared.teacher


def _alignment(world: World) -> str:
    """Whether pairs and spans are read is whether it matters that there are any."""
    batch = world.batch()
    assert batch.teacher is not None
    none = replace(batch, pairs=batch.pairs[:0], teacher=_without_spans(batch.teacher))
    if batch.student is not None:
        none = replace(none, student=_without_spans(batch.student))
    reads = bool(world.run([world.term()], batch).difference(world.run([world.term()], none)))
    if reads and not world.needs.aligned:
        return "pairs or spans of the aligner change the loss; say 'aligned=True' in 'needs'"
    if world.needs.aligned and not reads:
        return "'aligned' is declared, and neither pairs nor spans change anything; take it out"
    return ""


def _without_spans(side: Side) -> Side:
    return replace(side, span=torch.full_like(side.span, -1))


def gradients(world: World) -> str:
    """Something trains: the student, wherever its prediction is seen, and every parameter of the loss's own.

    Where a method selects tokens, one batch may have none: others are tried.
    """
    fault = _untrained(world, world.whole)
    for seed in range(1, 6):
        if not fault:
            break
        fault = _untrained(world, world.run([world.term()], world.batch(seed=seed)))
    return fault


def _untrained(world: World, found: Outcome) -> str:
    term = world.term()
    trained, sees_student = _trained(term), any("student" in one.streams for one in term.visits)
    if world.has_student and (sees_student or not trained):
        of_student = [gradient for name, gradient in found.gradients.items() if name.startswith("student.")]
        if not any(gradient is not None and gradient.any() for gradient in of_student):
            return "no part of the student gets a gradient; do not detach its states or log-probabilities"
    for name in trained:
        gradient = found.gradients[name]
        if gradient is None or not gradient.any():
            return (
                f"the parameter '{_shown(name)}' gets no gradient; use it in 'streams' or 'finish' (never in a visit), "
                "or freeze it"
            )
    return ""


def neighbours(world: World) -> str:
    """What is shared stays as it is, so that it does not matter which losses run beside this one, or in which order."""
    term, edits = world.term(), Edits()
    listened, recording = intercepted(term, edits.around), world.recorded(term, world.batch())
    start_from_heads([listened], world.heads)
    sites = recording.sites()
    shown = {f"the student's site '{name}'": value for name, value in sites.items()}
    shown |= {f"the teacher's site '{name}'": value for name, value in recording.teacher.items()}
    before = Untouched(shown)
    recording.score(listened, sites)
    for what in [*edits.found, *before.changed()]:
        return f"{what} is changed in place, and other losses read it too; work on a copy"
    other = LossTerm.of("neighbour", Neighbour(Neighbour.Params(), world.pair, {}))
    batch = world.batch()
    first, last = world.run([world.term(), other], batch), world.run([other, world.term()], batch)
    for name in first.terms.keys() | last.terms.keys():
        if not (name in first.terms and name in last.terms and first.terms[name].equal(last.terms[name])):
            return f"beside another loss, the term '{name}' depends on which of both comes first; share nothing"
    found = first.difference(world.whole.plus(world.run([other], batch)))
    return found and f"beside another loss, something changes: {found}; share nothing"


class Neighbour(Loss):
    """Reads all that a loss is shown of the models' predictions."""

    name = "neighbour"
    paper = "none"
    formula = "L = 1/N sum_i - log q_i(y_i) + ..."

    @visit(each=("student", "teacher"))
    def predictions(self, seen: Logits) -> Terms:
        found = seen.logits.square().mean(-1) - seen.logprobs(2.0).mean(-1)
        return Terms().add(seen.stream, found + ops.cross_entropy(seen.logprobs(), seen.labels))


def padding(world: World) -> str:
    batch = world.batch()
    found = _apart(world, rearranged(batch, range(len(LENGTHS)), padding=3))
    return found and f"padding changes something: {found}; read packed tokens, or mask ('view.padded' has one)"


def chunks(world: World) -> str:
    for tokens in (1, 2):
        size = 4 * tokens * sum(world.vocabulary)
        if found := world.whole.difference(world.run([world.term()], world.batch(), chunk_bytes=size)):
            return f"chunks of {tokens} tokens change something: {found}; return values of tokens, and name 'per'"
    return ""


def split(world: World) -> str:
    batch = world.batch()
    parts = [world.run([world.term()], rearranged(batch, order)) for order in ([0, 1], [2], [3])]
    found = world.whole.difference(parts[0].plus(parts[1]).plus(parts[2]))
    return found and (
        f"three micro-batches do not add up to one: {found}; return values of tokens, or their sum, with 'per' (no "
        "mean), or say 'batch_coupled=True'"
    )


def order(world: World) -> str:
    found = _apart(world, rearranged(world.batch(), [2, 0, 3, 1]))
    return found and f"the order of sequences changes something: {found}; let no sequence see its neighbours"


def _apart(world: World, other: Batch) -> str:
    return world.whole.difference(world.run([world.term()], other))


def counts(world: World) -> str:
    """Each term is divided by what it is a sum over.

    Twice the sequences are twice the sum and twice the count. A response that says the same again and again makes a sum
    over tokens grow by as much each time, however many tokens at its ends are left out; a mean stays what it is.
    """
    divisors = Divisors()
    term = intercepted(world.term(), divisors.around)
    recording = world.recorded(term, world.batch())
    once, twice = (_terms(recording.repeated(times, longer=False), clone(term)) for times in (1, 2))
    for name, value in once.items():
        if not _near(value, twice[name]):
            return (
                f"the term '{name}' is {value:.6g}, and {twice[name]:.6g} where every sequence is there twice; return "
                "values of tokens, or their sum, and let the core divide by 'per'"
            )
    longer = [recording.repeated(times, longer=True) for times in (2, 3, 4)]
    found = [(_terms(one, clone(term)), one.batch.counts) for one in longer]
    for name, per in divisors.of.items():
        two, three, four = (float(terms[name]) * counts[per] for terms, counts in found)
        grows = not _near(two, three)
        if per == "sequences" and grows and _near(four - three, three - two):
            return (
                f"the term '{name}' is divided by sequences, and grows with the length of responses like a sum over "
                "tokens; say what it is a sum over in 'per', or divide by the length"
            )
        if per != "sequences" and not grows and two:
            return (
                f"the term '{name}' is divided by {per.replace('_', ' ')}, and does not grow with the length of "
                "responses like a sum over them; return a sum, or say per='sequences'"
            )
    return ""


def _terms(recording: Recording, term: LossTerm) -> dict[str, float]:
    _, report = recording.score(term)
    return {name.removeprefix(f"{SLOT}/"): float(value) for name, value in report.terms.items()}


def _near(mine: float, yours: float) -> bool:
    return abs(mine - yours) <= 1e-9 + 1e-7 * max(abs(mine), abs(yours))


class Given(TokenWeights):
    """1 on every token, but for those of one sequence, which are left out."""

    name = "given"
    paper = formula = "none"

    def build(self) -> None:
        self.without = -1

    def weigh(self, tokens: WeighedTokens) -> Weights:
        return Weights((tokens.side.sample != self.without).double())


def weights(world: World) -> str:
    """Each term is made of values of tokens: any token weights can be set beside it in a recipe."""
    if not world.has_student:
        return ""
    batch, given = world.batch(), Given(Given.Params())
    ones = world.run([replace(world.term(), weights=given)], batch)
    for name, value in {"loss": ones.loss, **ones.terms}.items():
        if not value.equal(world.whole.loss if name == "loss" else world.whole.terms[name]):
            return f"weights of 1 change the {name}; return values of tokens, and say what they are of"
    for name, gradient in ones.gradients.items():
        before = world.whole.gradients[name]
        same = gradient is before if gradient is None or before is None else gradient.equal(before)
        if not same:
            return f"weights of 1 change the gradient of '{_shown(name)}'; return values of tokens"
    if world.needs.batch_coupled:
        return ""
    given.without = 1
    weighed = world.run([replace(world.term(), weights=given)], batch)
    others = rearranged(batch, [0, 2, 3])
    found = weighed.difference(world.run([world.term()], replace(others, counts=others.local_counts())))
    return found and (
        f"a sequence whose tokens all weigh 0 is not as if it were not there: {found}; return values of tokens, with "
        "'of' where they are of something else, and 'Stream.tokens' where a packing stands for some"
    )


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
    term = twins.term()
    found = twins.recorded(term, twins.batch()).run(term)
    if not found.loss.abs() <= 1e-9:
        return f"the loss is {found.loss:.3g} where both models say the same; 'divergence' promises 0"
    for name, gradient in found.gradients.items():
        if gradient is not None and not gradient.abs().max() <= 1e-7:
            return f"where both models say the same, the gradient of '{name}' is not 0, as 'divergence' promises"
    for seed in range(5):
        other = World(world.subject, same_tokens=True, seed=seed)
        for name, value in other.run([other.term()], other.batch(seed=seed)).terms.items():
            if not value >= 0:
                return f"the term '{name}' is {value:.3g}; 'divergence' promises that it is never negative"
    return ""


STEP = 1e-6


def finite_differences(world: World) -> str:
    """The gradient along random directions; what the loss makes constant stays so.

    Not of the head: its gradient follows from that of the states, but for streams that it does not learn from.
    """
    term = world.term()
    recording = world.recorded(term, world.batch())
    constants = Constants()
    recording.score(intercepted(term, constants.around))
    analytic = recording.run(clone(term))

    def along(name: str, direction: Tensor, step: float) -> Tensor:
        moved, moved_slot = recording.to(torch.float64), intercepted(term, constants.around)
        with torch.no_grad():
            moved.leaves(moved_slot)[name].add_(direction, alpha=step)
        constants.replay()
        return moved.score(moved_slot)[0].detach()

    generator = torch.Generator().manual_seed(5)
    leaves = {name: leaf for name, leaf in recording.leaves(term).items() if name != "student head"}
    directions = {name: _direction(leaf, generator) for name, leaf in leaves.items()}
    for name, direction in directions.items():
        gradient = analytic.gradients[name]
        expected = 0.0 if gradient is None else float((gradient * direction).sum())
        found = float(along(name, direction, STEP) - along(name, direction, -STEP)) / (2 * STEP)
        if not abs(found - expected) <= 1e-8 + 1e-4 * max(abs(expected), abs(found)):
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
    term = world.term()
    rough = replace(term, loss=in_precision(clone(term).loss, torch.bfloat16))
    fine = replace(term, loss=clone(rough).loss.double())
    recording = world.recorded(rough, world.batch(), torch.bfloat16)
    exact = recording.to(torch.float64)
    found, expected = _in_numbers(recording.run(rough)), _in_numbers(exact.run(fine))
    jittered = [_in_numbers(exact.jittered(BF16_EPSILON, seed).run(fine)) for seed in range(3)]
    for name, value in expected.items():
        allowed = BF16_FLOOR * torch.linalg.vector_norm(value)
        allowed += BF16_TIMES * torch.stack([torch.linalg.vector_norm(j[name] - value) for j in jittered]).max()
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


def state(world: World) -> str:
    """What moves is in buffers, moves once per optimizer step, and is saved."""
    term, batch = world.term(), world.batch()
    for number in range(3):
        buffers = Untouched(dict(term.loss.named_buffers()))
        found = world.run([term], batch)
        for name in buffers.changed():
            return f"the buffer '{name}' moves with every micro-batch; move it in 'after_step'"
        before = unsaved(term.loss)
        terms = {n.removeprefix(f"{SLOT}/"): float(v) for n, v in {**found.terms, **found.watched}.items()}
        term.loss.after_step(terms, (number + 1) / 3)
        for name, value in unsaved(term.loss).items():
            if before.get(name) != value:
                return f"'after_step' changes '{name}', which no checkpoint keeps; register it as a buffer"
    with torch.no_grad():
        for parameter in term.loss.parameters():
            parameter.mul_(1.5)
    stored = io.BytesIO()
    torch.save(term.loss.state_dict(), stored)
    stored.seek(0)
    loaded = world.term(seed=1)
    loaded.loss.load_state_dict(torch.load(stored))
    found_again = world.run([term], batch).difference(world.run([loaded], batch))
    return found_again and (
        f"saved and loaded, the loss is another: {found_again}; keep what it learns in parameters and buffers"
    )


OF_EVERY_MODULE = vars(nn.Module()).keys()


def unsaved(of: nn.Module) -> dict[str, bytes]:
    """Attributes that are no part of the state, as bytes to compare."""
    found: dict[str, Any] = {n: v for n, v in of.named_buffers() if n not in of.state_dict()}
    for owner, module in of.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}
        found |= {f"{owner}.{name}".removeprefix("."): value for name, value in own.items()}
    return {name: _pickled(value) for name, value in found.items()}


def _pickled(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):  # a function, say
        return b""


CHECKS = (
    Check("declarations", "what it declares fits together, and a step runs", declarations, "same", blocks=True),
    Check("tokenizers", "two tokenizers work, or are refused", tokenizers, "two", blocks=True),
    Check("finite", "loss and gradients are finite", finite, blocks=True),
    Check("needs", "what 'needs' declares is read, and only that", needs),
    Check("empty", "without tokens the loss is finite, and every parameter gets a gradient", empty),
    Check("modules", "parameters are in modules that are called alike on every rank", modules),
    Check("gradients", "the student, and every parameter, gets a gradient", gradients),
    Check("neighbours", "what is shared stays as it is, whatever runs beside it", neighbours),
    Check("chunks", "the size of chunks changes nothing", chunks),
    Check("padding", "padding and masked positions change nothing", padding, unless_coupled=True),
    Check("split", "micro-batches add up to the batch", split, unless_coupled=True),
    Check("order", "the order of sequences changes nothing", order, unless_coupled=True),
    Check("counts", "each term is divided by what it is a sum over", counts, unless_coupled=True),
    Check("weights", "token weights of 1 change nothing, and of 0 leave out a sequence", weights),
    Check("coupling", "what says that it couples a batch does", coupling),
    Check("divergence", "if declared: 0 where both models say the same, never negative", divergence, "same"),
    Check("derivative", "the gradient is that of finite differences in float64", finite_differences),
    Check("bf16", "bfloat16 is near float64", bf16),
    Check("state", "saved and loaded it is the same, and what moves does so once per step", state),
)
