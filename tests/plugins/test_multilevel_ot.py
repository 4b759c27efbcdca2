from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import Recording, V, W, assert_same, make_models
from torch import Tensor

from kdzoo import Head
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_multilevel_ot import MultiLevelOT

SMALL = {"k": 4, "candidates": 6}  # of vocabularies of 9 and 11
PAPER = {
    "beta": 0.1,
    "gamma": 0.1,
    "k": 50,
    "matching": "greedy",
    "candidates": 512,
    "student_temperature": 1.0,
    "teacher_temperature": 1.0,
    "sl_temperature": 1.0,
    "sd_temperature": 2.0,
    "regularisation": 0.1,
    "iterations": 20,
    "normalise": False,
    "swap": False,
    "second_softmax": False,
    "skip_student_eos": True,
    "skip_teacher_eos": True,
    "reduction": "tokens",
}


def run(student: Recorded, teacher: Recorded, same: bool = False, chunk_bytes: int = 200, **params: Any) -> Replay:
    return replay({"ot": (MultiLevelOT, params, 0.15)}, student, teacher, same_tokens=same, chunk_bytes=chunk_bytes)


def answer(logits: Tensor, given: dict[str, Any], model: str) -> Tensor:
    """[tokens, vocabulary]"""
    if given["normalise"]:
        logits = logits / (logits.std(-1, keepdim=True) + 1e-4)
    return logits[: len(logits) - given[f"skip_{model}_eos"]]


def matched(p: Tensor, q: Tensor, given: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Which column of the teacher's and of the student's vocabulary has each rank. Search as it is told."""
    p, q = p.detach(), q.detach()
    theirs = sorted(range(p.shape[1]), key=lambda v: -float(p[:, v].sum()))[: given["k"]]
    mine = sorted(range(q.shape[1]), key=lambda v: -float(q[:, v].sum()))
    if given["matching"] == "rank":
        return theirs, mine[: given["k"]]
    free, chosen, n = mine[: max(given["k"], given["candidates"])], [], min(len(p), len(q))
    for v in theirs:
        if free:
            chosen.append(min(free, key=lambda u, v=v: float((p[:n, v] - q[:n, u]).abs().sum())))
            free.remove(chosen[-1])
    return theirs, chosen


def sinkhorn(p: Tensor, q: Tensor, regularisation: float, iterations: int) -> Tensor:
    cost = (p[:, None] - q[None]).abs().sum(-1)
    plan = (-cost / regularisation).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def sequence_loss(z: Tensor, y: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
    """Of one sequence's rows of logits: HAD, SL and SD."""
    z, y = answer(z, given, "student"), answer(y, given, "teacher")
    if not len(z) or not len(y):
        zero = z.sum() * 0
        return {"had": zero, "sl": zero, "sd": zero}

    def ranks(tau: float | None) -> tuple[Tensor, Tensor]:
        """Probabilities at a temperature, None for that of HAD."""
        p = (y / (tau or given["teacher_temperature"])).softmax(-1)
        q = (z / (tau or given["student_temperature"])).softmax(-1)
        if given["matching"] == "sort":
            p, q = (x.sort(-1, descending=True).values[:, : given["k"]] for x in (p, q))
        else:
            first_p = (y / given["teacher_temperature"]).softmax(-1)
            first_q = (z / given["student_temperature"]).softmax(-1)
            theirs, mine = matched(first_p, first_q, given)
            p, q = p[:, theirs], q[:, mine]
        width = max(p.shape[1], q.shape[1])
        return tuple(torch.cat([x, x.new_zeros(len(x), width - x.shape[1])], 1) for x in (p, q))

    n = min(len(z), len(y))
    p, q = ranks(None)
    had = (p[:n] - q[:n]).abs().sum()
    if given["second_softmax"]:
        sl_p, sl_q = ((x / given["sl_temperature"]).softmax(-1) for x in (p, q))
        sd_p, sd_q = ((x / given["sd_temperature"]).softmax(-1) for x in (p, q))
    else:
        (sl_p, sl_q), (sd_p, sd_q) = ranks(given["sl_temperature"]), ranks(given["sd_temperature"])
    weight, inside = (sl_q, sl_p) if given["swap"] else (sl_p, sl_q)
    kept = inside[0] > 0
    sl = -(weight[:n, kept] * inside[:n, kept].log()).sum()
    return {
        "had": had,
        "sl": given["beta"] * sl,
        "sd": given["gamma"] * sinkhorn(sd_p, sd_q, given["regularisation"], given["iterations"]),
    }


def formula(student: Recording, teacher: Recording, **params: Any) -> dict[str, Tensor]:
    parts = [sequence_loss(student.logits(b), teacher.logits(b), PAPER | params) for b in range(len(student))]
    rows = (student.labels != -100).sum()
    return {name: torch.stack([part[name] for part in parts]).sum() / rows for name in parts[0]}


def check(student: Recording, teacher: Recording, same: bool = False, **params: Any) -> Replay:
    found = run(student.recorded(), teacher.recorded(), same, **params)
    expected = formula(student, teacher, **params)
    for name, value in expected.items():
        torch.testing.assert_close(found.terms[f"ot/{name}"], value.detach(), rtol=1e-10, atol=1e-12)
    loss = 0.15 * torch.stack(list(expected.values())).sum()
    assert_same(found, loss, {"student_hidden": student.hidden, "student_head": student.head})
    return found


# The formula.


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("chunk_bytes", [100, 2**20])
def test_it_is_the_papers_objective(same, chunk_bytes):
    student, teacher = make_models(same)
    found = run(student.recorded(), teacher.recorded(), same, chunk_bytes, **SMALL)
    loss = 0.15 * torch.stack(list(formula(student, teacher, **SMALL).values())).sum()
    assert_same(found, loss, {"student_hidden": student.hidden, "student_head": student.head})


@pytest.mark.parametrize(
    "params",
    [
        {"beta": 0.7},
        {"beta": 0.0, "gamma": 0.0},
        {"gamma": 2.0},
        {"k": 1},
        {"candidates": 9},
        {"candidates": 1},
        {"matching": "rank"},
        {"matching": "sort"},
        {"student_temperature": 1.7},
        {"teacher_temperature": 0.6},
        {"student_temperature": 2.0, "matching": "sort"},
        {"sl_temperature": 1.5},
        {"sd_temperature": 1.0},
        {"sl_temperature": 2.0, "second_softmax": True},
        {"regularisation": 0.5},
        {"iterations": 1},
        {"normalise": True},
        {"swap": True},
        {"second_softmax": True},
        {"skip_student_eos": False},
        {"skip_teacher_eos": False},
        {"skip_student_eos": False, "skip_teacher_eos": False},
    ],
)
def test_every_parameter(params):
    student, teacher = make_models(False)
    changed = check(student, teacher, **(SMALL | params))
    plain = run(student.recorded(), teacher.recorded(), **SMALL)
    assert not torch.isclose(changed.loss, plain.loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize("matching", ["greedy", "rank", "sort"])
@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_a_vocabulary_smaller_than_the_ranks_goes_on_with_zeros(matching, larger):
    first, second = make_models(False)
    assert (V, W) == (9, 11)
    if larger == "student":
        first, second = second, first
        first.hidden.requires_grad_()
        first.head.requires_grad_()
    for k in (10, 50):
        check(first, second, matching=matching, k=k)


def test_a_student_with_the_teachers_columns_in_another_order_has_nothing_to_learn_from_had():
    _, teacher = make_models(False)
    order = torch.randperm(W, generator=torch.Generator().manual_seed(0))
    student = Recorded(teacher.labels, hidden=teacher.hidden, head=teacher.head[order])
    for matching in ("greedy", "rank", "rank_batch", "sort"):
        assert run(student, teacher.recorded(), matching=matching).terms["ot/had"].abs() < 1e-12


def test_greedy_finds_columns_that_a_ranking_by_itself_does_not():
    """Two of the student's tokens are in the wrong order over the sequence, though each has its partner's shape."""
    p = torch.tensor([[0.50, 0.30, 0.2], [0.35, 0.45, 0.2], [0.40, 0.40, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.34, 0.46, 0.2], [0.47, 0.33, 0.2], [0.42, 0.38, 0.2]], dtype=torch.float64)
    labels = torch.tensor([[0, 0, 0]])
    sides = [Recorded(labels, logits=x.log()[None]) for x in (q, p)]
    ends = {"skip_student_eos": False, "skip_teacher_eos": False}
    found = [run(*sides, matching=matching, **ends).terms["ot/had"] * 3 for matching in ("greedy", "rank")]
    torch.testing.assert_close(torch.stack(found), torch.tensor([0.16, 0.6], dtype=torch.float64))


# What a sequence's loss depends on.


def only(recording: Recording, sequences: list[int], padding: int = 0) -> Recording:
    """These sequences in this order, with more padding."""
    fill = {torch.int64: -100}

    def part(values: Tensor) -> Tensor:
        more = values.new_full((len(sequences), padding, *values.shape[2:]), fill.get(values.dtype, 7.0))
        return torch.cat([values[sequences], more], 1)

    labels, hidden = part(recording.labels), part(recording.hidden.detach())
    ids = part(recording.ids).clamp_min(0)
    return Recording(labels, ids, hidden, recording.head, recording.embed)


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(3)),
    padding=st.integers(0, 3),
    matching=st.sampled_from(["greedy", "rank", "sort"]),
)
def test_padding_order_and_neighbours_do_not_matter(order, padding, matching):
    student, teacher = make_models(False)
    params = SMALL | {"matching": matching}
    together = run(student.recorded(), teacher.recorded(), **params)
    moved = run(only(student, order, padding).recorded(), only(teacher, order, padding).recorded(), **params)
    torch.testing.assert_close(moved.loss, together.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        moved.gradients["student_hidden"][:, : student.labels.shape[1]],
        together.gradients["student_hidden"][order],
        rtol=1e-9,
        atol=1e-14,
    )
    alone = [run(only(student, [b]).recorded(), only(teacher, [b]).recorded(), **params) for b in order]
    torch.testing.assert_close(sum(one.loss * one.tokens for one in alone), together.loss * together.tokens)


@pytest.mark.parametrize("params", [{"matching": "rank_batch"}, {"reduction": "padded"}, {"reduction": "padded_last"}])
def test_the_authors_readings_depend_on_neighbours_and_say_so(params):
    student, teacher = make_models(False)
    together = run(student.recorded(), teacher.recorded(), **(SMALL | params))
    alone = [
        run(only(student, [b]).recorded(), only(teacher, [b]).recorded(), **(SMALL | params))
        for b in range(len(student))
    ]
    per = [1.0 if "reduction" in params else one.tokens for one in alone]
    apart = sum(one.loss * weight for one, weight in zip(alone, per, strict=True)) / sum(per)
    assert not torch.isclose(together.loss, apart, rtol=1e-6, atol=0)
    assert MultiLevelOT.needs(MultiLevelOT.Params(**params), same_tokens=False).batch_coupled
    assert not MultiLevelOT.needs(MultiLevelOT.Params(), same_tokens=False).batch_coupled


def test_nothing_is_learnt_where_nothing_is_scored():
    student, teacher = make_models(False)
    gradient = run(student.recorded(), teacher.recorded(), **SMALL).gradients["student_hidden"]
    scored = student.labels != -100
    last = scored & ~torch.cat([scored[:, 1:], torch.zeros_like(scored[:, :1])], 1)
    assert (gradient[~scored | last] == 0).all()
    assert (gradient[scored & ~last] != 0).all()


def test_tokens_beyond_the_shorter_answer_are_transported_but_not_paired():
    student, teacher = make_models(False, rows=([6], [3]))
    ends = {"skip_student_eos": False, "skip_teacher_eos": False}
    paired = run(student.recorded(), teacher.recorded(), gamma=0.0, **SMALL, **ends).gradients["student_hidden"][0, 2:8]
    assert (paired[:3] != 0).all() and (paired[3:] == 0).all()
    whole = run(student.recorded(), teacher.recorded(), **SMALL, **ends).gradients["student_hidden"][0, 2:8]
    assert (whole != 0).all()


# No rows, precision, numbers out of range.

RELEASED = {
    "normalise": True,
    "swap": True,
    "second_softmax": True,
    "skip_teacher_eos": False,
    "iterations": 10,
    "gamma": 0.0001,
    "matching": "rank_batch",
    "reduction": "padded",
}
VARIANTS = pytest.mark.parametrize(
    "params",
    [
        {},
        {"matching": "rank"},
        {"matching": "sort"},
        {"swap": True},
        {"normalise": True},
        RELEASED,
        RELEASED | {"matching": "sort", "reduction": "padded_last"},
    ],
)


@VARIANTS
@pytest.mark.parametrize("rows", [([0], [0]), ([0, 0], [0, 0]), ([1, 1], [1, 1]), ([3, 2], [0, 0]), ([0, 0], [3, 2])])
def test_without_pairs_of_tokens_everything_is_finite(params, rows):
    student, teacher = make_models(False, rows=rows)
    found = run(student.recorded(), teacher.recorded(), **params)
    assert found.terms.keys() == {"ot/had", "ot/sl", "ot/sd"}
    assert found.terms["ot/had"] == 0
    assert found.loss.isfinite()
    assert found.gradients.keys() == {"student_hidden", "student_head"}
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())
    if not RELEASED.items() <= params.items() and "reduction" not in params:
        assert found.loss == 0
        assert all((gradient == 0).all() for gradient in found.gradients.values())


@VARIANTS
@pytest.mark.parametrize("excludes", ["student", "teacher", "both"])
def test_excluded_tokens_leave_loss_and_gradients_finite(params, excludes, monkeypatch):
    """Half of a vocabulary has logits of -inf, so that some ranks have no probability."""
    student, teacher = make_models(False)

    def head(weight: torch.nn.Parameter) -> Head:
        bias = torch.zeros(len(weight)).double()
        if excludes == "both" or (excludes == "student") == (len(weight) == V):
            bias[: len(bias) // 2] = -math.inf
        return Head(weight, torch.nn.Parameter(bias, requires_grad=False))

    monkeypatch.setattr(sys.modules["kdzoo.testing.replay"], "Head", head)
    found = run(student.recorded(), teacher.recorded(), **params)
    assert found.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())
    assert found.gradients["student_hidden"].abs().max() > 0


def test_equal_logits_in_a_row_leave_normalised_gradients_finite():
    student, teacher = make_models(False)
    flat = student.recorded()
    flat = Recorded(flat.labels, hidden=torch.zeros_like(flat.hidden), head=flat.head)
    found = run(flat, teacher.recorded(), normalise=True)
    assert found.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())


@pytest.mark.parametrize("params", [{}, {"matching": "rank"}, {"matching": "sort"}, {"normalise": True}])
def test_bfloat16_states_stay_near_float64(params):
    student, teacher = make_models(False, seed=5)
    exact = run(student.recorded(), teacher.recorded(), **(SMALL | params))
    rounded = [
        Recorded(side.labels, hidden=side.hidden.detach().bfloat16(), head=side.head.detach().bfloat16())
        for side in (student, teacher)
    ]
    found = run(*rounded, **(SMALL | params))
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=0.03, atol=0)
    for name, gradient in found.gradients.items():
        distance = (gradient.double() - exact.gradients[name]).norm() / exact.gradients[name].norm()
        assert distance < 0.15, f"{name}: {distance:.3f}"


def test_long_answers_far_apart_do_not_underflow():
    """Costs of 2 at the smallest lambda, in float32: a plan of whole rows and columns all the same."""
    n = 40
    labels = torch.zeros(1, n, dtype=torch.long)
    sides = [
        Recorded(labels, logits=torch.full((1, n, 4), -30.0).index_fill(2, torch.tensor(place), 30.0))
        for place in (0, 3)
    ]
    params = {"matching": "rank", "regularisation": 0.05, "gamma": 1.0, "sd_temperature": 1.0, "k": 4}
    found = run(sides[0], sides[1], **params)
    assert found.loss.isfinite() and found.gradients["student_hidden"].isfinite().all()


# The released code.


def test_further_terms_of_the_released_code_are_inert():
    """As the module says: SL is log k and SD nothing, whatever the student says; HAD alone is trained with."""
    torch.manual_seed(0)
    labels = torch.randint(60, (2, 12))
    student, teacher = (Recorded(labels, logits=3 * torch.randn(2, 12, 60).double()) for _ in range(2))

    def gradient(term: str) -> Tensor:
        found = replay({"ot": (MultiLevelOT, RELEASED, 1.0)}, student, teacher, same_tokens=False, only=(f"ot/{term}",))
        if term == "sl":
            assert abs(found.loss / 0.1 - math.log(50)) < 0.01
        return found.gradients["student_hidden"].norm()

    had, sl, sd = (gradient(term) for term in ("had", "sl", "sd"))
    assert sl < 1e-3 * had and sd < 1e-3 * had
    papers = run(student, teacher).terms
    assert papers["ot/sl"] > 0.1 * papers["ot/had"]
