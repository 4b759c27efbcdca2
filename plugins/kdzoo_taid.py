"""TAID: the target is between the student and the teacher, and moves to the teacher as the student learns.

p is the teacher's distribution, q the student's, for models that share one tokenizer. Follows SakanaAI/TAID @ a0628922,
src/distil_losses/taid.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdzoo import Logits, Loss, Needs, Params, Register, Terms, hookimpl, ops, visit


class TAID(Loss):
    """The forward KL to a target whose logits are interpolated; its share of the teacher never falls."""

    name = "taid"
    paper = (
        "Shing et al., TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in "
        "Language Models, ICLR 2025, arxiv.org/abs/2501.16937"
    )
    formula = (
        "L = 1/N sum_i KL(softmax((1 - t) sg(z_i) + t y_i) || q_i), y logits of the teacher, z of the student q; "
        "t += α sigmoid(m) (1 - t), m = β m + (1 - β) (L' - L) / L', L' the loss of the step before"
    )
    deviations = (
        "`TAID.update_t` moves t in every micro-batch, by the loss of one rank; here t moves once per optimizer step, "
        "by the loss over all ranks and micro-batches, so that no split changes it.",
        "Its linear schedule lags one step behind: it has the share of the steps before this one, and here that of the "
        "steps that are done.",
        "`forward_kl` leaves the entropy of the target in, so that t follows the change of a cross-entropy "
        "(`subtract_entropy` false); by default it is taken off, as in the paper. The gradient is the same.",
        "`update_t` divides by almost nothing after a loss of 0, which stops t for long; here that change counts as 0.",
        "An entry that the student excludes, by a logit of -inf, counts as 100 nats: `forward_kl` leaves it out.",
        "`forward_kl` divides by the tokens of each micro-batch; here the sum is divided by those of the whole step.",
    )

    class Params(Params):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "taid@a062892": {"subtract_entropy": False},
        }
        preset: Literal["taid@a062892"] | None = None
        """Whose code: what is not given beside it is as there."""
        temperature: float = Field(1.0, gt=0)
        """Both logits are divided by it. The authors have none."""
        t_start: float = Field(0.4, ge=0, lt=1)
        """t of the first two steps, and where the linear schedule begins. The authors' scripts: 0.4 (Phi-3) or 0.2."""
        t_end: float = Field(1.0, gt=0, le=1)
        """The largest t, and where the linear schedule ends."""
        alpha: float = Field(5e-4, ge=0, le=1)
        """α: how far t moves in a step."""
        beta: float = Field(0.99, ge=0, lt=1)
        """β, of the momentum m of the loss's relative change."""
        adaptive: bool = True
        """t moves by the change of the loss, and at least as the linear schedule. False: the linear schedule alone."""
        subtract_entropy: bool = True
        """False: the entropy of the target stays in, as in the authors' code. It changes the value that t follows."""

        @model_validator(mode="after")
        def t_rises(self) -> Any:
            if self.t_start > self.t_end:
                what = f"t_start {self.t_start} is above t_end {self.t_end}, but t never falls"
                raise ValueError(f"{what}; take a larger t_end")
            return self

    @classmethod
    def needs(cls, params, same_tokens):
        return Needs(tokenizers="same", divergence=params.subtract_entropy)

    def build(self, student, teacher, artifacts):
        for name, value in (("t", self.params.t_start), ("momentum", 0.0), ("previous_loss", torch.inf)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))  # its steps are small

    @visit
    def tokens(self, student: Logits, teacher: Logits) -> Terms:
        z, y = self.finite(student.logits.detach()), self.finite(teacher.logits)
        target = torch.lerp(z, y, self.t.to(y.dtype)).log_softmax(-1)
        kl = ops.forward_kl(target, student.logprobs(self.params.temperature))
        # Below 0 is rounding: taken off the value, not off the gradient.
        value = kl - kl.detach().clamp_max(0)
        if not self.params.subtract_entropy:
            value = value + torch.special.entr(target.exp()).sum(-1)
        return Terms().add("taid", value).watch("t", self.t * len(student), len(student))

    def finite(self, logits: Tensor) -> Tensor:
        """Logits over the temperature; an entry excluded by -inf counts as 100 nats below the likeliest."""
        tempered = logits if self.params.temperature == 1.0 else logits * (1.0 / self.params.temperature)
        return torch.where(tempered.isneginf(), tempered.amax(-1, keepdim=True) - ops.INFINITE_RATIO, tempered)

    def after_step(self, terms, progress):
        loss, before = terms["taid"], self.previous_loss
        first = before.isinf()  # no change is known yet, and t stays
        change = torch.where(first | (before == 0), 0.0, (before - loss) / (before + 1e-15))
        self.momentum.lerp_(change, 1 - self.params.beta)
        linear = self.params.t_start + (self.params.t_end - self.params.t_start) * progress
        moved = self.t + self.params.alpha * self.momentum.sigmoid() * (1 - self.t) if self.params.adaptive else self.t
        self.t.copy_(torch.where(first, self.t, moved.clamp(linear, self.params.t_end)))
        self.previous_loss.fill_(loss)


@hookimpl
def register_plugins(register: Register) -> None:
    register(TAID)
