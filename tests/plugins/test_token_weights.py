"""What each token weighs, against formulas in float64 that go from token to token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from recordings import make_recording
from torch import Tensor

from kdzoo import Batch, ModelInfo, ModelPair, NoParams, Side, TokenWeights, WeighedTokens, Weights
from kdzoo.step.facts import facts_of, log_softmax_at
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.weighing import PAIRS, Weighed, weigh_step
from kdzoo.testing.promises.token_weights import Carrier
from kdzoo_token_weights import Column, Entropy, Verdict
from kdzoo_top_share import TopShare

V = 9
LENGTHS = [5, 1, 0, 8]


def side_of(lengths: Sequence[int], labels: Tensor) -> Side:
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    ids = torch.zeros(max(len(lengths), 1), 12, dtype=torch.long)
    nowhere = torch.zeros_like(sample)
    return Side(ids, torch.ones_like(ids), nowhere, labels, nowhere, sample, torch.arange(len(sample)))


class Tokens:
    """Random logits of both models, [N, V]."""

    def __init__(self, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = sum(lengths)
        self.lengths = list(lengths)
        self.student, self.teacher = (
            2 * torch.randn(count, V, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        self.side = side_of(lengths, torch.randint(V, (count,), generator=generator))
        self.column = torch.rand(count, generator=generator)

    def of_sequence(self, b: int) -> list[int]:
        return [i for i in range(len(self.side)) if self.side.sample[i] == b]

    def facts(self, wanted: frozenset[str]) -> dict[str, Tensor]:
        """As the core finds them."""
        found: dict[str, Tensor] = {}
        for model, logits in {"student": self.student, "teacher": self.teacher}.items():
            own = frozenset(fact for fact in wanted if fact.startswith(model))
            found |= facts_of(logits, self.side.labels, own, lambda tau, logits=logits: log_softmax_at(logits, tau))
        for fact in wanted - found.keys():
            divergence = PAIRS[fact.removeprefix("pair.")]
            found[fact] = divergence(log_softmax_at(self.teacher, 1.0), log_softmax_at(self.student, 1.0))
        return found

    def seen(self, kind: type[TokenWeights], params: Any) -> WeighedTokens:
        needs = kind.needs(params)
        return WeighedTokens(self.side, self.facts(needs.facts), dict.fromkeys(needs.columns, self.column))

    def part(self, sequences: Sequence[int]) -> Tokens:
        """These sequences alone."""
        made = Tokens([self.lengths[b] for b in sequences])
        kept = torch.tensor([i for b in sequences for i in self.of_sequence(b)], dtype=torch.long)
        made.student, made.teacher, made.column = self.student[kept], self.teacher[kept], self.column[kept]
        made.side = side_of(made.lengths, self.side.labels[kept])
        return made


def term_of(kind: type[TokenWeights], params: Any) -> LossTerm:
    model = make_recording([1], 4, V).recorded()
    pair = ModelPair(_info(model.head), _info(model.head), True, None)
    return LossTerm.of("kd", Carrier(NoParams(), pair, {}), weights=kind(params))


def _info(head: Tensor) -> ModelInfo:
    return ModelInfo(head.shape[1], head.shape[0], 1, "test")


def step(
    kind: type[TokenWeights],
    parts: Sequence[Tokens],
    gathered: Callable[[Tensor], Tensor] = lambda scores: scores,
    **given: Any,
) -> list[Weighed]:
    """What an optimizer step over these micro-batches weighs."""
    params = kind.Params(**given)
    term = term_of(kind, params)
    batches, facts = [], []
    for part in parts:
        seen = part.seen(kind, params)
        batch = Batch(part.side, part.side, torch.arange(len(part.side))[:, None].expand(-1, 2), True, {}, seen.columns)
        batches.append(batch)
        facts.append({"kd": seen.facts})
    counts = {per: sum(batch.local_counts()[per] for batch in batches) for per in batches[0].local_counts()}
    batches = [Batch(b.student, b.teacher, b.pairs, True, counts, b.columns) for b in batches]
    return [found["kd"] for found in weigh_step([term], batches, facts, gathered)]


def weights_of(kind: type[TokenWeights], tokens: Tokens, **given: Any) -> Weighed:
    (found,) = step(kind, [tokens], **given)
    return found


# The formulas


def softmax(logits: Tensor, temperature: float = 1.0) -> list[float]:
    powers = [math.exp((x - float(logits.max())) / temperature) for x in logits.tolist()]
    return [power / sum(powers) for power in powers]


def entropy(logits: Tensor) -> float:
    return -sum(p * math.log(p) for p in softmax(logits))


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def hardness(tokens: Tokens, i: int, by: str) -> float:
    p, q, gold = softmax(tokens.teacher[i]), softmax(tokens.student[i]), int(tokens.side.labels[i])
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return {
        "student_entropy": lambda: entropy(tokens.student[i]),
        "teacher_entropy": lambda: entropy(tokens.teacher[i]),
        "cross_entropy": lambda: -math.log(q[gold]),
        "teacher_cross_entropy": lambda: -math.log(p[gold]),
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "js": lambda: (kl(p, mean) + kl(q, mean)) / 2,
        "hellinger": lambda: math.sqrt(1 - sum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))),
        "total_variation": lambda: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    }[by]()


def assert_weights(found: Weighed, expected: Sequence[float]) -> None:
    torch.testing.assert_close(found.weights.values.double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("of", ["student", "teacher", "gap"])
def test_entropy_weighs_by_a_power_of_it(of, power):
    tokens = Tokens()
    expected = []
    for q, p in zip(tokens.student, tokens.teacher, strict=True):
        value = {"student": entropy(q), "teacher": entropy(p), "gap": abs(entropy(p) - entropy(q))}[of]
        expected.append(value**power)
    assert_weights(weights_of(Entropy, tokens, of=of, power=power), expected)


@pytest.mark.parametrize("of", ["student", "teacher", "gap"])
def test_entropy_above_a_threshold_weighs_one(of):
    tokens = Tokens()
    both = [(entropy(q), entropy(p)) for q, p in zip(tokens.student, tokens.teacher, strict=True)]
    value = [{"student": q, "teacher": p, "gap": abs(p - q)}[of] for q, p in both]
    above = sorted(value)[5]  # itself not above
    expected = [float(v > above) for v in value]
    assert sum(expected) == len(value) - 6
    assert_weights(weights_of(Entropy, tokens, of=of, above=above + 1e-9), expected)


def test_a_model_that_is_certain_has_an_entropy_of_zero():
    tokens = Tokens([2])
    tokens.student[0] = torch.tensor([0.0, *[-math.inf] * (V - 1)])
    found = weights_of(Entropy, tokens).weights.values
    assert found[0] == 0 and found[1] > 0


def test_a_column_is_what_the_rows_say():
    tokens = Tokens()
    assert_weights(weights_of(Column, tokens, column="sure"), tokens.column.tolist())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("keep", ["right", "wrong"])
def test_a_soft_verdict_is_the_teachers_probability_of_the_gold_token(keep, temperature):
    tokens = Tokens()
    right = [softmax(z, temperature)[int(y)] for z, y in zip(tokens.teacher, tokens.side.labels, strict=True)]
    found = weights_of(Verdict, tokens, keep=keep, indicator="soft", temperature=temperature)
    assert_weights(found, right if keep == "right" else [1 - p for p in right])


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("keep", ["right", "wrong"])
def test_a_hard_verdict_says_whether_the_gold_token_is_among_the_first(keep, top_k):
    tokens = Tokens()
    right = [
        float(sum(x > float(z[y]) for x in z.tolist()) < top_k)
        for z, y in zip(tokens.teacher, tokens.side.labels, strict=True)
    ]
    assert 0 < sum(right) < len(right)
    found = weights_of(Verdict, tokens, keep=keep, top_k=top_k)
    assert_weights(found, right if keep == "right" else [1 - r for r in right])


BY = TopShare.Params.model_fields["by"].annotation.__args__


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("share", [0.2, 0.55, 1.0])
def test_the_hardest_of_each_sequence_are_kept(by, share):
    tokens = Tokens()
    expected = [0.0] * len(tokens.side)
    for b, length in enumerate(LENGTHS):
        hardest = sorted(tokens.of_sequence(b), key=lambda i: -hardness(tokens, i, by))
        for i in hardest[: math.ceil(length * share)]:
            expected[i] = 1.0
    assert_weights(weights_of(TopShare, tokens, by=by, share=share), expected)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_hardest_of_the_step_are_kept(by, share):
    tokens = Tokens()
    hardest = sorted(range(len(tokens.side)), key=lambda i: -hardness(tokens, i, by))
    kept = set(hardest[: math.ceil(len(hardest) * share)])
    expected = [float(i in kept) for i in range(len(hardest))]
    assert_weights(weights_of(TopShare, tokens, by=by, share=share, among="step"), expected)


def test_a_share_of_a_sequence_is_counted_as_python_counts():
    for length, share in [(25, 0.6), (50, 0.3), (25, 0.56), (10, 0.1), (3, 1.0)]:
        found = weights_of(TopShare, Tokens([length, 1]), share=share).weights.values
        assert found.tolist().count(1.0) == math.ceil(length * share) + 1, (length, share)


@pytest.mark.parametrize(("among", "kept"), [("sequence", [1, 1, 0, 0]), ("step", [1, 1, 1, 1])])
def test_of_ties_the_first_of_a_sequence_are_kept_and_all_of_a_step(among, kept):
    tokens = Tokens([4])
    tokens.student[:] = tokens.student[0]
    assert_weights(weights_of(TopShare, tokens, share=0.5, among=among), kept)


CASES: list[tuple[type[TokenWeights], dict[str, Any]]] = [
    (Entropy, {"of": "gap"}),
    (Column, {}),
    (Verdict, {"indicator": "soft"}),
    (TopShare, {"share": 0.4}),
    (TopShare, {"share": 0.4, "among": "step", "by": "hellinger"}),
]


@pytest.mark.parametrize(("kind", "given"), CASES)
@pytest.mark.parametrize("divide_by", ["weights", "tokens"])
def test_micro_batches_weigh_and_divide_as_the_whole_step_does(kind, given, divide_by):
    tokens = Tokens()
    whole = weights_of(kind, tokens, divide_by=divide_by, **given)
    parts = step(kind, [tokens.part([0]), tokens.part([1, 2]), tokens.part([3])], divide_by=divide_by, **given)
    assert_weights(whole, torch.cat([part.weights.values for part in parts]).tolist())
    total = float(whole.weights.values.double().sum()) if divide_by == "weights" else len(tokens.side)
    for found in (whole, *parts):
        assert found.counts["tokens"] == found.counts["pairs"] == found.counts["spans"] == pytest.approx(total)


def test_ranks_compare_their_tokens_with_all_of_the_step():
    tokens, given = Tokens(), {"share": 0.4, "among": "step", "by": "js"}
    whole = weights_of(TopShare, tokens, **given).weights.values
    ranks = [[tokens.part([0]), tokens.part([1])], [tokens.part([2]), tokens.part([3])]]
    said: list[Tensor] = []
    for rank in ranks:  # what each hands to the others
        step(TopShare, rank, lambda scores: said.append(scores) or scores, **given)
    found = [part.weights.values for rank in ranks for part in step(TopShare, rank, lambda _: torch.cat(said), **given)]
    torch.testing.assert_close(torch.cat(found), whole)


@pytest.mark.parametrize(("kind", "given"), CASES)
@pytest.mark.parametrize("lengths", [[1], [0], []])
def test_one_token_or_none_are_weighed(kind, given, lengths):
    found = weights_of(kind, Tokens(lengths), **given)
    assert found.weights.values.shape == (sum(lengths),) and found.weights.values.isfinite().all()
    assert all(math.isfinite(count) for count in found.counts.values())


def test_sequences_are_divided_by_the_sum_of_their_mean_weights():
    tokens = Tokens()
    found = weights_of(Column, tokens)
    means = [sum(tokens.column[i].item() for i in tokens.of_sequence(b)) / n for b, n in enumerate(LENGTHS) if n]
    assert found.counts["sequences"] == pytest.approx(sum(means))
    assert found.on("sequences", 4).tolist() == pytest.approx([*means[:2], 1.0, means[2]])


def test_weights_of_no_score_are_compared_with_none():
    assert TokenWeights.score(Column(Column.Params()), Tokens().seen(Column, Column.Params())) is None
    assert Weights(torch.ones(2)).temperatures is None


def test_the_hardest_of_a_sequence_ask_nothing_of_other_ranks():
    def gathered(scores: Tensor) -> Tensor:
        raise AssertionError("scores of the step are nobody's business here")

    step(TopShare, [Tokens()], gathered)
