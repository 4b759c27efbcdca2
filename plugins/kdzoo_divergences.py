"""Divergences between the next-token distributions of a teacher and a student that share one tokenizer."""

from __future__ import annotations

from pydantic import Field

from kdzoo import Chunk, Loss, Needs, Params, Terms, Visit, hookimpl, ops


class ForwardKL(Loss):
    """KL(p || q): the student q is pulled to cover all that the teacher p finds likely."""

    name = "forward_kl"
    paper = "Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arxiv.org/abs/1503.02531"
    formula = "L = 1/N sum_i sum_v p_i(v) (log p_i(v) - log q_i(v))"

    class Params(Params):
        temperature: float = Field(1.0, gt=0)
        """Both logits are divided by it."""
        teacher_temperature: float = Field(1.0, gt=0)
        """The teacher's logits are divided by it once more."""
        square_temperature: bool = False
        """Multiply by the temperature squared, so that the gradient's size does not depend on it."""

    @classmethod
    def needs(cls, params: ForwardKL.Params, same_tokens: bool) -> Needs:
        return Needs(visits=(Visit("tokens", ("student", "teacher")),), tokenizers="same")

    def over_vocab(self, visit: str, chunk: Chunk) -> Terms:
        tau = self.params.temperature
        log_p = chunk.logprobs("teacher", tau * self.params.teacher_temperature)
        kl = ops.forward_kl(log_p, chunk.logprobs("student", tau)).sum()
        return Terms().add("forward_kl", kl * tau**2 if self.params.square_temperature else kl)


@hookimpl
def register_losses(register):  # type: ignore[no-untyped-def]
    register(ForwardKL)
