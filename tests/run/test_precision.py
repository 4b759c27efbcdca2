"""What a loss is made of is in the run's precision, and what it moves by small steps is not."""

from __future__ import annotations

import torch
from torch import nn

from kdzoo import Logits, Loss, ModelInfo, ModelPair, NoParams, Terms, ops, visit
from kdzoo.run.losses import in_precision


class Moving(Loss):
    """A share that grows by less than bfloat16 shows."""

    name, paper, formula = "moving", "none", "none"

    def build(self, student, teacher, artifacts):
        self.project = nn.Linear(2, 2)
        self.project.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("share", torch.tensor(0.4, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(2))

    @visit
    def tokens(self, student: Logits) -> Terms:
        return Terms().add("nll", ops.cross_entropy(student.logprobs(), student.labels))


def made() -> Moving:
    info = ModelInfo(2, 3, 1, "none")
    return Moving(NoParams(), ModelPair(info, info, True), {})


def test_buffers_in_float64_keep_their_precision_in_bfloat16():
    loss = in_precision(made(), "bf16")
    assert loss.project.weight.dtype == loss.mean.dtype == torch.bfloat16
    assert loss.share.dtype == loss.project.seen.dtype == torch.float64
    before = float(loss.share)
    loss.share.add_(1e-4)
    assert float(loss.share) > before
    assert loss.state_dict()["share"] is not None and dict(loss.named_buffers())["share"] is loss.share


def test_in_float32_too():
    assert in_precision(made(), "fp32").share.dtype == torch.float64
