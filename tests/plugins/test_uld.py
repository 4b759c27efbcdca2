from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import D, Recording, S, V, W, assert_same, make_models, make_pair, make_recording
from torch import Tensor

from kdzoo import KdzooError, Logits
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_uld import ULD

SHARED = {0: 3, 2: 7, 3: 0, 7: 8, 10: 1}
"""Teacher's token -> the student's that says the same."""


def student_ids(shared: Mapping[int, int] = SHARED, w: int = W) -> Tensor:
    return torch.tensor([shared.get(token, -1) for token in range(w)])


def run(student: Recording, teacher: Recording, same: bool = False, **params: Any) -> Replay:
    return replay(
        {"kd": (ULD, params, 1.0)},
        student.recorded(),
        teacher.recorded(),
        same_tokens=same,
        student_ids=student_ids() if params.get("hybrid") else None,
        chunk_bytes=400,
    )


def leaves(student: Recording) -> dict[str, Tensor]:
    return {"student_hidden": student.hidden, "student_head": student.head}


# The formula, sequence by sequence and token by token.


def distributions(side: Recording, b: int, tau: float, late: bool) -> Tensor:
    positions = side.rows(b).nonzero()[:, 0] + int(late)
    return (side.hidden[b, positions] @ side.head.T / tau).softmax(-1)


def groups(student: Recording, teacher: Recording, b: int, skips: tuple[bool, bool], text: bool) -> list[Any]:
    """(student's rows, teacher's rows), counted in the sequence."""
    sizes = [int(side.rows(b).sum()) - skip for side, skip in zip((student, teacher), skips, strict=True)]
    if not text:
        return [([k], [k]) for k in range(max(0, min(sizes)))]
    found = []
    for span in range(student.chunks.shape[-1]):
        rows = [side.chunks[b, side.rows(b), span].nonzero()[:, 0].tolist() for side in (student, teacher)]
        if all(group and group[-1] < size for group, size in zip(rows, sizes, strict=True)):
            found.append(tuple(rows))
    return found


def merged(p: Tensor, gold: Tensor, group: list[int], first: bool) -> Tensor:
    base = group[0] if first else group[-1]
    value = p[base]
    for row in group:
        if row != base:
            value = value * p[row, gold[row]].clamp_min(1e-8)
    return value


def ranked(p: Tensor, q: Tensor) -> Tensor:
    size = max(len(p), len(q))
    p, q = (torch.cat([x.sort(descending=True).values, x.new_zeros(size - len(x))]) for x in (p, q))
    return (p - q).abs().sum()


def divergence(p: Tensor, q: Tensor, beta: float) -> Tensor:
    p, q = p.clamp_min(1e-8), q.clamp_min(1e-8)
    if beta in (0, 1):
        return (p * (p / q).log()).sum() if beta == 0 else (q * (q / p).log()).sum()
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


def hybrid(p: Tensor, q: Tensor, beta: float, weights: tuple[float | None, float | None]) -> Tensor:
    theirs, mine = list(SHARED), list(SHARED.values())
    rest_t = [token for token in range(len(p)) if token not in theirs]
    rest_s = [token for token in range(len(q)) if token not in mine]
    share = len(theirs) / len(p) if weights[0] is None else weights[0]
    rest = 1 - share if weights[1] is None else weights[1]
    return share * divergence(p[theirs], q[mine], beta) + rest * ranked(p[rest_t], q[rest_s])


def loss(student: Recording, teacher: Recording, same: bool = False, **params: Any) -> Tensor:
    read = ULD.Params(**params)
    total, rows, sequences = torch.zeros(()).double(), 0, 0
    for b in range(len(student)):
        q = distributions(student, b, read.student_temperature, read.window == "late")
        p = distributions(teacher, b, read.teacher_temperature, read.window == "late").detach()
        skips = read.skip_student_eos, read.skip_teacher_eos
        together = groups(student, teacher, b, skips, read.align == "text" and not same)
        of_sequence = torch.zeros(()).double()
        for mine, theirs in together:
            one_q = merged(q, student.gold(b), mine, read.base == "first")
            one_p = merged(p, teacher.gold(b), theirs, read.base == "first")
            weights = read.matched_weight, read.unmatched_weight
            of_sequence = of_sequence + (
                hybrid(one_p, one_q, read.beta, weights) if read.hybrid else ranked(one_p, one_q)
            )
        total = total + (of_sequence / max(1, len(together)) if read.mean == "sequences" else of_sequence)
        rows, sequences = rows + len(q), sequences + 1
    return total / (sequences if read.mean == "sequences" else rows)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"student_temperature": 1.5},
        {"teacher_temperature": 0.7},
        {"skip_teacher_eos": False},
        {"skip_student_eos": False},
        {"mean": "rows", "skip_student_eos": False, "skip_teacher_eos": False},
        {"align": "text"},
        {"align": "text", "skip_student_eos": False, "skip_teacher_eos": False, "student_temperature": 0.8},
        {"align": "text", "base": "first", "skip_teacher_eos": False},
        {"align": "text", "base": "first", "window": "late", "mean": "rows"},
        {"window": "late", "skip_student_eos": False, "skip_teacher_eos": False},
        {"hybrid": True},
        {"hybrid": True, "beta": 0.2, "align": "text"},
        {"hybrid": True, "beta": 0.0, "align": "text", "mean": "rows"},
        {"hybrid": True, "beta": 1.0, "matched_weight": 0.3},
        {"hybrid": True, "matched_weight": 0.4, "unmatched_weight": 0.9, "window": "late"},
        {"hybrid": True, "unmatched_weight": 2.0},
    ],
    ids=lambda params: " ".join(f"{name}={value}" for name, value in params.items()) or "defaults",
)
def test_every_reading_is_its_formula_in_value_and_gradient(params):
    student, teacher = make_models(False)
    found = run(student, teacher, **params)
    assert found.loss.abs() > 1e-3
    assert_same(found, loss(student, teacher, **params), leaves(student))


def test_the_larger_vocabulary_may_be_the_students():
    torch.manual_seed(3)
    student, teacher = make_recording([4, 3], S, W, trains=True), make_recording([3, 5], D, V)
    assert_same(run(student, teacher), loss(student, teacher), leaves(student))


@pytest.mark.parametrize("align", ["position", "text"])
def test_with_one_tokenizer_every_token_is_its_own_group(align):
    student, teacher = make_models(True)
    assert_same(run(student, teacher, same=True, align=align), loss(student, teacher), leaves(student))


def test_what_the_teachers_entries_are_called_does_not_matter():
    student, teacher = make_models(False)
    renamed = replace(teacher, head=teacher.head[torch.randperm(W)])
    torch.testing.assert_close(run(student, teacher).loss, run(student, renamed).loss)


def test_a_student_that_is_its_teacher_is_left_alone():
    student, _ = make_models(True)
    found = run(student, student, same=True)
    assert found.loss == 0
    assert all((gradient == 0).all() for gradient in found.gradients.values())


# Which rows it is about.


def only(side: Recording, sequences: list[int], padding: int) -> Recording:
    """These sequences, with so many positions behind them."""

    def part(x: Tensor, fill: float = 0) -> Tensor:
        return F.pad(x.detach()[sequences], (*(0, 0) * (x.ndim - 2), 0, padding), value=fill)

    assert side.chunks is not None
    return Recording(
        part(side.labels, -100), part(side.ids), part(side.hidden, 7.0), side.head, side.embed, part(side.chunks)
    )


@pytest.mark.parametrize("params", [{}, {"align": "text"}, {"mean": "rows"}, {"hybrid": True, "align": "text"}])
@settings(deadline=None, max_examples=10)
@given(order=st.permutations([0, 1, 2]), cut=st.integers(1, 2), padding=st.integers(0, 3))
def test_a_sequence_depends_on_itself_alone(params, order, cut, padding):
    student, teacher = make_models(False)
    whole = run(student, teacher, **params)
    counts = {"rows": whole.tokens, "sequences": 3.0}
    per = params.get("mean", "sequences")
    total, gradient = torch.zeros(()).double(), torch.zeros_like(student.hidden)
    for part in (order[:cut], order[cut:]):
        found = run(only(student, part, padding), only(teacher, part, padding), **params)
        share = (found.tokens if per == "rows" else len(part)) / counts[per]
        total = total + found.loss * share
        gradient[part] = found.gradients["student_hidden"][:, : gradient.shape[1]] * share
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(gradient, whole.gradients["student_hidden"])


@pytest.mark.parametrize("align", ["position", "text"])
def test_rows_without_a_partner_get_no_gradient(align):
    student, teacher = make_models(False)
    gradient = run(student, teacher, align=align).gradients["student_hidden"]
    learns = gradient.abs().sum(-1) > 0
    for b in range(len(student)):
        together = groups(student, teacher, b, (True, True), align == "text")
        rows = student.rows(b).nonzero()[:, 0]
        expected = torch.zeros_like(learns[b])
        expected[rows[[row for mine, _ in together for row in mine]]] = True
        assert learns[b].equal(expected)


@pytest.mark.parametrize("rows", [([0], [0]), ([2, 3], [0, 0]), ([0, 0], [2, 3]), ([1, 1], [1, 1])])
@pytest.mark.parametrize("params", [{}, {"align": "text"}, {"window": "late"}, {"hybrid": True}])
def test_without_a_group_nothing_is_learnt(rows, params):
    student, teacher = make_models(False, rows=rows)
    found = run(student, teacher, **params)
    assert found.loss == 0
    assert found.terms.keys() == run(*make_models(False), **params).terms.keys()
    assert all((gradient == 0).all() for gradient in found.gradients.values())


# Numbers at their limits.


@pytest.mark.parametrize("base", ["first", "last"])
@pytest.mark.parametrize("params", [{}, {"hybrid": True}, {"hybrid": True, "beta": 0.0}, {"hybrid": True, "beta": 1.0}])
def test_excluded_tokens_leave_loss_and_gradient_finite(params, base):
    torch.manual_seed(0)
    q, p = torch.randn(5, V).double(), torch.randn(4, W).double()
    labels, group = (torch.randint(V, (5,)), torch.randint(W, (4,))), ([0, 0, 1, 2, 2], [0, 1, 1, 2])
    q[:, [1, 4, 7]], p[:, [0, 2, 5]] = -torch.inf, -torch.inf
    q[0, labels[0][0]] = q[4, labels[0][4]] = p[1, labels[1][1]] = p[2, labels[1][2]] = -torch.inf
    q.requires_grad_()
    names = ("student_answer", "teacher_answer")
    answers = {
        name: Logits(name, x, gold, values={"weight": torch.ones(len(g)).double()}, group=torch.tensor(g), groups=3)
        for name, x, gold, g in zip(names, (q, p), labels, group, strict=True)
    }
    made = ULD(ULD.Params(align="text", base=base, **params), make_pair(V, W, student_ids(), same_tokens=False), {})
    found = torch.stack([value for value, _ in made.answers(**answers).sums.values()]).sum()
    expected = torch.zeros(()).double()
    for g in range(3):
        one_q, one_p = (
            merged(x.softmax(-1), label, [row for row, of in enumerate(groups) if of == g], base == "first")
            for x, label, groups in zip((q, p), labels, group, strict=True)
        )
        hybrids = hybrid(one_p, one_q, params.get("beta", 0.5), (None, None))
        expected = expected + (hybrids if params else ranked(one_p, one_q))
    torch.testing.assert_close(found, expected)
    for gradient in zip(
        *(torch.autograd.grad(value, q, retain_graph=True) for value in (found, expected)), strict=True
    ):
        assert gradient[0].isfinite().all()
        torch.testing.assert_close(*gradient)


@pytest.mark.parametrize("params", [{}, {"align": "text", "hybrid": True}])
def test_bfloat16_logits_are_compared_in_float32(params):
    student, teacher = make_models(False)
    q, p = ((side.hidden.detach() @ side.head.detach().T).bfloat16() for side in (student, teacher))

    def found(dtype: torch.dtype) -> Replay:
        return replay(
            {"kd": (ULD, params, 1.0)},
            Recorded(student.labels, logits=q.to(dtype), chunks=student.chunks),
            Recorded(teacher.labels, logits=p.to(dtype), chunks=teacher.chunks),
            same_tokens=False,
            student_ids=student_ids(),
        )

    low, high = found(torch.bfloat16), found(torch.float64)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss.double(), high.loss, rtol=1e-5, atol=1e-6)
    # The gradient itself is rounded to the states' eight bits.
    torch.testing.assert_close(
        low.gradients["student_hidden"].double(), high.gradients["student_hidden"], rtol=1e-2, atol=1e-4
    )


def test_what_a_merged_group_hardly_believes_counts_a_little_and_teaches_nothing():
    student, teacher = make_models(False)
    q = torch.zeros(*student.labels.shape, V).double()
    b, mine = next(
        (b, mine) for b in range(3) for mine, _ in groups(student, teacher, b, (True, True), True) if len(mine) > 1
    )
    first = student.rows(b).nonzero()[:, 0][mine[0]]
    q[b, first, student.labels[b, first]] = -60.0
    leaf = q.clone().requires_grad_()
    side = replace(student, hidden=leaf, head=torch.eye(V).double().requires_grad_())
    found = run(side, teacher, align="text")
    assert_same(found, loss(side, teacher, align="text"), {"student_hidden": leaf, "student_head": side.head})
    assert (found.gradients["student_hidden"][b, first] == 0).all()


# Entries of both vocabularies.


def test_entries_that_all_match_leave_none_to_be_ranked():
    student, teacher = make_models(True)
    found = replay(
        {"kd": (ULD, {"hybrid": True}, 1.0)}, student.recorded(), teacher.recorded(), same_tokens=True, chunk_bytes=400
    )
    assert found.terms["kd/unmatched"] == 0
    assert found.terms["kd/matched"] > 0


def test_vocabularies_without_a_common_entry_are_refused():
    student, teacher = make_models(False)
    with pytest.raises(KdzooError, match=r"the vocabularies of student and teacher share no entry"):
        replay({"kd": (ULD, {"hybrid": True}, 1.0)}, student.recorded(), teacher.recorded(), same_tokens=False)


# What it asks for.


def test_needs():
    plain = ULD.needs(ULD.Params(), same_tokens=False)
    assert plain.student == plain.teacher == {"hidden.last"}
    assert not plain.aligned and not plain.batch_coupled and plain.tokenizers == "any"
    assert ULD.needs(ULD.Params(align="text"), same_tokens=False).aligned
    assert not ULD.needs(ULD.Params(align="text"), same_tokens=True).aligned
    assert ULD.needs(ULD.Params(window="late"), same_tokens=False).student == {"hidden.last@all"}


def test_it_stands_beside_other_losses():
    student, teacher = make_models(False)
    both = replay(
        {"sft": (CrossEntropy, {}, 1.0), "kd": (ULD, {"align": "text"}, 1.5)},
        student.recorded(),
        teacher.recorded(),
        same_tokens=False,
        chunk_bytes=400,
    )
    alone = run(student, teacher, align="text")
    torch.testing.assert_close(both.loss, both.terms["sft/cross_entropy"] + 1.5 * alone.loss)
