"""The teacher's facts, computed where a chunk's logits are at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from kdzoo.api.facts import FACTS
from kdzoo.api.head import Head
from kdzoo.api.ops import is_top
from kdzoo.errors import KdzooError, did_you_mean

LogProbs = Callable[[float], Tensor]
"""Log-softmaxes [n, W] at a temperature, made if they are asked for."""


def _top1(logits: Tensor, labels: Tensor, logprobs: LogProbs, option: str) -> Tensor:
    return logits.argmax(-1)


def _correct(logits: Tensor, labels: Tensor, logprobs: LogProbs, option: str) -> Tensor:
    return is_top(logits, labels, int(option or 1))


def _label_logprob(logits: Tensor, labels: Tensor, logprobs: LogProbs, option: str) -> Tensor:
    return logprobs(float(option or 1)).gather(-1, labels[:, None]).squeeze(-1)


def _entropy(logits: Tensor, labels: Tensor, logprobs: LogProbs, option: str) -> Tensor:
    log_p = logprobs(1.0)
    return -torch.linalg.vecdot(log_p.exp(), log_p.clamp_min(torch.finfo(log_p.dtype).min))


_FORMULAS: Mapping[str, Callable[[Tensor, Tensor, LogProbs, str], Tensor]] = {
    "top1": _top1,
    "correct": _correct,
    "label_logprob": _label_logprob,
    "entropy": _entropy,
}


def facts_of(logits: Tensor, labels: Tensor, wanted: frozenset[str], logprobs: LogProbs) -> dict[str, Tensor]:
    """The wanted facts of one model's tokens with `logits` [n, W] and gold tokens `labels` [n]."""
    facts: dict[str, Tensor] = {}
    for fact in sorted(wanted):
        name, _, option = fact.partition("@")
        formula = _FORMULAS.get(name.partition(".")[2])
        if formula is None:
            raise KdzooError(f"fact '{fact}': no such fact{did_you_mean(name, FACTS)}")
        facts[fact] = formula(logits, labels, logprobs, option)
    return facts


@torch.no_grad()
def predictions(hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int) -> dict[str, Tensor]:
    """`teacher.label_logprob` and `teacher.correct` of a model's states [n, width], in chunks, nothing else kept."""
    wanted = frozenset({"teacher.label_logprob", "teacher.correct"})
    size = max(1, chunk_bytes // (4 * head.rows.shape[0]))
    parts = []
    for states, gold in zip(hidden.split(size), labels.split(size), strict=True):
        logits = head.finish(states @ head.rows.t(), head.biases)
        parts.append(facts_of(logits, gold, wanted, partial(log_softmax_at, logits)))
    return {name: torch.cat([part[name] for part in parts]) for name in sorted(wanted)}


def log_softmax_at(logits: Tensor, temperature: float) -> Tensor:
    """The `LogProbs` of logits [n, W]."""
    return torch.log_softmax(logits / temperature, -1)
