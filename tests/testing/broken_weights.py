"""Token weights that are wrong on purpose, each in one way that the conformance kit must find."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdzoo import TokenNeeds, TokenWeights, WeighedTokens, Weights, hookimpl


class Broken(TokenWeights):
    """The student's entropy, before it is broken."""

    paper = formula = "none"

    @classmethod
    def needs(cls, params):
        return TokenNeeds(frozenset({"student.entropy"}))

    def weigh(self, tokens: WeighedTokens) -> Weights:
        return Weights(self.of_entropy(tokens.fact("student.entropy"), tokens))

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        return entropy


class NoSuchFact(Broken):
    """Asks for a fact that there is not."""

    name = "no_such_fact"

    @classmethod
    def needs(cls, params):
        return TokenNeeds(frozenset({"student.entropie"}))


class UndeclaredFact(Broken):
    """Reads a fact that it does not declare."""

    name = "undeclared_fact"

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        return entropy + tokens.fact("teacher.entropy")


class Trains(Broken):
    """Has a parameter, which no loss ever gives a gradient."""

    name = "trains"

    def build(self):
        self.scale = nn.Linear(1, 1)


class OnePerSpan(Broken):
    """Takes it that every token is a span of its own."""

    name = "one_per_span"

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        return entropy[: len(tokens.side.span.unique())]


class Negative(Broken):
    """Pushes the student away from what it is sure of."""

    name = "negative"

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        return 1 - entropy


class UnreadFact(Broken):
    """Declares a fact that it does not read: it costs a pass of the student."""

    name = "unread_fact"

    @classmethod
    def needs(cls, params):
        return TokenNeeds(frozenset({"student.entropy", "student.correct"}))


class UnreadColumn(Broken):
    """Declares a column that it does not read: rows without it would be refused."""

    name = "unread_column"

    @classmethod
    def needs(cls, params):
        return TokenNeeds(frozenset({"student.entropy"}), frozenset({"weight"}))


class NeedsTokens(Broken):
    """Asks for the largest of none."""

    name = "needs_tokens"

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        return entropy * (entropy.max() > 0)


class ByWidth(Broken):
    """Weighs by how far the batch is padded."""

    name = "by_width"

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        return entropy + tokens.side.input_ids.shape[1]


class AboveTheMean(Broken):
    """Compares tokens with those of their micro-batch."""

    name = "above_the_mean"

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        return (entropy - entropy.sum() / max(len(entropy), 1)).relu()


class ByPlace(Broken):
    """Weighs a sequence by its place in the batch."""

    name = "by_place_of_sequence"

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        return entropy * (1 + tokens.side.sample % 2)


class Forgets(Broken):
    """Follows the loss with a plain attribute, which no checkpoint keeps."""

    name = "forgets_weights"

    def build(self):
        self.power = 1.0

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        return entropy**self.power

    def after_step(self, terms, progress):
        self.power = 0.9 * self.power + 0.1 * terms["cross_entropy"]


class MovesWithinSteps(Broken):
    """Moves a buffer with every micro-batch, of which ranks and settings have different numbers."""

    name = "moves_weights_within_steps"

    def build(self):
        self.register_buffer("seen", torch.zeros(()))

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        self.seen += len(entropy)
        return entropy


class OnTheFirstRank(Broken):
    """Weighs on the first rank only."""

    name = "weighs_on_the_first_rank"

    def of_entropy(self, entropy: Tensor, tokens: WeighedTokens) -> Tensor:
        elsewhere = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        return entropy * (0.0 if elsewhere else 1.0)


BROKEN = (
    NoSuchFact,
    UndeclaredFact,
    Trains,
    OnePerSpan,
    Negative,
    UnreadFact,
    UnreadColumn,
    NeedsTokens,
    ByWidth,
    AboveTheMean,
    ByPlace,
    Forgets,
    MovesWithinSteps,
    OnTheFirstRank,
)


@hookimpl
def register_plugins(register):
    for weights in BROKEN:
        register(weights)
