from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from recordings import D, Recording, S, V, W, assert_same, make_models, make_right, make_weights, nll
from torch import Tensor

from kdzoo import KdzooError, Needs, Side, Step, Stream
from kdzoo.testing import Replay, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_residual import Projectors, Residual, shuffled

A = 3
SHAPES = {"residual.low_to_student.weight": (S, A)}
QUERY = {"residual.student_to_low.weight": (A, S)}
P_TA = "residual.teacher_to_low.weight"
STAGE_1 = {"projectors.teacher_to_low.weight": (A, D), "projectors.low_to_teacher.weight": (D, A)}


def run(
    student: Recording,
    teacher: Recording,
    p_ta: Tensor,
    weights: dict[str, Tensor],
    same: bool,
    chunk_bytes: int = 200,
    loss: type[Residual] = Residual,
    **params: Any,
) -> Replay:
    return replay(
        {"residual": (loss, params, 1.0)},
        student.recorded(),
        teacher.recorded(),
        weights={name: weight.detach() for name, weight in weights.items()},
        artifacts={"projectors": {"teacher_to_low.weight": p_ta}},
        same_tokens=same,
        chunk_bytes=chunk_bytes,
    )


def leaves(student: Recording, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"student_hidden": student.hidden, "student_head": student.head, **weights}


def normalised(x: Tensor, how: str) -> Tensor:
    if how == "std":
        return x / x.std(-1, keepdim=True)
    return A**0.5 * x / x.norm(dim=-1, keepdim=True) if how == "l2" else x


def spans(student: Recording, teacher: Recording, b: int) -> Tensor:
    """[student rows, teacher rows] whether both lie in one span."""
    assert student.chunks is not None and teacher.chunks is not None
    mine, theirs = student.chunks[b, student.rows(b)], teacher.chunks[b, teacher.rows(b)]
    return (mine[:, None] & theirs[None]).any(-1)


def random_rows(student: Recording, masks: list[Tensor]) -> list[Tensor]:
    """As many rows of each sequence as its mask has, at the places that the plugin draws."""
    drawn = torch.empty(sum(map(len, masks)), dtype=torch.bool)
    drawn[shuffled(side_of(student))] = torch.cat(masks)
    return list(drawn.split([len(mask) for mask in masks]))


def side_of(recording: Recording) -> Side:
    rows = (recording.labels != -100).flatten().nonzero()[:, 0]
    labels, inputs = recording.labels.flatten()[rows], recording.ids.flatten()[rows]
    sample = rows // recording.labels.shape[1]
    nowhere = torch.full_like(rows, -1)
    return Side(recording.ids, torch.ones_like(recording.ids), rows, labels, inputs, sample, nowhere)


def residual_loss(
    student: Recording,
    teacher: Recording,
    p_ta: Tensor,
    weights: dict[str, Tensor],
    same: bool,
    *,
    beta: str | float = "sequence",
    beta_gradient: bool = False,
    head_gradient: bool = True,
    state_gradient: bool = True,
    indicator: str = "hard",
    temperature: float = 1.0,
    top_k: int = 1,
    normalise: str = "std",
    attend: str = "response",
    wrong: str = "by_bytes",
    **_: Any,
) -> Tensor:
    """The formulas, sequence by sequence."""
    states, bases, targets, masks, softs, us = [], [], [], [], [], []
    p_as, w_s = weights["residual.low_to_student.weight"], student.head if head_gradient else student.head.detach()
    for b in range(len(student)):
        scored = teacher.rows(b)
        h = student.hidden[b, student.rows(b)]
        base = h if state_gradient else h.detach()
        top = teacher.logits(b).topk(top_k).indices
        flags = (top != teacher.gold(b)[:, None]).all(-1).double()
        p = (teacher.logits(b) / temperature).softmax(-1).gather(1, teacher.gold(b)[:, None])[:, 0]
        z = teacher.hidden[b, scored] @ p_ta.T
        mask, soft = flags > 0.5, 1 - p
        if not same:
            places = torch.ones_like(scored) if attend == "sequence" else scored
            z = teacher.hidden[b, places] @ p_ta.T
            query = normalised(base @ weights["residual.student_to_low.weight"].T, normalise)
            a = (query @ normalised(z, normalise).T / A**0.5).softmax(-1)
            z = a @ z
            a = a.detach()[:, scored[places]]  # what lies on a prompt is neither wrong nor uncertain
            together = spans(student, teacher, b)
            if wrong == "by_bytes":
                mask = (together & (flags > 0.5)).any(-1)
                soft = 1 - torch.where(together, p, 1.0).prod(-1)
            elif wrong == "attention":
                mask, soft = a @ flags > 0.5, a @ (1 - p)
            elif wrong == "projected":
                mask = (z @ p_as.T @ student.head.T).argmax(-1) != student.gold(b)
                soft = mask.double()
            else:
                log_p = teacher.logits(b).log_softmax(-1)
                soft = a @ (-(log_p.exp() * log_p).sum(-1) / math.log(V if same else W))
                mask = soft > 0.5
        states.append(h)
        bases.append(base)
        us.append(z @ p_as.T)
        targets.append(student.gold(b))
        masks.append(mask)
        softs.append(soft.detach())
    shares = {
        "hard": [mask.double() for mask in masks],
        "soft": softs,
        "all": [torch.ones(len(mask)).double() for mask in masks],
        "random": [mask.double() for mask in random_rows(student, masks)],
    }[indicator]

    def scale(h: Tensor, u: Tensor) -> Tensor:
        return (S / A) ** 0.5 * (h.norm(dim=-1) / u.norm(dim=-1))

    total, rows = torch.zeros(()).double(), 0
    for h, base, u, gold, share in zip(states, bases, us, targets, shares, strict=True):
        if beta == "sequence":
            factor = scale(base, u).mean().expand(len(h))
        elif beta == "row":
            factor = scale(base, u)
        elif beta == "batch":
            factor = scale(torch.cat(bases), torch.cat(us)).mean().expand(len(h))
        else:
            factor = torch.full((len(h),), 1.0 if beta == "none" else float(beta), dtype=torch.float64)
        factor = factor if beta_gradient else factor.detach()
        r = torch.where(share[:, None] > 0, base - (factor * share)[:, None] * u, h)
        total = total + nll(r @ w_s.T, gold).sum()
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


def make_sure_of_one(teacher: Recording) -> None:
    """Low entropy in the first sequence, high entropy in the last."""
    teacher.hidden[0] *= 4
    teacher.hidden[2] *= 0.2


VERDICTS = ["by_bytes", "attention", "projected", "entropy"]


@pytest.mark.parametrize("wrong", VERDICTS)
@pytest.mark.parametrize("attend", ["response", "sequence"])
@pytest.mark.parametrize("normalise", ["std", "l2", "none"])
def test_two_tokenizers(wrong, attend, normalise):
    student, teacher = make_mixed(same=False)
    weights = make_weights(SHAPES | QUERY)
    p_ta = torch.randn(A, D).double()
    if wrong == "entropy":
        make_sure_of_one(teacher)
    if wrong == "attention":
        make_right(teacher, lambda b, i: i == 0)
    params = {"wrong": wrong, "normalise": normalise, "attend": attend}
    found = run(student, teacher, p_ta, weights, False, **params)
    assert 0 < found.watched["residual/wrong_share"] < 1
    assert_same(found, residual_loss(student, teacher, p_ta, weights, False, **params), leaves(student, weights))


SETTINGS: dict[str, tuple[list[bool], dict[str, Any]]] = {
    "soft": ([True, False], {"indicator": "soft"}),
    "soft at temperature 2": ([True, False], {"indicator": "soft", "temperature": 2.0}),
    "soft by attention": ([False], {"indicator": "soft", "temperature": 2.0, "wrong": "attention"}),
    "soft by entropy": ([False], {"indicator": "soft", "wrong": "entropy"}),
    "soft by projection, which stays hard": ([False], {"indicator": "soft", "wrong": "projected"}),
    "soft over the sequence": ([False], {"indicator": "soft", "wrong": "attention", "attend": "sequence"}),
    "soft over the sequence by entropy": ([False], {"indicator": "soft", "wrong": "entropy", "attend": "sequence"}),
    "all": ([True, False], {"indicator": "all"}),
    "random": ([True, False], {"indicator": "random"}),
    "random by attention": ([False], {"indicator": "random", "wrong": "attention"}),
    "top 3": ([True, False], {"top_k": 3}),
    "top 3 by attention": ([False], {"top_k": 3, "wrong": "attention"}),
    "top 3 and soft": ([True, False], {"top_k": 3, "indicator": "soft"}),
    "beta by row": ([True, False], {"indicator": "soft", "beta": "row"}),
    "beta differentiated": ([True, False], {"indicator": "soft", "beta_gradient": True}),
}
IN_EVERY_SETTING = pytest.mark.parametrize(
    ("same", "params"),
    [pytest.param(s, p, id=f"{n}, {'one' if s else 'two'}") for n, (sames, p) in SETTINGS.items() for s in sames],
)
ROWS = ([7, 1, 5], [4, 1, 6])  # the last student row of the first sequence lies in no span


@IN_EVERY_SETTING
@pytest.mark.parametrize("head_gradient", [True, False])
@pytest.mark.parametrize("state_gradient", [True, False])
def test_every_setting(same, params, head_gradient, state_gradient):
    student, teacher = make_models(same, rows=ROWS)
    if params.get("wrong") == "entropy":
        make_sure_of_one(teacher)
    if params.get("wrong") != "entropy" and "top_k" not in params:
        make_right(teacher, lambda b, i: b == 2 and i % 2 == 1, student if same else None)
    weights, p_ta = make_weights(SHAPES if same else SHAPES | QUERY), torch.randn(A, D).double()
    given = params | {"head_gradient": head_gradient, "state_gradient": state_gradient}
    found = run(student, teacher, p_ta, weights, same, **given)
    assert_same(found, residual_loss(student, teacher, p_ta, weights, same, **given), leaves(student, weights))
    assert 0 < found.watched["residual/wrong_share"] < 1
    assert found.terms.keys() == {"residual/wrong_rows", "residual/right_rows"}
    torch.testing.assert_close(torch.stack([*found.terms.values()]).sum(), found.loss)
    assert all(term > 0 for term in found.terms.values())


@IN_EVERY_SETTING
def test_the_terms_are_the_rows_by_the_teachers_verdict(same, params):
    student, teacher = make_models(same, rows=ROWS)
    weights, p_ta = make_weights(SHAPES if same else SHAPES | QUERY), torch.randn(A, D).double()
    found = run(student, teacher, p_ta, weights, same, **params, head_gradient=False)
    right = found.facts["residual"]["teacher.correct@3" if params.get("top_k") else "teacher.correct"]
    on_wrong = found.watched["residual/residual_cross_entropy_wrong"] if not right.all() else 0.0
    on_right = found.watched["residual/residual_cross_entropy_right"] if right.any() else 0.0
    torch.testing.assert_close(found.terms["residual/wrong_rows"], on_wrong * (~right).double().mean())
    torch.testing.assert_close(found.terms["residual/right_rows"], on_right * right.double().mean())


class Watching(Residual):
    """Keeps what it drew and the share of the residual that each row got."""

    made: Residual
    drawn: dict[str, Tensor]
    shares: list[Tensor]
    made_streams: dict[str, Stream]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        type(self).made, type(self).shares = self, []
        type(self).drawn = {name: weight.detach().clone() for name, weight in self.named_parameters()}

    def indicator(self, *args: Any) -> Tensor:
        share = super().indicator(*args)
        self.shares.append(share)
        return share

    def streams_after_facts(self, step: Step) -> dict[str, Stream]:
        made = super().streams_after_facts(step)
        type(self).made_streams = made
        return made


def shares_of(student: Recording, teacher: Recording, same: bool, **params: Any) -> list[Tensor]:
    """By sequence."""
    weights = make_weights(SHAPES if same else SHAPES | QUERY)
    run(student, teacher, torch.randn(A, D).double(), weights, same, loss=Watching, **params)
    return list(Watching.shares[0].split([int(student.rows(b).sum()) for b in range(len(student))]))


def these(recording: Recording, sequences: list[int]) -> Recording:
    chunks = None if recording.chunks is None else recording.chunks[sequences]
    return replace(
        recording,
        labels=recording.labels[sequences],
        ids=recording.ids[sequences],
        hidden=recording.hidden[sequences],
        chunks=chunks,
    )


@pytest.mark.parametrize("same", [True, False])
def test_random_rows_are_as_many_in_every_sequence_but_others(same):
    student, teacher = make_models(same, rows=([12, 1, 9], [12, 1, 9]))
    make_right(teacher, lambda b, i: i < 4 + b, student if same else None)
    hard = shares_of(student, teacher, same)
    drawn = shares_of(student, teacher, same, indicator="random")
    assert [share.sum() for share in drawn] == [share.sum() for share in hard]
    assert all(share.unique().tolist() in ([0, 1], [0], [1]) for share in drawn)
    assert not torch.equal(torch.cat(drawn), torch.cat(hard))


@pytest.mark.parametrize("same", [True, False])
def test_random_rows_follow_from_the_sequence_alone(same):
    student, teacher = make_models(same, rows=([12, 1, 9], [12, 1, 9]))
    make_right(teacher, lambda b, i: i < 4 + b, student if same else None)
    together = shares_of(student, teacher, same, indicator="random")
    for order in ([2, 0, 1], [1], [0, 2], [2]):
        found = shares_of(these(student, order), these(teacher, order), same, indicator="random")
        for share, b in zip(found, order, strict=True):
            assert torch.equal(share, together[b])


def test_random_rows_are_drawn_evenly():
    torch.manual_seed(0)
    side = side_of(make_models(True, rows=([40] * 500, [40] * 500))[0])
    place = shuffled(side) % 40
    assert torch.equal(shuffled(side).sort().values, torch.arange(len(side)))
    mean = place.view(500, 40).double().mean(0)  # where the rows of a place go: 19.5 if no place is preferred
    assert (mean - 19.5).abs().max() < 5 * (40**2 / 12 / 500) ** 0.5


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("projector", ["frozen", "trained"])
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("direction", ["learned", "random"])
def test_what_is_trained_and_where_it_starts(same, projector, pretrained, direction):
    student, teacher = make_mixed(same)
    from_stage_1 = torch.randn(A, D).double()
    shapes = {} if direction == "random" else SHAPES
    shapes = shapes | ({P_TA: (A, D)} if projector == "trained" else {}) | ({} if same else QUERY)
    weights = make_weights(shapes)
    params = {"projector": projector, "pretrained": pretrained, "direction": direction}
    found = run(student, teacher, from_stage_1, weights, same, loss=Watching, **params)
    assert torch.equal(Watching.drawn["teacher_to_low.weight"], from_stage_1) == pretrained
    drawn = {f"residual.{name}": weight for name, weight in Watching.drawn.items()}
    assert drawn["residual.low_to_student.weight"].abs().max() <= A**-0.5  # as linear layers start
    used = drawn | weights
    assert_same(found, residual_loss(student, teacher, used[P_TA], used, same), leaves(student, weights))
    assert all(found.gradients[name].abs().sum() > 0 for name in weights)


@pytest.mark.parametrize("head_gradient", [True, False])
@pytest.mark.parametrize("projector", ["frozen", "trained"])
@pytest.mark.parametrize("wrong", VERDICTS)
def test_two_tokenizers_in_unusual_settings_all_at_once(wrong, projector, head_gradient):
    student, teacher = make_models(False, rows=ROWS)
    make_sure_of_one(teacher)
    weights = make_weights(SHAPES | QUERY | ({P_TA: (A, D)} if projector == "trained" else {}))
    p_ta = weights.get(P_TA, torch.randn(A, D).double())
    params = {
        "wrong": wrong,
        "head_gradient": head_gradient,
        "indicator": "soft",
        "temperature": 2.0,
        "top_k": 3,
        "attend": "sequence",
        "normalise": "l2",
        "beta": "batch",
        "beta_gradient": True,
    }
    found = run(student, teacher, p_ta.detach(), weights, False, projector=projector, **params)
    assert_same(found, residual_loss(student, teacher, p_ta, weights, False, **params), leaves(student, weights))


@pytest.mark.parametrize("beta_gradient", [False, True])
@pytest.mark.parametrize("indicator", ["hard", "random", "all"])
@pytest.mark.parametrize("same", [True, False])
def test_the_body_does_not_learn_from_rows_with_a_residual_without_state_gradient(same, indicator, beta_gradient):
    student, teacher = make_mixed(same)
    weights, p_ta = make_weights(SHAPES if same else SHAPES | QUERY), torch.randn(A, D).double()
    params = {"indicator": indicator, "beta_gradient": beta_gradient, "state_gradient": False}
    found = run(student, teacher, p_ta, weights, same, loss=Watching, **params)
    assert_same(found, residual_loss(student, teacher, p_ta, weights, same, **params), leaves(student, weights))
    rows, shares = student.labels != -100, Watching.shares[0]
    gradients = found.gradients.get("student_hidden", torch.zeros_like(student.hidden))[rows]
    plain = replay({"sft": (CrossEntropy, {}, 1.0)}, student.recorded(), None, same_tokens=same)
    assert (gradients[shares > 0] == 0).all()
    torch.testing.assert_close(gradients[shares == 0], plain.gradients["student_hidden"][rows][shares == 0])
    assert all(found.gradients[name].abs().sum() > 0 for name in weights)


@pytest.mark.parametrize("head_gradient", [True, False])
@pytest.mark.parametrize("indicator", ["hard", "soft", "all", "random"])
def test_a_prompts_rows_are_attended_to_and_are_never_wrong(indicator, head_gradient):
    """An even attention on 9 positions, of which 3, 1 and 6 are of the response, where the teacher is all wrong."""
    student, teacher = make_models(False)
    weights, p_ta = make_weights(SHAPES | QUERY), torch.randn(A, D).double()
    make_right(teacher, lambda b, i: False)
    weights["residual.student_to_low.weight"].data.zero_()
    params = {"indicator": indicator, "head_gradient": head_gradient, "attend": "sequence", "wrong": "attention"}
    params |= {"normalise": "none"}
    found = run(student, teacher, p_ta, weights, False, **params)
    assert found.facts["residual"]["teacher.correct"].tolist() == [True] * 5 + [False] * 5
    assert found.watched["residual/attention_entropy"].item() == pytest.approx(math.log(9))
    assert_same(found, residual_loss(student, teacher, p_ta, weights, False, **params), leaves(student, weights))


@pytest.mark.parametrize("same", [True, False])
def test_the_head_does_not_learn_from_any_row_without_head_gradient(same):
    student, teacher = make_mixed(same)
    weights, p_ta = make_weights(SHAPES if same else SHAPES | QUERY), torch.randn(A, D).double()
    found = run(student, teacher, p_ta, weights, same, head_gradient=False)
    full = run(student, teacher, p_ta, weights, same)
    for name in ("student_hidden", *weights):
        torch.testing.assert_close(found.gradients[name], full.gradients[name])
    torch.testing.assert_close(found.loss, full.loss)
    assert (found.gradients.get("student_head", torch.zeros(1)) == 0).all()


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    "params",
    [
        {"indicator": "random"},
        {"head_gradient": False},
        {"indicator": "random", "head_gradient": False, "state_gradient": False},
        {"state_gradient": False, "beta_gradient": True},
        {"top_k": 3},
    ],
)
def test_where_no_row_is_wrong_it_is_cross_entropy(same, params):
    student, teacher = make_models(same)
    make_right(teacher, lambda b, i: True, student if same else None)
    weights = make_weights(SHAPES if same else SHAPES | QUERY)
    found = run(student, teacher, torch.randn(A, D).double(), weights, same, **params)
    plain = replay({"sft": (CrossEntropy, {}, 1.0)}, student.recorded(), None, same_tokens=same)
    torch.testing.assert_close(found.loss, plain.loss)
    torch.testing.assert_close(found.gradients["student_hidden"], plain.gradients["student_hidden"])
    head = plain.gradients["student_head"] if params.get("head_gradient", True) else torch.zeros_like(student.head)
    torch.testing.assert_close(found.gradients.get("student_head", torch.zeros_like(head)), head)
    assert all((found.gradients.get(name, torch.zeros(1)) == 0).all() for name in weights)
    assert found.terms["residual/wrong_rows"] == 0


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("indicator", ["hard", "soft", "all", "random"])
@pytest.mark.parametrize("normalise", ["std", "l2", "none"])
@pytest.mark.parametrize("beta_gradient", [False, True])
def test_without_any_direction_it_is_cross_entropy(same, indicator, normalise, beta_gradient):
    student, teacher = make_mixed(same)
    weights = make_weights((SHAPES if same else SHAPES | QUERY) | {P_TA: (A, D)})
    weights[P_TA].data.zero_()  # z, and so u, is zero everywhere
    params = {"indicator": indicator, "normalise": normalise, "beta_gradient": beta_gradient, "projector": "trained"}
    found = run(student, teacher, torch.zeros(A, D).double(), weights, same, **params)
    plain = replay({"sft": (CrossEntropy, {}, 1.0)}, student.recorded(), None, same_tokens=same)
    torch.testing.assert_close(found.loss, plain.loss)
    for name in ("student_hidden", "student_head"):
        torch.testing.assert_close(found.gradients[name], plain.gradients[name])
    assert all((found.gradients[name] == 0).all() for name in weights)
    assert found.watched["residual/rows_without_direction"] == 1


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


@IN_EVERY_SETTING
def test_one_row_sequences(same, params):
    student, teacher = make_models(same, rows=([1, 1, 1], [1, 1, 1]))
    make_right(teacher, lambda b, i: b == 0, student if same else None)
    weights = make_weights(SHAPES if same else SHAPES | QUERY)
    p_ta = torch.randn(A, D).double()
    found = run(student, teacher, p_ta, weights, same, **params)
    assert_same(found, residual_loss(student, teacher, p_ta, weights, same, **params), leaves(student, weights))


def test_a_sequence_does_not_depend_on_its_neighbours():
    student, teacher = make_mixed(same=False)
    weights, p_ta = make_weights(SHAPES | QUERY), torch.randn(A, D).double()
    together = run(student, teacher, p_ta, weights, False)
    before = together.gradients["student_hidden"][:2].clone()
    student.hidden = torch.cat([student.hidden[:2], 9 * student.hidden[2:]]).detach()
    torch.testing.assert_close(run(student, teacher, p_ta, weights, False).gradients["student_hidden"][:2], before)


@IN_EVERY_SETTING
@pytest.mark.parametrize("head_gradient", [True, False])
def test_sequences_add_up_in_every_setting(same, params, head_gradient):
    student, teacher = make_models(same, rows=ROWS)
    weights, p_ta = make_weights(SHAPES if same else SHAPES | QUERY), torch.randn(A, D).double()
    given = params | {"head_gradient": head_gradient}
    whole = run(student, teacher, p_ta, weights, same, **given)
    parts = [(these(student, [b]), these(teacher, [b])) for b in range(3)]
    found = [run(mine, theirs, p_ta, weights, same, **given) for mine, theirs in parts]
    shares = [part.tokens / whole.tokens for part in found]
    for name, term in whole.terms.items():
        torch.testing.assert_close(sum(share * p.terms[name] for share, p in zip(shares, found, strict=True)), term)
    states = [share * part.gradients["student_hidden"] for share, part in zip(shares, found, strict=True)]
    torch.testing.assert_close(torch.cat(states), whole.gradients["student_hidden"])
    for name in whole.gradients.keys() - {"student_hidden"}:
        added = sum(share * p.gradients[name] for share, p in zip(shares, found, strict=True) if name in p.gradients)
        torch.testing.assert_close(added, whole.gradients[name])


@IN_EVERY_SETTING
@pytest.mark.parametrize("head_gradient", [True, False])
def test_no_rows_train_nothing_and_report_the_same_terms(same, params, head_gradient):
    student, teacher = make_models(same)
    weights, p_ta = make_weights(SHAPES if same else SHAPES | QUERY), torch.randn(A, D).double()
    given = params | {"head_gradient": head_gradient}
    full = run(student, teacher, p_ta, weights, same, **given)
    student.labels, teacher.labels = torch.full_like(student.labels, -100), torch.full_like(teacher.labels, -100)
    found = run(student, teacher, p_ta, weights, same, **given)
    assert found.terms == dict.fromkeys(full.terms, 0) and found.loss == 0
    assert found.watched.keys() == full.watched.keys()
    assert found.gradients.keys() == full.gradients.keys()
    assert all((gradient == 0).all() for gradient in found.gradients.values())


def test_what_is_declared():
    assert Residual.needs(Residual.Params(), same_tokens=False).aligned
    assert Residual.needs(Residual.Params(indicator="soft", top_k=3), same_tokens=False).aligned
    assert not Residual.needs(Residual.Params(), same_tokens=True).aligned
    assert not Residual.needs(Residual.Params(wrong="attention"), same_tokens=False).aligned
    assert Residual.needs(Residual.Params(width=8), same_tokens=True).artifacts == {"projectors": {"width": 8}}
    assert Residual.needs(Residual.Params(beta="batch"), same_tokens=True).batch_coupled
    assert not Residual.needs(Residual.Params(), same_tokens=True).batch_coupled


def needed(same: bool, **params: Any) -> Needs:
    return Residual.needs(Residual.Params(**params), same)


@pytest.mark.parametrize("same", [True, False])
def test_the_facts_that_are_declared(same):
    assert set(needed(same).facts) == {"teacher.correct"}
    assert set(needed(same, top_k=3).facts) == {"teacher.correct@3"}
    assert set(needed(same, temperature=2.0).facts) == {"teacher.correct"}  # which no hard indicator reads
    assert set(needed(same, indicator="soft").facts) == {"teacher.correct", "teacher.label_logprob"}
    soft = needed(same, indicator="soft", temperature=2.0, top_k=5)
    assert set(soft.facts) == {"teacher.correct@5", "teacher.label_logprob@2.0"}
    entropy = {"teacher.correct"} if same else {"teacher.correct", "teacher.entropy"}
    assert set(needed(same, wrong="entropy").facts) == entropy


@pytest.mark.parametrize("same", [True, False])
def test_the_streams_that_are_made(same):
    student, teacher = make_mixed(same)
    weights, p_ta = make_weights(SHAPES if same else SHAPES | QUERY), torch.randn(A, D).double()
    for params, streams, learns in [
        ({}, ["wrong"], True),
        ({"top_k": 3, "beta": "row", "state_gradient": False, "direction": "random"}, ["wrong"], True),
        ({"head_gradient": False}, ["wrong", "right"], False),
        ({"indicator": "soft"}, ["wrong", "right"], True),
        ({"indicator": "all"}, ["wrong", "right"], True),
        ({"indicator": "random", "head_gradient": False}, ["wrong", "right"], False),
    ]:
        fixed = SHAPES if params.get("direction") == "random" else {}
        trained = {name: weight for name, weight in weights.items() if name not in fixed}
        run(student, teacher, p_ta, trained, same, loss=Watching, **params)
        made = Watching.made_streams
        assert list(made) == streams
        assert all(s.learns_head == learns and s.head == "student" and s.beside is None for s in made.values())
        visits = Residual.visits(Residual.Params.model_validate(params))
        assert [visit.streams for visit in visits] == [("student",), ("wrong",), ("right",)]


def test_the_sites_that_are_declared():
    last, everywhere = frozenset({"hidden.last"}), frozenset({"hidden.last", "hidden.last@all"})
    for same in (True, False):
        assert needed(same).student == needed(same, attend="sequence").student == last
        assert needed(same).teacher == last
    assert needed(False, attend="sequence").teacher == everywhere
    assert needed(True, attend="sequence").teacher == last  # nothing is attended to


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


def project(
    teacher: Recording, weights: dict[str, Tensor], loss: type[Projectors] = Projectors, **params: Any
) -> Replay:
    return replay(
        {"projectors": (loss, params, 1.0)},
        None,
        teacher.recorded(),
        weights={name: weight.detach() for name, weight in weights.items()},
        same_tokens=True,
        chunk_bytes=4 * 2 * V,
    )


def states_of(teacher: Recording) -> Tensor:
    return torch.cat([teacher.hidden[b, teacher.rows(b)] for b in range(len(teacher))])


@pytest.mark.parametrize("low", [A, D + 3])
@pytest.mark.parametrize("target", ["label", "teacher"])
@pytest.mark.parametrize("reconstruction_weight", [0.0, 0.4])
def test_projectors(target, reconstruction_weight, low):
    _, teacher = make_models(True)
    weights = make_weights({name: tuple(low if n == A else n for n in shape) for name, shape in STAGE_1.items()})
    p_ta, p_at = weights.values()
    found = project(teacher, weights, width=low, target=target, reconstruction_weight=reconstruction_weight)
    states = states_of(teacher)
    top = torch.cat([teacher.logits(b) for b in range(len(teacher))]).argmax(-1)
    gold = torch.cat([teacher.gold(b) for b in range(len(teacher))]) if target == "label" else top
    back = states @ p_ta.T @ p_at.T
    logits = back @ teacher.head.T
    error, square = (back - states).square().sum(-1), states.square().sum(-1)
    assert_same(found, nll(logits, gold).mean() + reconstruction_weight * error.sum() / square.sum(), weights)
    agreement = (logits.argmax(-1) == top).double().mean()
    assert found.watched["projectors/teacher_agreement"].item() == pytest.approx(agreement.item())
    relative = (error.sum() / square.sum()).item()
    assert found.watched["projectors/relative_error"].item() == pytest.approx(relative, rel=1e-12)


class Prepared(Projectors):
    """Keeps its sums, and the weights that it would start from; or takes other sums than its own."""

    start: dict[str, Tensor]
    sums: dict[str, Tensor]
    instead: dict[str, Tensor] | None = None

    def start_from_statistics(self, sums: Any) -> None:
        super().start_from_statistics(self.instead or sums)
        type(self).sums = dict(sums)
        type(self).start = {f"projectors.{name}": p.detach().clone() for name, p in self.named_parameters()}


def make_anisotropic(rows: list[int], prompt_only: float = 30.0) -> Recording:
    """Teacher states with directions of very different size, and a mean that is not zero."""
    _, teacher = make_models(True, rows=(rows, rows))
    teacher.hidden = teacher.hidden * torch.tensor([3.0, 0.1, 2.0, 0.3, 1.0, 0.5]) + torch.tensor([0, 4.0, 0, 0, 1, 0])
    teacher.hidden[teacher.labels == -100] *= prompt_only  # rows that are not scored have no say
    return teacher


@pytest.mark.parametrize("low", [1, A, D, D + 3])
def test_a_start_at_the_leading_directions(low):
    teacher = make_anisotropic([40, 1, 30])
    weights = make_weights({name: tuple(low if n == A else n for n in shape) for name, shape in STAGE_1.items()})
    project(teacher, weights, Prepared, width=low, init="pca")
    p_ta, p_at = Prepared.start.values()
    leading = min(low, D)
    _, values, directions = torch.linalg.svd(states_of(teacher), full_matrices=False)  # not centred
    assert p_ta.shape == (low, D) and p_at.shape == (D, low)
    torch.testing.assert_close((p_ta[:leading] * directions[:leading]).sum(-1).abs(), torch.ones(leading).double())
    torch.testing.assert_close((states_of(teacher) @ p_ta[:leading].T).norm(dim=0), values[:leading])
    torch.testing.assert_close(p_at @ p_ta, directions[:leading].T @ directions[:leading])
    # From there: the smallest error that so many directions can leave.
    found = project(teacher, Prepared.start, width=low)
    left = (values[leading:].square().sum() / values.square().sum()).item()
    assert found.watched["projectors/relative_error"].item() == pytest.approx(left, abs=1e-12)
    if low >= D:
        assert found.watched["projectors/teacher_agreement"] == 1


def test_a_random_start_is_that_of_linear_layers():
    teacher = make_anisotropic([40, 1, 30])
    project(teacher, make_weights(STAGE_1), Prepared, width=A)
    p_ta, p_at = Prepared.start.values()
    assert 0 < p_ta.abs().max() <= D**-0.5
    assert 0 < p_at.abs().max() <= A**-0.5


@pytest.mark.parametrize("low", [1, 2, A, D + 3])
@pytest.mark.parametrize("init", ["linear", "pca"])
def test_the_baseline_is_centred_pca(low, init):
    teacher = make_anisotropic([40, 1, 30])
    weights = make_weights({name: tuple(low if n == A else n for n in shape) for name, shape in STAGE_1.items()})
    found = project(teacher, weights, width=low, init=init)
    states, top = states_of(teacher), torch.cat([teacher.logits(b) for b in range(len(teacher))]).argmax(-1)
    mean = states.mean(0)
    kept = torch.linalg.svd(states - mean, full_matrices=False).Vh[:low]
    agreement = ((mean + (states - mean) @ kept.T @ kept) @ teacher.head.T).argmax(-1) == top
    assert found.watched["projectors/teacher_agreement_of_pca"].item() == pytest.approx(
        agreement.double().mean().item()
    )
    assert low > D or 0 < agreement.double().mean() < 1
    not_centred = torch.linalg.svd(states, full_matrices=False).Vh[:low]
    other = ((states @ not_centred.T @ not_centred) @ teacher.head.T).argmax(-1) == top
    assert low > 2 or not torch.equal(agreement, other)  # the test can tell


@pytest.mark.parametrize("target", ["label", "teacher"])
def test_a_reconstruction_is_measured_by_the_statistics_however_the_rows_are_split(target, monkeypatch):
    teacher = make_anisotropic([6, 1, 9])
    weights = make_weights(STAGE_1)
    params = {"width": A, "target": target, "reconstruction_weight": 0.7}
    whole = project(teacher, weights, Prepared, **params)
    parts = [these(teacher, sequences) for sequences in ([0, 1], [2])]
    statistics = []
    for part in parts:
        project(part, weights, Prepared, **params)
        statistics.append(Prepared.sums)
    monkeypatch.setattr(
        Prepared, "instead", {name: statistics[0][name] + statistics[1][name] for name in statistics[0]}
    )
    shares = [part.rows(slice(None)).sum() / teacher.rows(slice(None)).sum() for part in parts]
    split = [project(part, weights, Prepared, **params) for part in parts]
    torch.testing.assert_close(sum(share * part.loss for share, part in zip(shares, split, strict=True)), whole.loss)
    for name, gradient in whole.gradients.items():
        added = sum(share * part.gradients[name] for share, part in zip(shares, split, strict=True))
        torch.testing.assert_close(added, gradient)


def test_the_projectors_choose_which_rows_are_reconstructed():
    assert Projectors.needs(Projectors.Params(), same_tokens=True).tokens == "sequence"
    assert Projectors.needs(Projectors.Params(rows="response"), same_tokens=True).tokens == "response"


def test_the_teachers_prediction_is_asked_for_where_it_is_the_target():
    for target, facts in (("label", set()), ("teacher", {"teacher.top1"})):
        params = Projectors.Params(target=target)
        assert Projectors.needs(params, same_tokens=True).facts == facts
        trained, watched = Projectors.visits(params)
        assert trained.streams == ("reconstructed",) and not trained.measured_only
        assert watched.streams == ("teacher", "reconstructed", "pca") and watched.measured_only
