"""A student beside its teacher on rows that no stage has seen: where the teacher is right, and where it is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kdzoo.api.batch import Batch, Side
from kdzoo.api.facts import carry_by_spans
from kdzoo.engine.distributed import summed
from kdzoo.engine.frozen import FrozenModel, gather
from kdzoo.evaluate import ByVerdict, ModelScores
from kdzoo.step.chunks import CHUNK_BYTES
from kdzoo.step.facts import predictions


@torch.no_grad()
def read_beside_teacher(student: FrozenModel, teacher: FrozenModel, batches: Iterable[Batch]) -> ModelScores:
    """The student's cross-entropy and token accuracy on the gold responses, and its cross-entropy by the teacher's
    verdict, which two tokenizers carry over by aligned spans. Every rank brings as many batches."""
    device = student.device
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    for batch in batches:
        assert batch.student is not None and batch.teacher is not None
        ours, theirs = batch.student.to(device), batch.teacher.to(device)
        read, verdict = _read(student, ours), _read(teacher, theirs)
        right = (verdict if batch.same_tokens else carry_by_spans(verdict, ours, theirs))["teacher.correct"]
        nll = -read["teacher.label_logprob"].double()
        zero = torch.zeros_like(nll)
        sums: Sequence[Tensor] = (
            torch.where(right, nll, zero).sum(),
            torch.where(right, zero, nll).sum(),
            right.sum().double(),
            (~right).sum().double(),
            read["teacher.correct"].sum().double(),
        )
        totals += torch.stack(list(sums))
    names = ("nll_right", "nll_wrong", "right", "wrong", "accurate")
    found = summed(dict(zip(names, totals, strict=True)), device)
    rows = found["right"] + found["wrong"]
    return ModelScores(
        rouge_l={},
        cross_entropy=(found["nll_right"] + found["nll_wrong"]) / rows,
        token_accuracy=found["accurate"] / rows,
        by_verdict=ByVerdict(
            right=found["nll_right"] / max(found["right"], 1),
            wrong=found["nll_wrong"] / max(found["wrong"], 1),
            wrong_share=found["wrong"] / rows,
        ),
    )


def _read(model: FrozenModel, side: Side) -> dict[str, Tensor]:
    hidden = model.sites(side, {"hidden.last"})["hidden.last"]
    with gather(model.head.parameters):
        return predictions(hidden, model.head, side.labels, CHUNK_BYTES)
