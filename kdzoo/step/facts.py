"""Facts: small per-row tensors that fall out of a visit to the teacher's head without gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from kdzoo.errors import KdzooError, did_you_mean
from kdzoo.step.batch import Side
from kdzoo.step.head import Head
from kdzoo.step.ops import is_top

FACTS = ("teacher.top1", "teacher.correct", "teacher.label_logprob", "teacher.entropy")
"""`teacher.correct@k`: the gold token is among the first k. `teacher.label_logprob@t`: at temperature t."""


def facts_of(
    logits: Tensor, labels: Tensor, wanted: frozenset[str], logprobs: Callable[[float], Tensor]
) -> dict[str, Tensor]:
    """The wanted facts of rows with `logits` [n, W] and gold tokens `labels` [n].

    `logprobs` is asked, for a temperature, if it is needed.
    """
    facts: dict[str, Tensor] = {}
    for fact in sorted(wanted):
        name, _, option = fact.partition("@")
        match name:
            case "teacher.top1":
                facts[fact] = logits.argmax(-1)
            case "teacher.correct":
                facts[fact] = is_top(logits, labels, int(option or 1))
            case "teacher.label_logprob":
                facts[fact] = logprobs(float(option or 1)).gather(-1, labels[:, None]).squeeze(-1)
            case "teacher.entropy":
                log_p = logprobs(1.0)
                facts[fact] = -torch.linalg.vecdot(log_p.exp(), log_p.clamp_min(torch.finfo(log_p.dtype).min))
            case _:
                raise KdzooError(f"fact '{fact}': no such fact{did_you_mean(name, FACTS)}")
    return facts


def carry_by_spans(facts: Mapping[str, Tensor], student: Side, teacher: Side) -> dict[str, Tensor]:
    """Facts of teacher rows [M] on student rows [N], through spans that cover the same text.

    A student row is `correct` where every teacher token of its span was; a log-probability is the span's sum (the
    teacher's probability of that text), an entropy its mean. A row outside every span is taken as correct: nothing
    is known against the teacher there. `top1` names a teacher token and cannot be carried.
    """
    outside = int(torch.cat([student.span, teacher.span, student.span.new_full((1,), -1)]).max()) + 1
    inside = teacher.span >= 0
    index = teacher.span[inside]
    place = torch.where(student.span >= 0, student.span, outside)
    carried: dict[str, Tensor] = {}
    for name, fact in facts.items():
        kind = name.partition("@")[0]
        if kind == "teacher.top1":
            continue
        values = fact[inside].to(torch.float32 if fact.dtype == torch.bool else fact.dtype)
        total = values.new_zeros(outside + 1).index_add(0, index, values)
        count = values.new_zeros(outside + 1).index_add(0, index, torch.ones_like(values))
        if kind == "teacher.correct":
            carried[name] = (total == count)[place]
        elif kind == "teacher.entropy":
            carried[name] = (total / count.clamp_min(1))[place]
        else:
            carried[name] = total[place]
    return carried


@torch.no_grad()
def judge(hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int) -> dict[str, Tensor]:
    """`teacher.label_logprob` and `teacher.correct` of a model's rows [n, width], in chunks, nothing else kept."""
    wanted = frozenset({"teacher.label_logprob", "teacher.correct"})
    size = max(1, chunk_bytes // (4 * head.rows.shape[0]))
    parts = []
    for rows, gold in zip(hidden.split(size), labels.split(size), strict=True):
        logits = head.finish(rows @ head.rows.t(), head.biases)
        parts.append(facts_of(logits, gold, wanted, partial(_logprobs, logits)))
    return {name: torch.cat([part[name] for part in parts]) for name in sorted(wanted)}


def _logprobs(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1)
