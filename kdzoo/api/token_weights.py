"""A kind of plugin: how much each token of a response counts in a loss.

The weights of an optimizer step are made before its first backward pass, from the models as they are then, so that the
sum of all weights, which the loss is divided by, is known: it is the same however the step is split.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from kdzoo.api.batch import Side
from kdzoo.api.facts import PAIR_FACTS, TOKEN_FACTS
from kdzoo.api.plugin import Params, Plugin
from kdzoo.errors import KdzooError, did_you_mean


class TokenWeightsParams(Params):
    """What all token weights have; those with parameters of their own inherit it."""

    divide_by: Literal["weights", "tokens"] = "weights"
    """What the weighted sum is divided by, over the whole step. "weights": by the sum of all weights, so that tokens
    of weight 0 are as if they were not there. "tokens": by all tokens, whatever they weigh."""


OPTIONS = {"correct": r"[1-9]\d*", "label_logprob": r"\d+(\.\d+)?"}
"""What may stand behind the `@` of a fact: how many of the likeliest tokens count, a temperature."""


@dataclass(frozen=True)
class TokenNeeds:
    """What weights are made of."""

    facts: frozenset[str] = frozenset()
    """`student.entropy`, `student.label_logprob` (`@2.0`: at temperature 2), `student.correct` (`@5`: the gold token is
    among the first five); the same of the `teacher`; and `pair.<divergence>` between the two, with one tokenizer."""
    columns: frozenset[str] = frozenset()
    """Columns of the training rows."""
    tokenizers: Literal["any", "same"] = "any"
    """"same": the weights make sense for one tokenizer only, as all that read `pair` facts do."""

    @property
    def compares_models(self) -> bool:
        """Whether both must have one tokenizer."""
        return self.tokenizers == "same" or any(fact.startswith("pair.") for fact in self.facts)

    @property
    def reads_teacher(self) -> bool:
        return self.compares_models or any(fact.startswith("teacher.") for fact in self.facts)

    @property
    def reads_student(self) -> bool:
        return self.compares_models or any(fact.startswith("student.") for fact in self.facts)

    def unknown_fact(self) -> str | None:
        """What is wrong with the first fact that there is not."""
        for fact in sorted(self.facts):
            name, _, option = fact.partition("@")
            if name not in (*TOKEN_FACTS, *PAIR_FACTS):
                return f"no fact of tokens is called '{fact}'{did_you_mean(name, (*TOKEN_FACTS, *PAIR_FACTS))}"
            form = OPTIONS.get(name.partition(".")[2])
            if option and (form is None or not re.fullmatch(form, option)):
                return f"the fact '{name}' has no option '{option}'"
        return None


@dataclass(frozen=True)
class WeighedTokens:
    """The student's tokens of one micro-batch, as weights see them."""

    side: Side
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    """What the needs declare, [N] each. The teacher's, with two tokenizers, through spans of the same text."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] each; the value of a row on every token of it."""
    scores: Tensor | None = None
    """[N] what `score` said, in `weigh`."""
    scores_of_step: Tensor | None = None
    """The scores of all tokens of the optimizer step, over micro-batches and ranks, in any order; in `weigh`."""

    def fact(self, name: str) -> Tensor:
        """[N] a fact that the needs declare."""
        if name not in self.facts:
            raise KdzooError(f"token weights read the fact '{name}'; declare it in 'needs'")
        return self.facts[name]

    def column(self, name: str) -> Tensor:
        """[N] a column that the needs declare."""
        if name not in self.columns:
            raise KdzooError(f"token weights read the column '{name}'; declare it in 'needs'")
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.side)


@dataclass(frozen=True)
class Weights:
    """What tokens weigh."""

    values: Tensor
    """[N], not negative, without gradient."""
    temperatures: Tensor | None = None
    """[N] by which the loss sees the logits of both models divided, and by whose square its values are multiplied."""


class TokenWeights(nn.Module, Plugin):
    """How much each token counts. It trains nothing; what moves over the steps is a buffer, changed in `after_step`."""

    kind = "token_weights"
    texts = ("name", "paper", "formula")
    params_type = TokenWeightsParams
    paper: ClassVar[str]
    """Title, venue and address."""
    formula: ClassVar[str]
    """One line."""
    deviations: ClassVar[tuple[str, ...]] = ()
    """Where this differs from its authors' code, one sentence each."""
    Params: ClassVar[type[Params]] = TokenWeightsParams

    @classmethod
    def needs(cls, params: Any) -> TokenNeeds:
        """What is read, for these parameters."""
        return TokenNeeds()

    def __init__(self, params: Any) -> None:
        """For the core. A method writes `build`."""
        super().__init__()
        self.params = params
        self.build()

    def build(self) -> None:
        """Register buffers; `self.params` is there."""

    def score(self, tokens: WeighedTokens) -> Tensor | None:
        """[N] what tokens are compared by with the others of the whole step; None: with none."""
        return None

    @abstractmethod
    def weigh(self, tokens: WeighedTokens) -> Weights: ...

    def after_step(self, terms: Mapping[str, float], progress: float) -> None:
        """The optimizer has stepped. `terms`: the weighed loss's, the same on every rank; `progress`: the share of the
        stage's steps that are done, 0 to 1."""
