"""AdaKD: which tokens are kept, at which temperatures, and how the share moves, against loops over tokens and steps."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from test_token_weights import Tokens, hardness, softmax, weights_of
from torch import Tensor

from kdzoo import WeighedTokens
from kdzoo.testing import Recorded, replay
from kdzoo_adakd import Adaptive
from kdzoo_divergences import ForwardKL, ReverseKL

BY = ["hellinger", "forward_kl", "reverse_kl", "js"]


def made(share: float = 1.0, **given: Any) -> Adaptive:
    weights = Adaptive(Adaptive.Params(**given))
    weights.share.fill_(share)
    return weights


def seen(scores: Tensor, of_step: Tensor | None = None) -> WeighedTokens:
    side = Tokens([len(scores)]).side
    return WeighedTokens(side, scores=scores, scores_of_step=scores if of_step is None else of_step)


def expected(
    scores: list[float], share: float, base: float, scale: float, sign: int
) -> tuple[list[float], list[float]]:
    """Weights and temperatures: the hardest floor(share n), the lower median of which is the middle."""
    kept = sorted(scores, reverse=True)[: max(1, int(len(scores) * share))]
    middle = statistics.median_low(kept)
    return (
        [float(score >= kept[-1]) for score in scores],
        [base * math.exp(sign * scale * math.tanh(math.log(max(score / middle, 1e-8)))) for score in scores],
    )


@pytest.mark.parametrize("by", BY)
def test_at_first_every_token_counts_and_hard_ones_have_low_temperatures(by):
    tokens = Tokens()
    scores = [hardness(tokens, i, by) for i in range(len(tokens.side))]
    found = weights_of(Adaptive, tokens, by=by).weights
    weights, temperatures = expected(scores, 1.0, 1.0, 0.5, -1)
    assert found.values.tolist() == weights == [1.0] * len(scores)
    torch.testing.assert_close(found.temperatures, torch.tensor(temperatures, dtype=torch.float64))
    assert temperatures[scores.index(max(scores))] == min(temperatures)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.93])
@pytest.mark.parametrize(("direction", "sign"), [("inverse", -1), ("direct", 1)])
@pytest.mark.parametrize(("base", "scale"), [(1.0, 0.5), (2.0, 0.3)])
def test_a_share_of_the_hardest_is_kept_and_compared_with_their_median(share, direction, sign, base, scale):
    scores = torch.rand(14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = made(share, temperature=base, temperature_scale=scale, direction=direction).weigh(seen(scores))
    weights, temperatures = expected(scores.tolist(), share, base, scale, sign)
    assert found.values.tolist() == weights
    torch.testing.assert_close(found.temperatures, torch.tensor(temperatures, dtype=torch.float64))


def test_without_a_scale_all_have_the_base_temperature():
    found = made(temperature=2.0, temperature_scale=0.0).weigh(seen(torch.rand(5)))
    assert found.temperatures.tolist() == [2.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "scores",
    [[0.0, 0.0, 0.0], [0.5], [0.0], [], [0.3, 0.3, 0.3], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0, 1e-30]],
)
def test_models_that_agree_and_few_tokens_leave_everything_finite(scores, dtype):
    found = made(0.5).weigh(seen(torch.tensor(scores, dtype=dtype)))
    assert found.values.shape == found.temperatures.shape == (len(scores),)
    tau = found.temperatures
    assert ((tau >= math.exp(-0.5) * (1 - 1e-6)) & (tau <= math.exp(0.5) * (1 + 1e-6))).all()
    assert bool(scores) == bool(found.values.any())


def test_a_micro_batch_is_compared_with_the_whole_step():
    scores = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = made(0.4).weigh(seen(scores))
    parts = [made(0.4).weigh(seen(part, scores)) for part in scores.split([5, 0, 7])]
    assert torch.cat([part.values for part in parts]).equal(whole.values)
    assert torch.cat([part.temperatures for part in parts]).equal(whole.temperatures)


# The share


def authors_trainer(
    losses: list[float], total: int, decay: float, eps: float, change: float, warmup: float, least: float
):
    """`finetune` of the authors' trainer: the ratio that each step is trained with, and the one after the last."""
    ratio, ema, reference = 1.0, None, None
    ratios = [ratio]
    for step, loss in enumerate(losses, start=1):
        ema = loss if ema is None else decay * ema + (1 - decay) * loss
        if reference is not None:
            fallen, margin = reference - ema, reference * eps
            if fallen < -margin:
                ratio, reference = min(ratio * (1 + change), 1.0), ema
            elif fallen > margin:
                ratio, reference = max(ratio * (1 - change), least), ema
        elif step > warmup * total:
            reference = ema
        ratios.append(ratio)
    return ratios


def wave(steps: int) -> list[float]:
    """A loss that falls, rises and falls again."""
    return [2.0 + math.cos(step / 9) + 0.1 * math.sin(7 * step) for step in range(steps)]


@pytest.mark.parametrize(
    "given",
    [
        {"decay": 0.5, "tolerance": 0.05, "change": 0.05, "warmup": 0.05, "least": 0.1},
        {"decay": 0.9, "tolerance": 0.02, "change": 0.3, "warmup": 0.2, "least": 0.25},
        {"decay": 0.0, "tolerance": 0.2, "change": 0.1, "warmup": 0.0, "least": 0.8},
        {"decay": 0.99, "tolerance": 0.05, "change": 0.05, "warmup": 0.05, "least": 0.1},
        {"decay": 0.5, "tolerance": 0.05, "change": 0.0, "warmup": 0.05, "least": 0.1},
    ],
)
def test_the_share_moves_as_in_the_authors_trainer(given):
    losses, weights = wave(120), Adaptive(Adaptive.Params(**given))
    names = {"tolerance": "eps"}
    theirs = authors_trainer(losses, 120, **{names.get(name, name): value for name, value in given.items()})
    found = [float(weights.share)]
    for number, loss in enumerate(losses, start=1):
        # The trainer knows the loss as the sum of its terms.
        weights.after_step({"reverse_kl": loss - 0.5, "other": 0.5}, number / 120)
        found.append(float(weights.share))
    assert found == pytest.approx(theirs, rel=1e-12)
    assert given["change"] == 0 or given["decay"] == 0.99 or len(set(theirs)) > 3


def test_it_goes_on_from_a_checkpoint():
    losses = wave(60)
    one = made(decay=0.5)
    for number, loss in enumerate(losses[:30], start=1):
        one.after_step({"kd": loss}, number / 60)
    other = made(decay=0.5)
    other.load_state_dict(one.state_dict())
    for number, loss in enumerate(losses[30:], start=31):
        for weights in (one, other):
            weights.after_step({"kd": loss}, number / 60)
        assert one.share.equal(other.share) and one.average.equal(other.average)
    assert float(one.share) < 1


def test_a_loss_of_zero_is_no_division_by_zero():
    weights = made(0.5, warmup=0.0, decay=0.0)
    for loss in (0.0, 0.0, 0.0):
        weights.after_step({"kd": loss}, 0.5)
    assert float(weights.share) == 0.5
    weights.after_step({"kd": 0.1}, 0.9)
    assert float(weights.share) == pytest.approx(0.525)


# The loss


def divergence(kind: type, z_teacher: Tensor, z_student: Tensor, tau: float) -> Tensor:
    log_p, log_q = (torch.log_softmax(z / tau, -1) for z in (z_teacher, z_student))
    first, second = (log_p, log_q) if kind is ForwardKL else (log_q, log_p)
    return (first.exp() * (first - second)).sum()


@pytest.mark.parametrize("kind", [ForwardKL, ReverseKL])
@pytest.mark.parametrize("own", [1.0, 2.0])
def test_the_loss_is_the_mean_of_tempered_divergences_in_value_and_gradient(kind, own):
    tokens = Tokens([4, 3])
    labels = torch.full((2, 4), -100)
    labels[0], labels[1, :3] = tokens.side.labels[:4], tokens.side.labels[4:]
    student, teacher = (torch.zeros(2, 4, tokens.student.shape[1], dtype=torch.float64) for _ in range(2))
    for padded, packed in ((student, tokens.student), (teacher, tokens.teacher)):
        padded[labels != -100] = packed
    student.requires_grad_()
    found = replay(
        {"kd": (kind, {"temperature": own}, 0.5)},
        Recorded(labels, logits=student.detach()),
        Recorded(labels, logits=teacher),
        same_tokens=True,
        token_weights={"kd": (Adaptive, {"temperature": 1.5}, {"share": torch.tensor(0.6)})},
        chunk_bytes=100,
    )
    scores = [hardness(tokens, i, "hellinger") for i in range(7)]
    weights, temperatures = expected(scores, 0.6, 1.5, 0.5, -1)
    loss = torch.zeros((), dtype=torch.float64)
    z_teacher, z_student = teacher[labels != -100], student[labels != -100]
    for i, (weight, tau) in enumerate(zip(weights, temperatures, strict=True)):
        loss = loss + weight * tau**2 * divergence(kind, z_teacher[i], z_student[i], tau * own)
    loss = 0.5 * loss / sum(weights)
    assert sum(weights) == 4
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.watched["kd/token_temperature"].item(), statistics.mean(temperatures))
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(found.gradients["student_hidden"], gradient)
    assert softmax(tokens.student[0]) != softmax(tokens.teacher[0])
