"""A kind of plugin: the experts of a teacher's block, mixed anew."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from kdzoo.api.plugin import Params, Plugin


@dataclass(frozen=True)
class Experts:
    """All experts of one block on n rows: what a fusion mixes."""

    outputs: Tensor  # [n, E, D] each expert's own output
    logits: Tensor  # [n, E] the router's
    weights: Tensor  # [n, E] what the model itself weighs each expert with, 0 where it is not routed to


class FusionParams(Params):
    """What every fusion has; a fusion with parameters of its own inherits it."""

    layer: int = -1
    """The block whose experts are fused, counted from 0, or from the end."""
    into: Literal["block", "alone"] = "block"
    """"block": the fused output takes the place of the experts' output: a shared expert and the residual stream are
    added, the final norm follows. "alone": the fused output itself is the state."""
    judge: Literal["model", "fused"] = "model"
    """Whose prediction the teacher's is, for the losses that read the fused state."""


class Fusion(Plugin):
    """Mixes the experts of a frozen teacher's block anew. It writes the site `fused.<slot>`; it trains nothing."""

    kind = "fusion"
    params_type = FusionParams
    Params: ClassVar[type[Params]] = FusionParams

    def __init__(self, params: Any) -> None:
        self.params = params

    @abstractmethod
    def fuse(self, experts: Experts) -> Tensor:
        """The fused output [n, D]; n may be 0."""

    def watch(self, experts: Experts) -> Mapping[str, Tensor]:
        """Values per row [n] whose means are logged as `fuse.<slot>/<name>`."""
        return {}
