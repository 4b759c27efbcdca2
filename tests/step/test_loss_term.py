from __future__ import annotations

import torch
from torch import nn

from kdzoo import Loss, ModelInfo, ModelPair
from kdzoo.step.loss_term import in_precision


class WithState(Loss):
    name, paper, formula = "with_state", "none", "none"

    def build(self, student, teacher, artifacts):
        self.projector = nn.Linear(3, 3)
        self.register_buffer("share", torch.tensor(0.4))
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("constant", torch.ones(()), persistent=False)


def test_what_moves_over_the_steps_stays_in_float32_beside_bfloat16():
    side = ModelInfo(3, 5, 1, "recorded")
    loss = in_precision(WithState(WithState.Params(), ModelPair(side, side, True, None), {}), torch.bfloat16)
    assert loss.projector.weight.dtype == loss.constant.dtype == torch.bfloat16
    assert loss.share.dtype == torch.float32
    for _ in range(100):
        loss.share.add_(1e-4)  # which bfloat16 would round away
    torch.testing.assert_close(loss.share, torch.tensor(0.41))
    assert loss.seen == 7
    assert loss.state_dict()["share"].dtype == torch.float32
