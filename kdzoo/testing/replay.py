"""Replay: arrays that somebody else's code recorded, through a loss and the pass that training uses.

This is how a plugin proves that it is the method its authors published.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdzoo.api.batch import Batch, Side
from kdzoo.api.entries import EntryMap
from kdzoo.api.head import HEAD_WEIGHT, Head
from kdzoo.api.loss import Loss, Needs, Visited
from kdzoo.api.models import AbsentModel, Heads, ModelInfo, ModelPair, Role, Vocabulary
from kdzoo.api.plugin import Params, Plugin
from kdzoo.api.terms import Terms
from kdzoo.api.token_weights import TokenNeeds, TokenWeights
from kdzoo.errors import KdzooError, did_you_mean
from kdzoo.step.chunks import CHUNK_BYTES
from kdzoo.step.distiller import Distiller, start_from_heads, start_from_statistics, statistics
from kdzoo.step.inputs import PassInputs
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Report
from kdzoo.step.weighing import weigh_step


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
    tokenizers, one per token with one."""
    attention_mask: Any = None
    """[B, T], 1 on real tokens. Default: all are."""
    vocabulary: Vocabulary | None = None
    sites: Mapping[str, Any] = field(default_factory=dict)
    """[B, T, width] of blocks, by site: "hidden.0", say. A loss may read them at all positions, too."""
    layers: int = 1
    """How many blocks the model has."""
    heads: Heads | None = None
    """Its attention heads, where a loss reads queries, keys or values."""


@dataclass
class Replay:
    """What came out. Gradients are of `loss`: `student_hidden`, `student_head`, `student_<site>` of the recorded sites,
    and `<slot>.<parameter>`."""

    loss: Tensor
    terms: dict[str, Tensor]
    """`<slot>/<term>`, divided by its count (tokens, teacher tokens, pairs, spans or sequences), not weighted."""
    watched: dict[str, Tensor]
    """`<slot>/<name>`, the mean; not a number where nothing was counted."""
    facts: dict[str, Mapping[str, Tensor]]
    """Slot -> the teacher's facts, on student tokens where there is a student."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: float = 0.0
    """The student tokens that terms are divided by: term x tokens is the sum."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """`<slot>.<parameter>`: what the losses themselves began with, before `weights`."""


def replay(
    losses: Mapping[str, tuple[type[Loss], Mapping[str, Any], float]],
    student: Recorded | None,
    teacher: Recorded | None,
    *,
    weights: Mapping[str, Any] | None = None,
    artifacts: Mapping[str, Mapping[str, Any]] | None = None,
    token_weights: Mapping[str, tuple[type[TokenWeights], Mapping[str, Any], Mapping[str, Any]]] | None = None,
    columns: Mapping[str, Any] | None = None,
    same_tokens: bool,
    pairs: Any = None,
    student_ids: Any = None,
    teacher_ids: Any = None,
    only: Collection[str] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Replay:
    """Run `losses` (slot -> class, params, weight) on recorded tensors, in their own precision.

    `weights` sets the trainable parameters by name (`dskd.query.weight`): all of them, so that none is left to
    chance. `artifacts` holds the tensors of the stages that the losses name in their needs. `token_weights` (slot ->
    class, params, buffers as they have become) weigh the tokens of a slot, by `columns` [B, T] of the student's
    positions where they read any. `pairs` [P, 2] are the
    aligned tokens (the student's, the teacher's), counted over the scored positions, and `student_ids` [W] the
    student's token for each of the teacher's, -1 for none, `teacher_ids` [V] the teacher's for each of the student's:
    whatever maps of entries the losses declare. By default everything is its own partner where there is one tokenizer,
    and nothing has one where there are two. `only` keeps these terms (`<slot>/<term>`) and drops the
    others, for recordings of single components. What does not fit together is a `KdzooError` of one line.
    """
    sides: dict[Role, Recorded | None] = {"student": student, "teacher": teacher}
    recorded = {role: side for role, side in sides.items() if side is not None}
    if not recorded:
        raise KdzooError("replay: no model is recorded; give the student, the teacher or both")
    tensors = {role: _Tensors(role, side, trains=role == "student") for role, side in recorded.items()}
    dtype = next(iter(tensors.values())).hidden.dtype
    batch = _batch({name: found.side for name, found in tensors.items()}, same_tokens, pairs)
    pair = ModelPair(
        tensors["student"].info if "student" in tensors else AbsentModel("student"),
        tensors["teacher"].info if "teacher" in tensors else AbsentModel("teacher"),
        same_tokens,
    )
    if len(tensors) == 2:
        v, w = (len(tensors[model].head) for model in get_args(Role))
        in_student = _partners(student_ids, w, v, same_tokens)
        maps: dict[EntryMap, Tensor] = dict.fromkeys(("same_text", "nearest_in_student"), in_student)
        maps["nearest_in_teacher"] = _partners(teacher_ids, v, w, same_tokens)
        pair = replace(pair, ids_in_student=in_student, known_entries=maps)
    states = {
        stage: {name: torch.as_tensor(value).to(dtype) for name, value in state.items()}
        for stage, state in (artifacts or {}).items()
    }
    terms, weighing = [], _weighing(losses, token_weights or {}, tensors, same_tokens)
    for slot, (loss, given, _) in losses.items():
        params = valid_params(f"replay: the params of '{slot}'", loss, given)
        needs = loss.needs_of(params, pair)
        _check(slot, needs, tensors, states, same_tokens)
        kept = loss if only is None else _with_only(loss, slot, only)
        with default_dtype(dtype):  # so that frozen artifacts keep the recording's precision
            terms.append(LossTerm.of(slot, kept(params, pair, states), weights=weighing.get(slot)))
    distiller = Distiller(None, None, None, terms, chunk_bytes=chunk_bytes)
    of_student = tensors["student"].sites(terms) if "student" in tensors else {}
    of_teacher = {k: v.detach() for k, v in tensors["teacher"].sites(terms).items()} if "teacher" in tensors else {}
    heads: dict[Role, Head] = {name: Head(found.head) for name, found in tensors.items()}
    start_from_statistics(terms, statistics(terms, batch, of_student, of_teacher))
    start_from_heads(terms, heads)
    start = {name: parameter.detach().clone() for name, parameter in _trainable(distiller).items()}
    _set_weights(distiller, weights or {}, dtype)

    batch = replace(batch, columns=_columns(terms, columns or {}, batch))
    known = distiller.token_facts(batch=batch, student=of_student.get("hidden.last"), teacher=of_teacher, heads=heads)
    (weighed,) = weigh_step(terms, [batch], [known])
    report = Report()
    inputs = PassInputs(
        batch,
        of_student,
        of_teacher,
        heads,
        {name: weight for name, (_, _, weight) in losses.items()},
        report,
        weighed,
    )
    loss_value = distiller.score(inputs)
    measured = Report()
    with torch.no_grad():  # as a trained stage is measured: with the visits that only watch
        distiller.score(replace(inputs, report=measured, steps={}, value_names=[]))
    for term in only or ():
        if term not in report.terms:
            raise KdzooError(f"replay: no loss has a term '{term}'; leave `only` out to see all in `terms`")
    result = Replay(
        loss_value.detach(),
        report.terms,
        {name: total / count for name, (total, count) in measured.watched.items()},
        {name: step.facts for name, step in inputs.steps.items()},
        tokens=batch.counts["tokens"],
        start=start,
    )
    if loss_value.requires_grad:
        loss_value.backward()
        leaves: dict[str, Tensor] = {n.removeprefix("losses."): p for n, p in distiller.named_parameters()}
        if "student" in tensors:
            leaves |= {"student_hidden": tensors["student"].hidden, "student_head": tensors["student"].head}
            leaves |= {f"student_{site}": value for site, value in tensors["student"].of_blocks.items()}
        result.gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return result


class _Tensors:
    """Recorded arrays of one model as leaves, and its packed rows."""

    def __init__(self, model: Role, recorded: Recorded, trains: bool) -> None:
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
        self.of_blocks = {
            site: torch.as_tensor(value).clone().requires_grad_(trains) for site, value in recorded.sites.items()
        }
        self.embed = None if recorded.embed is None else torch.as_tensor(recorded.embed)
        self.ids_recorded = recorded.input_ids is not None
        scored = labels != -100
        position = scored.flatten().nonzero().squeeze(-1)
        ids = labels.clamp_min(0) if recorded.input_ids is None else torch.as_tensor(recorded.input_ids).long()
        self.side = Side(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if recorded.attention_mask is None else _mask(recorded.attention_mask),
            positions=position,
            labels=labels.flatten()[position].long(),
            inputs=ids.flatten()[position],
            sample=position // labels.shape[1],
            span=_spans(recorded.chunks, position),
        )
        sizes = states.shape[-1], self.head.shape[0], recorded.layers
        self.info = ModelInfo(*sizes, "recorded", recorded.vocabulary, recorded.heads)

    def sites(self, terms: list[LossTerm]) -> dict[str, Tensor]:
        wanted = {"hidden.last"}.union(*(_sites(term.needs, self.model) for term in terms)) - {HEAD_WEIGHT}
        every = self.hidden.flatten(0, 1)
        found = {"hidden.last": every[self.side.positions], "hidden.last@all": every}
        for site, value in self.of_blocks.items():
            every = value.flatten(0, 1)
            found |= {site: every[self.side.positions], f"{site}@all": every}
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
            f"replay: same_tokens, but the student scores {len(student)} tokens and the teacher {len(teacher)}"
        )
    rows = len(next(iter(sides.values()))) if same_tokens else 0
    if same_tokens and student is not None and teacher is not None and (student.span < 0).all():
        student, teacher = (replace(side, span=torch.arange(rows)) for side in (student, teacher))
    pairs = torch.arange(rows)[:, None].expand(-1, 2)
    if recorded is not None:
        pairs = torch.as_tensor(recorded).long().view(-1, 2)
    batch = Batch(student, teacher, pairs, same_tokens, counts={})
    return replace(batch, counts=batch.local_counts())


def _partners(recorded: Any, size: int, others: int, same_tokens: bool) -> Tensor:
    """[size] of each entry that of the other vocabulary, which has `others`: as recorded, or itself."""
    if recorded is not None:
        return torch.as_tensor(recorded).long()
    entries = torch.arange(size)
    return torch.where(entries < (others if same_tokens else 0), entries, -1)


def valid_params(address: str, plugin: type[Plugin], given: Mapping[str, Any]) -> Params:
    """The plugin's parameters; what it does not have is a `KdzooError` at `address`."""
    try:
        return plugin.Params.model_validate(given)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise KdzooError(f"{address}: {'; '.join(faults)}") from error


def _check(
    slot: str,
    needs: Needs,
    tensors: Mapping[Role, _Tensors],
    artifacts: Mapping[str, Mapping[str, Tensor]],
    same_tokens: bool,
) -> None:
    """That the recording holds what the loss reads."""
    if needs.tokenizers == "same" and not same_tokens:
        raise KdzooError(f"replay: '{slot}' compares tokens of one tokenizer; it needs same_tokens=True")
    for model in get_args(Role):
        if _sites(needs, model) and model not in tensors:
            raise KdzooError(f"replay: '{slot}' reads the {model}, which is not recorded")
        if needs.vocabularies and model in tensors and tensors[model].info.known_vocabulary is None:
            raise KdzooError(f"replay: '{slot}' reads what the {model}'s vocabulary says, and none is recorded")
    for stage in needs.artifacts.keys() - artifacts.keys():
        raise KdzooError(f"replay: '{slot}' needs the tensors of the stage '{stage}'; give them as artifacts")


def _weighing(
    losses: Collection[str],
    given: Mapping[str, tuple[type[TokenWeights], Mapping[str, Any], Mapping[str, Any]]],
    tensors: Mapping[Role, _Tensors],
    same_tokens: bool,
) -> dict[str, TokenWeights]:
    """What weighs the tokens of each slot, whose facts the recording can tell."""
    found = {}
    for slot, (kind, params, buffers) in given.items():
        if slot not in losses:
            raise KdzooError(f"replay: token weights of '{slot}', and no loss is called so{did_you_mean(slot, losses)}")
        valid = valid_params(f"replay: the params of the token weights of '{slot}'", kind, params)
        needs: TokenNeeds = kind.needs(valid)
        if needs.compares_models and not same_tokens:
            raise KdzooError(f"replay: the token weights of '{slot}' compare predictions; they need same_tokens=True")
        for model, reads in {"student": True, "teacher": needs.reads_teacher}.items():
            if reads and model not in tensors:
                raise KdzooError(f"replay: the token weights of '{slot}' read the {model}, which is not recorded")
        found[slot] = kind(valid)
        state = {name: torch.as_tensor(value) for name, value in buffers.items()}
        if unknown := sorted(state.keys() - found[slot].state_dict().keys()):
            raise KdzooError(f"replay: the token weights of '{slot}' have no buffer '{unknown[0]}'")
        found[slot].load_state_dict(state, strict=False)
    return found


def _columns(terms: Collection[LossTerm], given: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
    """[N] what token weights read of the rows."""
    found = {}
    for term in terms:
        for name in term.weight_needs.columns:
            if name not in given:
                raise KdzooError(
                    f"replay: the token weights of '{term.name}' read the column '{name}'; give it in columns"
                )
            assert batch.student is not None
            found[name] = torch.as_tensor(given[name]).flatten()[batch.student.positions]
    return found


def _sites(needs: Needs, model: Role) -> frozenset[str]:
    return needs.student if model == "student" else needs.teacher


def _with_only(loss: type[Loss], slot: str, only: Collection[str]) -> type[Loss]:
    """`loss` without the terms that `only` does not name."""

    def kept(found: Visited) -> Visited:
        if not isinstance(found, Terms):
            return found
        return Terms({name: value for name, value in found.values.items() if f"{slot}/{name}" in only}, found.watched)

    def keeping(function: Callable[..., Visited]) -> Callable[..., Visited]:
        @wraps(function)
        def method(*args: Any, **seen: Any) -> Visited:
            return kept(function(*args, **seen))

        return method

    visits = {method.function.__name__: method.calling(keeping(method.function)) for method in loss.visit_methods()}
    return type(loss.__name__, (loss,), {**visits, "finish": keeping(loss.finish)})


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
