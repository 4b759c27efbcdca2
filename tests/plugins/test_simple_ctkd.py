from __future__ import annotations

from typing import Any

import pytest
import torch
from recordings import Recording, V, W, assert_same, make_models, make_pair, seen
from torch import Tensor

from kdzoo import KdzooError
from kdzoo.testing import Replay, replay
from kdzoo_divergences import ForwardKL
from kdzoo_simple_ctkd import SimpleCTKD

SHARED = {0: 3, 2: 7, 3: 0, 7: 8, 10: 1}
"""Teacher's entry -> the student's that says the same."""
PAIRS = [(0, 0), (2, 1), (3, 2), (4, 3), (5, 4), (9, 8)]
"""The student's tokens and the teacher's, counted over all sequences."""


def partners(shared: dict[int, int] = SHARED, w: int = W) -> Tensor:
    return torch.tensor([shared.get(entry, -1) for entry in range(w)])


def run(student: Recording, teacher: Recording, **params: Any) -> Replay:
    return replay(
        {"kd": (SimpleCTKD, params, 1.0)},
        student.recorded(),
        teacher.recorded(),
        same_tokens=False,
        pairs=PAIRS,
        student_ids=partners(),
        chunk_bytes=400,
    )


def leaves(student: Recording) -> dict[str, Tensor]:
    return {"student_hidden": student.hidden, "student_head": student.head}


def every_logit(side: Recording) -> Tensor:
    return torch.cat([side.logits(b) for b in range(len(side))])


def restricted(logits: Tensor, entries: list[int], tau: float, rest: str) -> Tensor:
    """One token's probabilities of the entries, by their odds."""
    odds = (logits / tau).exp()
    if rest == "one_entry":
        others = [entry for entry in range(len(logits)) if entry not in entries]
        odds = torch.cat([odds[entries], odds[others].sum()[None]])
    else:
        odds = odds[entries]
    return odds / odds.sum()


def divergence(p: Tensor, q: Tensor, params: dict[str, Any]) -> Tensor:
    match params.get("divergence", "forward_kl"):
        case "forward_kl":
            return (p * (p / q).log()).sum()
        case "reverse_kl":
            return (q * (q / p).log()).sum()
        case "js":
            m = (p + q) / 2
            return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
        case "skew_reverse_kl":
            m = (1 - params["skew"]) * p + params["skew"] * q
            return (q * (q / m).log()).sum()
        case "total_variation":
            return (p - q).abs().sum() / 2
        case other:
            raise AssertionError(other)


def formula(student: Recording, teacher: Recording, **params: Any) -> Tensor:
    z, y = every_logit(student), every_logit(teacher).detach()
    tau, rest = params.get("temperature", 1.0), params.get("rest", "dropped")
    total = torch.zeros(()).double()
    for s, t in PAIRS:
        p = restricted(y[t], list(SHARED), tau, rest)
        q = restricted(z[s], list(SHARED.values()), tau, rest)
        total = total + divergence(p, q, params)
    return total / (len(z) if params.get("mean") == "tokens" else len(PAIRS))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 2.0},
        {"mean": "tokens"},
        {"rest": "one_entry"},
        {"rest": "one_entry", "mean": "tokens", "temperature": 0.5},
        {"divergence": "reverse_kl"},
        {"divergence": "js", "rest": "one_entry"},
        {"divergence": "skew_reverse_kl", "skew": 0.3},
        {"divergence": "total_variation", "mean": "tokens"},
    ],
)
def test_it_is_the_formula_in_value_and_gradient(params):
    student, teacher = make_models(same_tokens=False)
    assert_same(run(student, teacher, **params), formula(student, teacher, **params), leaves(student))


def test_the_preset_divides_by_tokens():
    student, teacher = make_models(same_tokens=False)
    assert run(student, teacher, preset="kdflow@3a7a21a").loss == run(student, teacher, mean="tokens").loss


def test_the_shared_mass_is_that_of_the_teacher():
    student, teacher = make_models(same_tokens=False)
    mass = every_logit(teacher).softmax(-1)[[t for _, t in PAIRS]][:, list(SHARED)].sum(-1).mean()
    for mean in ("pairs", "tokens"):
        found = run(student, teacher, mean=mean, temperature=2.0)
        torch.testing.assert_close(found.watched["kd/shared_mass"], mass)


@pytest.mark.parametrize("params", [{}, {"mean": "tokens"}, {"rest": "one_entry"}])
def test_with_one_tokenizer_it_is_the_forward_kl(params):
    student, teacher = make_models(same_tokens=True)

    def found(loss: Any, **given: Any) -> Replay:
        slot = {"kd": (loss, {"temperature": 2.0, **given}, 1.0)}
        return replay(slot, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=400)

    ours, plain = found(SimpleCTKD, **params), found(ForwardKL)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-12, atol=1e-12)
    for name in ("student_hidden", "student_head"):
        torch.testing.assert_close(ours.gradients[name], plain.gradients[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.watched["kd/shared_mass"], torch.ones(()).double())


@pytest.mark.parametrize("params", [{}, {"mean": "tokens"}, {"rest": "one_entry"}])
def test_without_pairs_it_is_zero(params):
    student, teacher = make_models(same_tokens=False)
    found = replay(
        {"kd": (SimpleCTKD, params, 1.0)},
        student.recorded(),
        teacher.recorded(),
        same_tokens=False,
        student_ids=partners(),
    )
    assert found.loss == 0 and not any(gradient.any() for gradient in found.gradients.values())


def test_vocabularies_without_a_shared_entry_are_refused():
    pair = make_pair(V, W, torch.full((W,), -1), same_tokens=False, entries="same_text")
    with pytest.raises(KdzooError, match=r"^the vocabularies of student and teacher share no entry; take a loss that"):
        SimpleCTKD(SimpleCTKD.Params(), pair, {})


@pytest.mark.parametrize("rest", ["dropped", "one_entry"])
def test_excluded_entries_leave_it_finite(rest):
    """By a logit of -inf: of the student, of the teacher, of both, shared or not."""
    pair = make_pair(V, W, partners(), same_tokens=False, entries="same_text")
    loss = SimpleCTKD(SimpleCTKD.Params(rest=rest), pair, {})
    torch.manual_seed(0)
    z, y = torch.randn(3, V).double(), torch.randn(3, W).double()
    y[:, [0, 1, 4]] = z[:, [3, 2]] = -torch.inf
    y[1, 2], z[2, 0] = -torch.inf, -torch.inf
    z.requires_grad_()
    value = loss.pairs(**seen(student=z, teacher=y)).sums["divergence"][0]
    (gradient,) = torch.autograd.grad(value, z)
    assert value.isfinite() and value > 0 and gradient.isfinite().all()
