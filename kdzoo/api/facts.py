"""Facts: small tensors, one value per token, that fall out of the teacher's head without gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdzoo.api.batch import Side

FACTS = ("teacher.top1", "teacher.correct", "teacher.label_logprob", "teacher.entropy")
"""`teacher.correct@k`: the gold token is among the first k. `teacher.label_logprob@t`: at temperature t."""

TOKEN_FACTS = tuple(
    f"{model}.{fact}" for model in ("student", "teacher") for fact in ("correct", "label_logprob", "entropy")
)
"""Of each model's prediction of a token: what token weights may read."""

PAIR_FACTS = tuple(f"pair.{name}" for name in ("forward_kl", "reverse_kl", "js", "hellinger", "total_variation"))
"""Between the two models' predictions of a token, where they share a tokenizer."""


def carry_by_spans(facts: Mapping[str, Tensor], student: Side, teacher: Side) -> dict[str, Tensor]:
    """Facts of teacher tokens [M] on student tokens [N], through spans that cover the same text.

    A student token is `correct` where every teacher token of its span was; a log-probability is the span's sum (the
    teacher's probability of that text), an entropy its mean. A token outside every span is taken as correct: nothing
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
