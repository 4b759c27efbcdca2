"""One term of the recipe: a loss under the name of its slot, with all that the plan wants to know of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdzoo.api.head import HEAD_WEIGHT
from kdzoo.api.loss import Loss, Needs, Visit
from kdzoo.api.token_weights import TokenNeeds, TokenWeights

LAST = "hidden.last"


def in_precision(loss: Loss, dtype: torch.dtype) -> Loss:
    """The loss with its parameters and constants in `dtype`.

    What is saved of its buffers stays as it is: it moves over the steps, by amounts that bfloat16 would round away.
    """
    saved = loss.state_dict().keys()
    state = {name: buffer.clone() for name, buffer in loss.named_buffers() if name in saved}
    loss.to(dtype)
    for name, buffer in loss.named_buffers():
        if name in state:
            buffer.data = state[name]
    return loss


@dataclass(frozen=True)
class LossTerm:
    """A loss under a name, with what it needs and what its methods see."""

    name: str
    loss: Loss
    needs: Needs
    visits: tuple[Visit, ...]
    state: str = LAST
    """The teacher's site that the loss reads as `hidden.last`: its own, or a fused one."""
    prediction: str = LAST
    """The teacher's site whose logits are the teacher's prediction."""
    weights: TokenWeights | None = None
    """What each token counts; None: as much as every other."""

    @classmethod
    def of(
        cls, name: str, loss: Loss, state: str = LAST, prediction: str = LAST, weights: TokenWeights | None = None
    ) -> LossTerm:
        needs = loss.needs_of(loss.params, loss.pair)
        return cls(name, loss, needs, loss.visits(loss.params), state, prediction, weights)

    @property
    def weight_needs(self) -> TokenNeeds:
        """What its token weights read."""
        return TokenNeeds() if self.weights is None else self.weights.needs(self.weights.params)

    @property
    def teacher_sites(self) -> frozenset[str]:
        """All that the teacher must capture for it."""
        read = self.needs.teacher - {HEAD_WEIGHT}
        return frozenset({self.prediction, *(self.stands_for(site) for site in read)})

    def stands_for(self, site: str) -> str:
        """The site that is behind one that the loss declares."""
        name, at, everywhere = site.partition("@")
        return f"{self.state}{at}{everywhere}" if name == LAST else site

    @property
    def teacher_stream(self) -> str:
        """The stream whose logits are the teacher's to this loss."""
        return "teacher" if self.prediction == LAST else f"teacher {self.prediction}"
