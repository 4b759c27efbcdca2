from __future__ import annotations

from typing import Any

import pytest
import torch
from recordings import Recording, V, assert_same, make_models, make_pair, seen
from torch import Tensor

from kdzoo import Loss
from kdzoo.testing import Replay, replay
from kdzoo_ranking import Ranking, Top1CE


def run(loss: type[Loss], student: Recording, teacher: Recording, **params: Any) -> Replay:
    slot = {"kd": (loss, params, 1.0)}
    return replay(slot, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=400)


def leaves(student: Recording) -> dict[str, Tensor]:
    return {"student_hidden": student.hidden, "student_head": student.head}


def every_row(student: Recording, teacher: Recording, tau: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    return [
        ((y / tau).softmax(-1).detach(), (z / tau).softmax(-1))
        for b in range(len(student))
        for z, y in zip(student.logits(b), teacher.logits(b), strict=True)
    ]


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_top1_ce_is_the_formula_in_value_and_gradient(tau):
    student, teacher = make_models(same_tokens=True)
    rows = every_row(student, teacher, tau)
    loss = -torch.stack([p.max() * q[int(p.argmax())].log() for p, q in rows]).mean()
    assert_same(run(Top1CE, student, teacher, temperature=tau), loss, leaves(student))


def test_a_token_that_the_student_excludes_costs_100_nats():
    z, y = torch.zeros(1, 4).double(), torch.tensor([[0.0, 9.0, 0.0, 0.0]]).double()
    z[0, 1] = -torch.inf
    value = Top1CE(Top1CE.Params(), make_pair(4, 4), {}).tokens(**seen(student=z, teacher=y)).values["top1_ce"][0]
    torch.testing.assert_close(value, 100 * y.softmax(-1)[:, 1])


def ranked(p: Tensor, q: Tensor, k: int, asks: str) -> Tensor:
    """By the places of sorted tokens, one comparison at a time."""
    t, s = (sorted(range(len(x)), key=lambda entry: -float(x[entry]))[:k] for x in (p, q.detach()))
    total = torch.zeros(()).double()
    for a, of_teacher in enumerate(t):
        total = total + torch.relu(q[of_teacher] - q[t[0]])
        for of_student in s:
            before = p[of_teacher] if asks == "teacher" else q[s[a]].detach()
            if before > p[of_student]:
                total = total + torch.relu(q[of_student] - q[of_teacher])
    return total


@pytest.mark.parametrize("asks", ["teacher", "both"])
@pytest.mark.parametrize("k", [1, 3, 5, 99])
def test_ranking_is_the_formula_in_value_and_gradient(k, asks):
    student, teacher = make_models(same_tokens=True)
    values = [ranked(p, q, min(k, len(p)), asks) for p, q in every_row(student, teacher)]
    assert_same(run(Ranking, student, teacher, k=k, asks=asks), torch.stack(values).mean(), leaves(student))


def test_the_two_readings_differ():
    student, teacher = make_models(same_tokens=True)
    assert run(Ranking, student, teacher).loss != run(Ranking, student, teacher, asks="both").loss


def test_presets_are_their_parameters():
    assert Ranking.Params(preset="nmt-kd@e01c09c").k == 10
    assert Ranking.Params(preset="kdflow@3a7a21a").asks == "both"


@pytest.mark.parametrize("asks", ["teacher", "both"])
def test_ranking_is_zero_where_both_models_rank_alike(asks):
    """Whatever the probabilities are, where the teacher alone is asked."""
    student, _ = make_models(same_tokens=True)
    z = torch.cat([student.logits(b) for b in range(len(student))]).detach().requires_grad_()
    y = z.detach() * (3.0 if asks == "teacher" else 1.0)
    terms = Ranking(Ranking.Params(asks=asks), make_pair(V, V), {}).tokens(**seen(student=z, teacher=y)).values
    assert not any(term.value.any() for term in terms.values())
    (gradient,) = torch.autograd.grad(sum(term.value.sum() for term in terms.values()), z)
    assert not gradient.any()
