"""Replay: arrays that somebody else's code recorded, through a loss and the pass that training uses.

This is how a plugin proves that it is the method its authors published.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdzoo.errors import KdzooError, did_you_mean
from kdzoo.plugin.contracts import Lexicon, Loss, ModelFacts, Models, Needs, Params
from kdzoo.step.batch import Batch, Side
from kdzoo.step.chunk import Chunk
from kdzoo.step.distiller import Distiller, prepare, set_up, survey
from kdzoo.step.head import HEAD_WEIGHT, Head
from kdzoo.step.report import Report
from kdzoo.step.terms import Terms
from kdzoo.step.vocabulary import CHUNK_BYTES, Call, Slot


@dataclass(frozen=True)
class Recorded:
    """One model's recorded tensors: `logits`, or `hidden` with `head`; `embed` and `input_ids` where read."""

    labels: Any
    """[B, T], -100 where nothing is scored."""
    convention: Literal["shifted", "unshifted"] = "shifted"
    """"shifted": position t scores labels[t]. "unshifted", as Hugging Face: position t scores labels[t + 1]."""
    logits: Any = None  # [B, T, V]
    hidden: Any = None  # [B, T, width]
    head: Any = None  # [V, width]
    embed: Any = None  # [V, width]
    input_ids: Any = None  # [B, T]
    chunks: Any = None
    """[B, T, spans] bool: which aligned span each scored position belongs to, at most one. Default: none with two
    tokenizers, one per row with one."""
    attention_mask: Any = None
    """[B, T], 1 on real tokens. Default: all are."""
    lexicon: Lexicon | None = None


@dataclass
class Replay:
    """What came out. Gradients are of `loss`: `student_hidden`, `student_head`, and `<slot>.<parameter>`."""

    loss: Tensor
    terms: dict[str, Tensor]
    """`<slot>/<term>`, divided by its count (rows, teacher rows, pairs, spans or sequences), not weighted."""
    watched: dict[str, Tensor]
    """`<slot>/<name>`, the mean; not a number where nothing was counted."""
    facts: dict[str, Mapping[str, Tensor]]
    """Slot -> the teacher's facts, on student rows where there is a student."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    rows: float = 0.0
    """The student rows that terms are divided by: term x rows is the sum."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """`<slot>.<parameter>`: what the losses themselves began with, before `weights`."""


def replay(
    losses: Mapping[str, tuple[type[Loss], Mapping[str, Any], float]],
    student: Recorded | None,
    teacher: Recorded | None,
    *,
    weights: Mapping[str, Any] | None = None,
    artefacts: Mapping[str, Mapping[str, Any]] | None = None,
    same_tokens: bool,
    pairs: Any = None,
    student_ids: Any = None,
    only: Collection[str] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Replay:
    """Run `losses` (slot -> class, params, weight) on recorded tensors, in their own precision.

    `weights` sets the trainable parameters by name (`dskd.query.weight`): all of them, so that none is left to
    chance. `artefacts` holds the tensors of the stages that the losses name in their needs. `pairs` [P, 2] are the
    aligned rows (student row, teacher row), counted over the scored positions, and `student_ids` [W] the student's
    token for each of the teacher's, -1 for none; by default everything is its own partner where there is one tokenizer,
    and nothing has one where there are two. `only` keeps these terms (`<slot>/<term>`) and drops the others, for
    recordings of single components. What does not fit together is a `KdzooError` of one line.
    """
    recorded = {name: side for name, side in (("student", student), ("teacher", teacher)) if side is not None}
    if not recorded:
        raise KdzooError("replay: no model is recorded; give the student, the teacher or both")
    tensors = {name: _Tensors(name, side, trains=name == "student") for name, side in recorded.items()}
    dtype = next(iter(tensors.values())).hidden.dtype
    batch = _batch({name: found.side for name, found in tensors.items()}, same_tokens, pairs)
    models = Models(
        **{name: tensors[name].facts if name in tensors else None for name in ("student", "teacher")},
        same_tokens=same_tokens,
        student_ids=_student_ids(student_ids, tensors, same_tokens) if len(tensors) == 2 else None,
    )
    states = {
        stage: {name: torch.as_tensor(value).to(dtype) for name, value in state.items()}
        for stage, state in (artefacts or {}).items()
    }
    slots = []
    for slot, (loss, given, _) in losses.items():
        params = valid_params(f"replay: the params of '{slot}'", loss, given)
        needs = loss.needs(params, same_tokens)
        _check(slot, needs, tensors, states, same_tokens)
        kept = loss if only is None else _with_only(loss, slot, only)
        with default_dtype(dtype):  # so that frozen artefacts keep the recording's precision
            slots.append(Slot(slot, kept(params, models, states), needs))
    distiller = Distiller(None, None, slots, chunk_bytes=chunk_bytes)
    of_student = tensors["student"].sites(slots) if "student" in tensors else {}
    of_teacher = {k: v.detach() for k, v in tensors["teacher"].sites(slots).items()} if "teacher" in tensors else {}
    heads = {name: Head(found.head) for name, found in tensors.items()}
    prepare(slots, survey(slots, batch, of_teacher))
    set_up(slots, heads)
    start = {name: parameter.detach().clone() for name, parameter in _trainable(distiller).items()}
    _set_weights(distiller, weights or {}, dtype)

    report = Report()
    call = Call(
        batch,
        of_student,
        of_teacher,
        heads,
        {name: weight for name, (_, _, weight) in losses.items()},
        report,
    )
    loss_value = distiller.score(call)
    measured = Report()
    with torch.no_grad():  # as a trained stage is measured: with the visits that only watch
        distiller.score(replace(call, report=measured, facts={}, row_names=[]))
    for term in only or ():
        if term not in report.terms:
            raise KdzooError(f"replay: no loss has a term '{term}'; leave `only` out to see all in `terms`")
    result = Replay(
        loss_value.detach(),
        report.terms,
        {name: total / count for name, (total, count) in measured.watched.items()},
        call.facts,
        rows=batch.counts["rows"],
        start=start,
    )
    if loss_value.requires_grad:
        loss_value.backward()
        leaves: dict[str, Tensor] = {n.removeprefix("losses."): p for n, p in distiller.named_parameters()}
        if "student" in tensors:
            leaves |= {"student_hidden": tensors["student"].hidden, "student_head": tensors["student"].head}
        result.gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return result


class _Tensors:
    """Recorded arrays of one model as leaves, and its packed rows."""

    def __init__(self, model: str, recorded: Recorded, trains: bool) -> None:
        self.model = model
        labels = torch.as_tensor(recorded.labels)
        if recorded.convention == "unshifted":
            labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], dim=1)
        if (recorded.logits is None) == (recorded.hidden is None):
            raise KdzooError(f"replay: the {model} is recorded either by its logits or by hidden states and head")
        if recorded.logits is not None:
            # Logits are states of an identity head: their gradient is that of the states.
            states = torch.as_tensor(recorded.logits)
            head = torch.eye(states.shape[-1], dtype=states.dtype)
        elif recorded.head is None:
            raise KdzooError(f"replay: the {model}'s hidden states are recorded without its head")
        else:
            states, head = torch.as_tensor(recorded.hidden), torch.as_tensor(recorded.head)
        if states.shape[:-1] != labels.shape or states.shape[-1] != head.shape[-1]:
            raise KdzooError(
                f"replay: the {model}'s labels {list(labels.shape)}, states {list(states.shape)} and "
                f"head {list(head.shape)} do not fit together"
            )
        self.hidden = states.clone().requires_grad_(trains)
        self.head = nn.Parameter(head.clone(), requires_grad=trains and recorded.hidden is not None)
        self.embed = None if recorded.embed is None else torch.as_tensor(recorded.embed)
        self.ids_recorded = recorded.input_ids is not None
        scored = labels != -100
        position = scored.flatten().nonzero().squeeze(-1)
        ids = labels.clamp_min(0) if recorded.input_ids is None else torch.as_tensor(recorded.input_ids).long()
        self.side = Side(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if recorded.attention_mask is None else _mask(recorded.attention_mask),
            rows=position,
            labels=labels.flatten()[position].long(),
            inputs=ids.flatten()[position],
            sample=position // labels.shape[1],
            span=_spans(recorded.chunks, position),
        )
        self.facts = ModelFacts(states.shape[-1], self.head.shape[0], 1, "recorded", recorded.lexicon)

    def sites(self, slots: list[Slot]) -> dict[str, Tensor]:
        wanted = {"hidden.last"}.union(*(getattr(slot.needs, self.model) for slot in slots)) - {HEAD_WEIGHT}
        every = self.hidden.flatten(0, 1)
        found = {"hidden.last": every[self.side.rows], "hidden.last@all": every}
        if self.embed is not None:
            found["embed.target"] = self.embed[self.side.labels]
            found["embed.zero"] = self.embed[:1]
            if self.ids_recorded:
                found["embed.input"] = self.embed[self.side.inputs]
        for site in sorted(wanted - found.keys()):
            raise KdzooError(f"replay: the {self.model}'s site '{site}' is needed and was not recorded")
        return {site: found[site] for site in wanted}


def _batch(sides: Mapping[str, Side], same_tokens: bool, recorded: Any) -> Batch:
    student, teacher = sides.get("student"), sides.get("teacher")
    if same_tokens and student is not None and teacher is not None and len(student) != len(teacher):
        raise KdzooError(
            f"replay: same_tokens, but the student scores {len(student)} rows and the teacher {len(teacher)}"
        )
    rows = len(next(iter(sides.values()))) if same_tokens else 0
    if same_tokens and student is not None and teacher is not None and (student.span < 0).all():
        student, teacher = (replace(side, span=torch.arange(rows)) for side in (student, teacher))
    pairs = torch.arange(rows)[:, None].expand(-1, 2)
    if recorded is not None:
        pairs = torch.as_tensor(recorded).long().view(-1, 2)
    batch = Batch(student, teacher, pairs, same_tokens, counts={})
    return replace(batch, counts=batch.local_counts())


def _student_ids(recorded: Any, tensors: Mapping[str, _Tensors], same_tokens: bool) -> Tensor:
    if recorded is not None:
        return torch.as_tensor(recorded).long()
    entries = torch.arange(len(tensors["teacher"].head))
    return torch.where(entries < (len(tensors["student"].head) if same_tokens else 0), entries, -1)


def valid_params(address: str, loss: type[Loss], given: Mapping[str, Any]) -> Params:
    """The loss's parameters; what it does not have is a `KdzooError` at `address`."""
    try:
        return loss.Params.model_validate(given)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise KdzooError(f"{address}: {'; '.join(faults)}") from error


def _check(
    slot: str,
    needs: Needs,
    tensors: Mapping[str, _Tensors],
    artefacts: Mapping[str, Mapping[str, Tensor]],
    same_tokens: bool,
) -> None:
    """That the recording holds what the loss reads."""
    if needs.tokenizers == "same" and not same_tokens:
        raise KdzooError(f"replay: '{slot}' compares rows of one tokenizer; it needs same_tokens=True")
    for model in ("student", "teacher"):
        if getattr(needs, model) and model not in tensors:
            raise KdzooError(f"replay: '{slot}' reads the {model}, which is not recorded")
        if needs.lexicons and model in tensors and tensors[model].facts.lexicon is None:
            raise KdzooError(f"replay: '{slot}' reads what the {model}'s vocabulary says, and no lexicon is recorded")
    for stage in needs.artefacts.keys() - artefacts.keys():
        raise KdzooError(f"replay: '{slot}' needs the tensors of the stage '{stage}'; give them as artefacts")


def _with_only(loss: type[Loss], slot: str, only: Collection[str]) -> type[Loss]:
    """`loss` without the terms that `only` does not name."""

    def kept(terms: Terms) -> Terms:
        return Terms({name: s for name, s in terms.sums.items() if f"{slot}/{name}" in only}, terms.watched)

    class Only(loss):  # type: ignore[misc, valid-type]
        def over_vocab(self, visit: str, chunk: Chunk) -> Terms | Mapping[str, Tensor]:
            found = super().over_vocab(visit, chunk)
            return kept(found) if isinstance(found, Terms) else found

        def combine(self, *args: Any) -> Terms:
            return kept(super().combine(*args))

    return Only


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this precision within."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _mask(recorded: Any) -> Tensor:
    return torch.as_tensor(recorded).long()


def _spans(chunks: Any, rows: Tensor) -> Tensor:
    if chunks is None:
        return torch.full_like(rows, -1)
    member = torch.as_tensor(chunks)  # [B, T, C]
    b, _, c = member.shape
    inside, which = member.to(torch.int64).max(-1)
    numbered = torch.where(inside > 0, which + c * torch.arange(b)[:, None], -1)
    return numbered.flatten()[rows]


def _trainable(distiller: Distiller) -> dict[str, nn.Parameter]:
    return {n.removeprefix("losses."): p for n, p in distiller.named_parameters() if p.requires_grad}


def _set_weights(distiller: Distiller, weights: Mapping[str, Any], dtype: torch.dtype) -> None:
    trainable = _trainable(distiller)
    for name in sorted(trainable.keys() - weights.keys()):
        raise KdzooError(f"replay: the weight '{name}' is missing; every trainable parameter needs its recorded value")
    for name in sorted(weights.keys() - trainable.keys()):
        raise KdzooError(f"replay: no trainable parameter is called '{name}'{did_you_mean(name, trainable)}")
    with torch.no_grad():
        for name, value in weights.items():
            recorded, parameter = torch.as_tensor(value), trainable[name]
            if recorded.shape != parameter.shape:
                raise KdzooError(
                    f"replay: the weight '{name}' is {list(recorded.shape)}, the parameter {list(parameter.shape)}"
                )
            parameter.copy_(recorded.to(dtype))


__all__ = ["Recorded", "Replay", "replay"]
