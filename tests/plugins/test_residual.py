from __future__ import annotations

from typing import Any

import pytest
import torch
from recordings import D, Recording, S, V, assert_same, make_models, make_right, make_weights, nll
from torch import Tensor

from kdzoo import KdzooError
from kdzoo.testing import Replay, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_residual import Projectors, Residual

A = 3
SHAPES = {"residual.low_to_student.weight": (S, A)}
QUERY = {"residual.student_to_low.weight": (A, S)}
STAGE_1 = {"projectors.teacher_to_low.weight": (A, D), "projectors.low_to_teacher.weight": (D, A)}


def run(
    student: Recording,
    teacher: Recording,
    p_ta: Tensor,
    weights: dict[str, Tensor],
    same: bool,
    chunk_bytes: int = 200,
    **params: Any,
) -> Replay:
    return replay(
        {"residual": (Residual, params, 1.0)},
        student.recorded(),
        teacher.recorded(),
        weights={name: weight.detach() for name, weight in weights.items()},
        artefacts={"projectors": {"teacher_to_low.weight": p_ta}},
        same_tokens=same,
        chunk_bytes=chunk_bytes,
    )


def leaves(student: Recording, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"student_hidden": student.hidden, "student_head": student.head, **weights}


def normalised(x: Tensor, how: str) -> Tensor:
    if how == "std":
        return x / x.std(-1, keepdim=True)
    return A**0.5 * x / x.norm(dim=-1, keepdim=True) if how == "l2" else x


def by_bytes(student: Recording, teacher: Recording, b: int) -> Tensor:
    """Wrong where a student row's span holds a wrong teacher row."""
    assert student.chunks is not None and teacher.chunks is not None
    mine, theirs = student.chunks[b, student.rows(b)], teacher.chunks[b, teacher.rows(b)]
    return torch.stack([(theirs[teacher.wrong(b)] & row).any() for row in mine])


def residual_loss(
    student: Recording,
    teacher: Recording,
    p_ta: Tensor,
    weights: dict[str, Tensor],
    same: bool,
    *,
    beta: str | float = "sequence",
    beta_gradient: bool = False,
    state_gradient: bool = True,
    normalise: str = "std",
    wrong: str = "by_bytes",
    **_: Any,
) -> Tensor:
    """The formulas, sequence by sequence."""
    states, targets, masks, us = [], [], [], []
    for b in range(len(student)):
        h, z = student.hidden[b, student.rows(b)], teacher.hidden[b, teacher.rows(b)] @ p_ta.T
        mask = teacher.wrong(b)
        if not same:
            q, k = normalised(h @ weights["residual.student_to_low.weight"].T, normalise), normalised(z, normalise)
            a = (q @ k.T / A**0.5).softmax(-1)
            z = a @ z
            verdict = (a @ mask.double()) > 0.5
            mask = verdict if wrong == "attention" else by_bytes(student, teacher, b)
        states.append(h)
        us.append(z @ weights["residual.low_to_student.weight"].T)
        targets.append(student.gold(b))
        masks.append(mask)

    def scale(h: Tensor, u: Tensor) -> Tensor:
        return (S / A) ** 0.5 * (h.norm(dim=-1) / u.norm(dim=-1))

    total, rows = torch.zeros(()).double(), 0
    for h, u, gold, mask in zip(states, us, targets, masks, strict=True):
        if beta == "sequence":
            factor = scale(h, u).mean().expand(len(h))
        elif beta == "row":
            factor = scale(h, u)
        elif beta == "batch":
            factor = scale(torch.cat(states), torch.cat(us)).mean().expand(len(h))
        else:
            factor = torch.full((len(h),), 1.0 if beta == "none" else float(beta), dtype=torch.float64)
        factor = factor if beta_gradient else factor.detach()
        base = h if state_gradient else h.detach()
        r = torch.where(mask[:, None], base - factor[:, None] * u, h)
        total = total + nll(r @ student.head.T, gold).sum()
        rows += len(gold)
    return total / rows


def make_mixed(same: bool) -> tuple[Recording, Recording]:
    student, teacher = make_models(same)
    make_right(teacher, lambda b, i: (b + i) % 2 == 0, student if same else None)
    return student, teacher


@pytest.mark.parametrize("beta", ["sequence", "row", "batch", "none", 0.7])
@pytest.mark.parametrize("beta_gradient", [False, True])
@pytest.mark.parametrize("same", [True, False])
def test_beta_in_every_scope(beta, beta_gradient, same):
    student, teacher = make_mixed(same)
    weights = make_weights(SHAPES if same else SHAPES | QUERY)
    p_ta = torch.randn(A, D).double()
    params = {"beta": beta, "beta_gradient": beta_gradient}
    found = run(student, teacher, p_ta, weights, same, width=A, **params)
    assert 0 < found.watched["residual/wrong_share"] < 1
    assert_same(found, residual_loss(student, teacher, p_ta, weights, same, **params), leaves(student, weights))


@pytest.mark.parametrize("wrong", ["by_bytes", "attention"])
@pytest.mark.parametrize("normalise", ["std", "l2", "none"])
def test_two_tokenizers(wrong, normalise):
    student, teacher = make_mixed(same=False)
    weights = make_weights(SHAPES | QUERY)
    p_ta = torch.randn(A, D).double()
    params = {"wrong": wrong, "normalise": normalise}
    found = run(student, teacher, p_ta, weights, False, **params)
    assert 0 < found.watched["residual/wrong_share"] < 1
    assert_same(found, residual_loss(student, teacher, p_ta, weights, False, **params), leaves(student, weights))


def test_the_body_does_not_learn_from_wrong_rows_without_state_gradient():
    student, teacher = make_mixed(same=True)
    weights, p_ta = make_weights(SHAPES), torch.randn(A, D).double()
    found = run(student, teacher, p_ta, weights, True, state_gradient=False)
    expected = residual_loss(student, teacher, p_ta, weights, True, state_gradient=False)
    assert_same(found, expected, leaves(student, weights))
    for b in range(len(student)):
        wrong = student.rows(b).nonzero()[:, 0][teacher.wrong(b)]
        assert (found.gradients["student_hidden"][b, wrong] == 0).all()


def test_the_head_does_not_learn_from_any_row_without_head_gradient():
    student, teacher = make_mixed(same=True)
    weights, p_ta = make_weights(SHAPES), torch.randn(A, D).double()
    found = run(student, teacher, p_ta, weights, True, head_gradient=False)
    full = run(student, teacher, p_ta, weights, True)
    for name in ("student_hidden", "residual.low_to_student.weight"):
        torch.testing.assert_close(found.gradients[name], full.gradients[name])
    torch.testing.assert_close(found.loss, full.loss)
    assert (found.gradients.get("student_head", torch.zeros(1)) == 0).all()


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("wrong", ["by_bytes", "attention"])
def test_where_the_teacher_is_all_right_it_is_cross_entropy_to_the_bit(same, wrong):
    student, teacher = make_models(same)
    make_right(teacher, lambda b, i: True, student if same else None)
    weights = make_weights(SHAPES if same else SHAPES | QUERY)
    # In one chunk: beside a teacher, chunks are smaller, and the head's gradient is summed in another order.
    found = run(student, teacher, torch.randn(A, D).double(), weights, same, chunk_bytes=2**20, wrong=wrong)
    sides = student.recorded(), teacher.recorded()
    plain = replay({"sft": (CrossEntropy, {}, 1.0)}, *sides, same_tokens=same, chunk_bytes=2**20)
    assert found.loss == plain.loss
    for name in ("student_hidden", "student_head"):
        assert torch.equal(found.gradients[name], plain.gradients[name])
    assert all((found.gradients[name] == 0).all() for name in weights)
    assert found.watched["residual/wrong_share"] == 0


@pytest.mark.parametrize("same", [True, False])
def test_where_the_teacher_is_all_wrong_every_row_has_a_residual(same):
    student, teacher = make_models(same)
    make_right(teacher, lambda b, i: False, student if same else None)
    weights = make_weights(SHAPES if same else SHAPES | QUERY)
    p_ta = torch.randn(A, D).double()
    found = run(student, teacher, p_ta, weights, same)
    assert_same(found, residual_loss(student, teacher, p_ta, weights, same), leaves(student, weights))
    assert found.terms["residual/right_rows"] == 0
    assert found.watched["residual/wrong_share"] == 1


@pytest.mark.parametrize("beta_gradient", [False, True])
@pytest.mark.parametrize("beta", ["sequence", "row", "batch", "none"])
def test_rows_without_direction_have_no_residual_and_no_part_in_beta(beta, beta_gradient):
    student, teacher = make_models(True)
    make_right(teacher, lambda b, i: False, student)
    weights, p_ta = make_weights(SHAPES), torch.randn(A, D).double()
    teacher.hidden[0, 2] = 0  # the first row of the first sequence: z, and so u, is zero
    teacher.hidden[1] = 0  # the second sequence has no direction at all
    make_right(teacher, lambda b, i: False, student)
    found = run(student, teacher, p_ta, weights, True, beta=beta, beta_gradient=beta_gradient)
    assert found.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())
    assert found.watched["residual/rows_without_direction"].item() == pytest.approx(2 / 10)

    def ratio(b: int) -> tuple[Tensor, Tensor, Tensor]:
        h = student.hidden[b, student.rows(b)]
        u = teacher.hidden[b, teacher.rows(b)] @ p_ta.T @ weights["residual.low_to_student.weight"].T
        usable = u.norm(dim=-1) > 0
        return h, u, usable

    every = [ratio(b) for b in range(len(student))]
    scales = [(S / A) ** 0.5 * h[usable].norm(dim=-1) / u[usable].norm(dim=-1) for h, u, usable in every]
    total = torch.zeros(()).double()
    for b, (h, u, usable) in enumerate(every):
        if beta == "row":
            factor = scales[b]
        elif beta == "none":
            factor = torch.ones(())
        else:
            mean = torch.cat(scales) if beta == "batch" else scales[b]
            factor = mean.mean() if len(mean) else torch.zeros(())
        factor = (factor if beta_gradient else factor.detach()).expand(int(usable.sum()))
        r = h.clone()
        r[usable] = h[usable] - factor[:, None] * u[usable]
        total = total + nll(r @ student.head.T, student.gold(b)).sum()
    assert_same(found, total / 10, leaves(student, weights))


@pytest.mark.parametrize("same", [True, False])
def test_one_row_sequences(same):
    student, teacher = make_models(same, rows=([1, 1, 1], [1, 1, 1]))
    make_right(teacher, lambda b, i: b == 0, student if same else None)
    weights = make_weights(SHAPES if same else SHAPES | QUERY)
    p_ta = torch.randn(A, D).double()
    found = run(student, teacher, p_ta, weights, same)
    assert_same(found, residual_loss(student, teacher, p_ta, weights, same), leaves(student, weights))


def test_a_sequence_does_not_depend_on_its_neighbours():
    student, teacher = make_mixed(same=False)
    weights, p_ta = make_weights(SHAPES | QUERY), torch.randn(A, D).double()
    together = run(student, teacher, p_ta, weights, False)
    before = together.gradients["student_hidden"][:2].clone()
    student.hidden = torch.cat([student.hidden[:2], 9 * student.hidden[2:]]).detach()
    torch.testing.assert_close(run(student, teacher, p_ta, weights, False).gradients["student_hidden"][:2], before)


def test_what_is_declared():
    assert Residual.needs(Residual.Params(), same_tokens=False).aligned
    assert not Residual.needs(Residual.Params(), same_tokens=True).aligned
    assert not Residual.needs(Residual.Params(wrong="attention"), same_tokens=False).aligned
    assert Residual.needs(Residual.Params(width=8), same_tokens=True).artefacts == {"projectors": {"width": 8}}
    assert Residual.needs(Residual.Params(beta="batch"), same_tokens=True).batch_coupled
    assert not Residual.needs(Residual.Params(), same_tokens=True).batch_coupled


def test_the_teachers_projector_stays_as_stage_1_left_it():
    student, teacher = make_mixed(same=True)
    found = run(student, teacher, torch.randn(A, D).double(), make_weights(SHAPES), True)
    assert found.gradients["residual.low_to_student.weight"].abs().sum() > 0
    assert "residual.teacher_to_low.weight" not in found.gradients


def test_the_projectors_of_stage_1_must_be_given():
    student, teacher = make_models(True)
    with pytest.raises(KdzooError, match=r"^replay: 'residual' needs the tensors of the stage 'projectors'"):
        replay({"residual": (Residual, {}, 1.0)}, student.recorded(), teacher.recorded(), same_tokens=True)


# Stage 1.


@pytest.mark.parametrize("target", ["label", "teacher"])
@pytest.mark.parametrize("reconstruction_weight", [0.0, 0.4])
def test_projectors(target, reconstruction_weight):
    _, teacher = make_models(True)
    weights = make_weights(STAGE_1)
    p_ta, p_at = weights.values()
    found = replay(
        {
            "projectors": (
                Projectors,
                {"width": A, "target": target, "reconstruction_weight": reconstruction_weight},
                1.0,
            )
        },
        None,
        teacher.recorded(),
        weights={name: weight.detach() for name, weight in weights.items()},
        same_tokens=True,
        chunk_bytes=4 * 2 * V,
    )
    states = torch.cat([teacher.hidden[b, teacher.rows(b)] for b in range(len(teacher))])
    top = torch.cat([teacher.logits(b) for b in range(len(teacher))]).argmax(-1)
    gold = torch.cat([teacher.gold(b) for b in range(len(teacher))]) if target == "label" else top
    back = states @ p_ta.T @ p_at.T
    logits = back @ teacher.head.T
    error, square = (back - states).square().sum(-1), states.square().sum(-1)
    assert_same(found, nll(logits, gold).mean() + reconstruction_weight * (error / square).mean(), weights)
    agreement = (logits.argmax(-1) == top).double().mean()
    assert found.watched["projectors/teacher_agreement"].item() == pytest.approx(agreement.item())
    relative = (error.sum() / square.sum()).item()
    assert found.watched["projectors/relative_error"].item() == pytest.approx(relative, rel=1e-12)


def test_the_projectors_choose_which_rows_are_reconstructed():
    assert Projectors.needs(Projectors.Params(), same_tokens=True).rows == "sequence"
    assert Projectors.needs(Projectors.Params(rows="response"), same_tokens=True).rows == "response"
