"""Version 2 of dual-space distillation, beside its formulas written out row by row with pseudo-inverses of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import D, Recording, S, V, W, assert_same, make_models, make_pair, make_weights, nll, seen
from torch import Tensor
from torch.linalg import pinv

from kdzoo import Vocabulary
from kdzoo.testing import Replay, replay
from kdzoo_dskd_v2 import DSKDv2

IDS = torch.tensor([0, 4, -1, 2, 1, -1, 8, 7, 3, -1, 5])  # [W]: the student's token for each of the teacher's
END = 7
SHAPES = {"kd.teacher_to_student.weight": (S, D)}
TRAINED = SHAPES | {"kd.student_to_teacher.weight": (D, S)}


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def adaptive(p: Tensor, q: Tensor, mass: float) -> Tensor:
    rows = []
    for one_p, one_q in zip(p, q, strict=True):
        order = one_p.argsort()
        tail = order[one_p[order].cumsum(0) <= mass]
        gap = (one_p - one_q).abs().detach()
        share = 1 - gap[tail].sum() / gap.sum()
        rows.append(share * kl(one_p, one_q) + (1 - share) * kl(one_q, one_p))
    return torch.stack(rows) if rows else p.sum(-1)


DIVERGENCES = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "js": lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    "skew_forward_kl": lambda p, q: kl(p, 0.3 * p + 0.7 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.7 * p + 0.3 * q),
    "adaptive_kl": lambda p, q: adaptive(p, q, 0.4),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
}
OPTIONS = {"skew_forward_kl": {"skew": 0.3}, "skew_reverse_kl": {"skew": 0.3}, "adaptive_kl": {"head_mass": 0.4}}


@dataclass
class Pair:
    """Two models, which of their rows are aligned, and the student's token for each of the teacher's."""

    student: Recording
    teacher: Recording
    pairs: list[tuple[int, int]]
    ids: Tensor
    same: bool

    def shared(self, top: int | None = None) -> tuple[Tensor, Tensor]:
        """Entries of the student and of the teacher that say the same, in the student's order."""
        found = sorted((s, t) for t, s in enumerate(self.ids.tolist()) if s >= 0 and (self.same or s != END))
        mine, yours = torch.tensor(found[:top]).view(-1, 2).T
        return mine, yours

    def packed(self, side: Recording) -> Tensor:
        return side.hidden[side.labels != -100]


def make_aligned(same: bool, seed: int = 3) -> Pair:
    student, teacher = make_models(same, seed=seed)
    if same:
        n = int((student.labels != -100).sum())
        return Pair(student, teacher, [(i, i) for i in range(n)], torch.arange(V), True)
    # Rows 4, 1, 5 and 3, 1, 6 of three sequences: some of each are in no pair.
    return Pair(student, teacher, [(0, 0), (2, 1), (3, 2), (5, 4), (6, 6), (7, 7), (9, 9)], IDS, False)


def make(same: bool, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> tuple[Pair, dict[str, Tensor]]:
    """With weights, of which those to the student's space are not far from the solution: some rows agree."""
    pair, weights = make_aligned(same), make_weights(shapes)
    solution = start_of(pair).T
    weights["kd.teacher_to_student.weight"] = (solution + torch.randn(S, D).double() / 8).requires_grad_()
    return pair, weights


def start_of(pair: Pair, top: int | None = None) -> Tensor:
    """[D, S]"""
    mine, yours = pair.shared(top)
    return pair.teacher.head[yours].T @ pinv(pair.student.head.detach()[mine].T)


def run(pair: Pair, weights: Mapping[str, Tensor], **params: Any) -> Replay:
    texts = Vocabulary([str(i) for i in range(max(V, W))], frozenset({END}), END)
    aligned = {} if pair.same else {"pairs": pair.pairs, "student_ids": pair.ids}
    return replay(
        {"kd": (DSKDv2, params, 1.0)},
        replace(pair.student.recorded(), vocabulary=texts),
        replace(pair.teacher.recorded(), vocabulary=texts),
        weights={name: weight.detach() for name, weight in weights.items()},
        same_tokens=pair.same,
        chunk_bytes=200,
        **aligned,
    )


def leaves(pair: Pair, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"student_hidden": pair.student.hidden, "student_head": pair.student.head, **weights}


def rows_of(
    pair: Pair,
    weights: Mapping[str, Tensor],
    divergence: str = "forward_kl",
    temperature: float = 2.0,
    top: int | None = None,
    **_: Any,
) -> dict[str, Tensor]:
    """Every value of every pair, and which of them count."""
    tau, measure = temperature, DIVERGENCES[divergence]
    s, t = torch.tensor(pair.pairs).view(-1, 2).T
    h_s, h_t = pair.packed(pair.student)[s], pair.packed(pair.teacher)[t]
    w_s, w_t = pair.student.head, pair.teacher.head
    mine, yours = pair.shared(top)
    to_teacher = weights.get("kd.student_to_teacher.weight")
    p_s2t = w_s.detach()[mine].T @ pinv(w_t[yours].T) if to_teacher is None else to_teacher.T
    z, y, s2t = h_s @ w_s.T, h_t @ w_t.T, h_s @ p_s2t @ w_t.T
    target = pair.ids[y.argmax(-1)]
    heard = target >= 0
    found = {"s2t_kd": measure((y / tau).softmax(-1), (s2t / tau).softmax(-1)), "heard": heard}
    if "kd.teacher_to_student.weight" in weights:
        t2s = h_t @ weights["kd.teacher_to_student.weight"].T @ w_s.detach().T
        found |= {
            "t2s_ce": nll(t2s, target.clamp_min(0)),
            "t2s_kd": measure((t2s.detach() / tau).softmax(-1), (z / tau).softmax(-1)),
            "agrees": heard & (t2s.argmax(-1) == target),
        }
    return found


def mean_over_pairs(rows: Mapping[str, Tensor], mask: bool = True) -> Tensor:
    n, heard = len(rows["heard"]), rows["heard"]
    total = rows["s2t_kd"][heard].sum() + rows["t2s_ce"][heard].sum()
    return (total + rows["t2s_kd"][rows["agrees"] if mask else heard].sum()) / n


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("same", [True, False], ids=["one tokenizer", "two tokenizers"])
def test_the_formula_over_pairs(same, divergence):
    pair, weights = make(same)
    params = {"divergence": divergence, "temperature": 1.5}
    rows = rows_of(pair, weights, **params)
    assert 0 < rows["agrees"].sum() < len(rows["agrees"])
    found = run(pair, weights, **params, **OPTIONS.get(divergence, {}))
    assert_same(found, mean_over_pairs(rows), leaves(pair, weights), at=1e-9)
    assert found.watched["kd/t2s_agreement"] == rows["agrees"].sum() / rows["heard"].sum()
    assert found.watched["kd/heard"] == rows["heard"].float().mean()


def test_two_tokenizers_have_rows_that_are_not_heard():
    rows = rows_of(*make(False))
    assert 0 < rows["heard"].sum() < len(rows["heard"])


@pytest.mark.parametrize("same", [True, False], ids=["one tokenizer", "two tokenizers"])
def test_without_a_mask_every_row_that_is_heard_counts(same):
    pair, weights = make(same)
    expected = mean_over_pairs(rows_of(pair, weights), mask=False)
    assert_same(run(pair, weights, mask=False), expected, leaves(pair, weights), at=1e-9)


@pytest.mark.parametrize("threshold", [1.0, 0.0])
@pytest.mark.parametrize("same", [True, False], ids=["one tokenizer", "two tokenizers"])
def test_means_of_a_batch_are_of_the_rows_that_count(same, threshold):
    pair, weights = make(same)
    rows = rows_of(pair, weights)
    learns = rows["agrees"] if threshold == 1.0 else rows["heard"]
    parts = {"t2s_ce": rows["heard"], "t2s_kd": learns, "s2t_kd": rows["heard"]}
    expected = torch.stack([rows[name][counts].mean() for name, counts in parts.items()]).sum()
    found = run(pair, weights, mean="batch", threshold=threshold)
    assert_same(found, expected, leaves(pair, weights), at=1e-9)
    assert DSKDv2.needs(DSKDv2.Params(mean="batch"), same).batch_coupled
    assert not DSKDv2.needs(DSKDv2.Params(), same).batch_coupled


def test_a_batch_in_which_nothing_agrees_teaches_nothing_in_the_students_space():
    pair = make_aligned(True)
    weights = {"kd.teacher_to_student.weight": -start_of(pair).T}  # what was likeliest is now least likely
    rows = rows_of(pair, weights)
    assert not rows["agrees"].any()
    for mean in ("rows", "batch"):
        found = run(pair, weights, mean=mean)
        assert found.terms["kd/t2s_kd"] == 0
        assert found.loss.isfinite()


@pytest.mark.parametrize("same", [True, False], ids=["one tokenizer", "two tokenizers"])
@pytest.mark.parametrize("top", [None, 4])
def test_the_start_solves_for_the_teachers_logits(same, top):
    pair, weights = make(same)
    found = run(pair, weights, top_vocabulary=top)
    torch.testing.assert_close(found.start["kd.teacher_to_student.weight"], start_of(pair, top).T)
    rows = rows_of(pair, weights, top=top)
    assert_same(found, mean_over_pairs(rows), leaves(pair, weights), at=1e-9)


def test_ends_say_nothing_to_the_heads_of_two_vocabularies():
    pair, weights = make(False)
    assert END in pair.ids
    before = run(pair, weights).start
    pair.teacher.head[pair.ids == END] += 1.0
    assert before.keys() == run(pair, weights).start.keys()
    torch.testing.assert_close(before, run(pair, weights).start, rtol=0, atol=0)


def test_where_the_student_is_wide_enough_its_space_begins_as_the_teachers():
    pair = make_aligned(True)
    torch.manual_seed(3)
    for side in (pair.student, pair.teacher):
        side.head = torch.randn(V, side.head.shape[1]).double()
    pair.student.head = torch.randn(V, V).double()
    pair.student.hidden = torch.randn(*pair.student.labels.shape, V).double()
    weights = {"kd.teacher_to_student.weight": torch.zeros(V, D).double()}
    weights = {name: run(pair, weights).start[name] for name in weights}
    found = run(pair, weights)
    assert found.watched["kd/t2s_agreement"] == 1
    y = pair.packed(pair.teacher) @ pair.teacher.head.T
    torch.testing.assert_close(found.terms["kd/t2s_ce"], nll(y, y.argmax(-1)).mean())


def test_a_random_start_is_left_as_it_is():
    pair, weights = make(True)
    torch.manual_seed(5)
    found = run(pair, weights, start="random").start
    torch.manual_seed(5)
    expected = torch.nn.Linear(D, S, bias=False, dtype=torch.float64).weight
    torch.testing.assert_close(found["kd.teacher_to_student.weight"], expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("same", [True, False], ids=["one tokenizer", "two tokenizers"])
def test_a_trained_projector_to_the_teachers_space(same):
    pair, weights = make(same, TRAINED)
    expected = mean_over_pairs(rows_of(pair, weights))
    assert_same(run(pair, weights, student_to_teacher="trained"), expected, leaves(pair, weights), at=1e-9)


def test_one_space_alone():
    pair, weights = make(False)
    rows = rows_of(pair, weights)
    n, heard, agrees = len(rows["heard"]), rows["heard"], rows["agrees"]
    student = (rows["t2s_ce"][heard].sum() + rows["t2s_kd"][agrees].sum()) / n
    assert_same(run(pair, weights, spaces="student"), student, leaves(pair, weights), at=1e-9)
    teacher = rows_of(pair, {})["s2t_kd"][heard].sum() / n
    assert_same(run(pair, {}, spaces="teacher"), teacher, leaves(pair, {}), at=1e-9)


def test_heads_are_read_only_where_a_projector_is_solved_for():
    assert "head.weight" in DSKDv2.needs(DSKDv2.Params(), True).student
    for params in (
        {"start": "random", "student_to_teacher": "trained"},
        {"start": "random", "spaces": "student"},
        {"student_to_teacher": "trained", "spaces": "teacher"},
    ):
        needs = DSKDv2.needs(DSKDv2.Params.model_validate(params), True)
        assert "head.weight" not in needs.student | needs.teacher


def test_a_teacher_with_more_entries_than_the_student_is_heard_where_it_predicts_a_shared_one():
    pair, weights = make(True)
    pair.teacher.head = torch.cat([pair.teacher.head, 3 * torch.randn(2, D).double()])
    pair.ids = torch.cat([torch.arange(V), torch.tensor([-1, -1])])
    rows = rows_of(pair, weights)
    assert 0 < rows["heard"].sum() < len(rows["heard"])
    assert_same(run(pair, weights), mean_over_pairs(rows), leaves(pair, weights), at=1e-9)


def alone(pair: Pair, sequences: list[int]) -> Pair:
    """These sequences in this order, with their pairs."""
    first = [[0, *(side.labels != -100).sum(1).cumsum(0).tolist()] for side in (pair.student, pair.teacher)]
    sides, starts = [], []
    for side, begins in zip((pair.student, pair.teacher), first, strict=True):
        parts = (side.labels[sequences], side.ids[sequences], side.hidden[sequences])
        sides.append(Recording(*parts, side.head, side.embed))
        sizes = [begins[b + 1] - begins[b] for b in sequences]
        starts.append([sum(sizes[:i]) for i in range(len(sizes))])
    pairs = [
        (s - first[0][b] + starts[0][i], t - first[1][b] + starts[1][i])
        for i, b in enumerate(sequences)
        for s, t in pair.pairs
        if first[0][b] <= s < first[0][b + 1]
    ]
    return Pair(*sides, pairs, pair.ids, pair.same)


@settings(max_examples=15, deadline=None)
@given(same=st.booleans(), order=st.permutations([0, 1, 2]), cut=st.integers(1, 2))
def test_a_split_and_another_order_change_nothing(same, order, cut):
    pair, weights = make(same)
    together = run(pair, weights)
    parts = [alone(pair, part) for part in (order[:cut], order[cut:])]
    apart = sum(run(part, weights).loss * len(part.pairs) for part in parts)
    torch.testing.assert_close(apart / len(pair.pairs), together.loss)


@pytest.mark.parametrize("mean", ["rows", "batch"])
@pytest.mark.parametrize("same", [True, False], ids=["one tokenizer", "two tokenizers"])
def test_no_rows_give_zero_and_the_same_terms(same, mean):
    pair, weights = make(same)
    terms = run(pair, weights, mean=mean).terms.keys()
    pair.student.labels = torch.full_like(pair.student.labels, -100)
    pair.teacher.labels = torch.full_like(pair.teacher.labels, -100)
    pair.pairs = []
    found = run(pair, weights, mean=mean)
    assert found.loss == 0
    assert found.terms.keys() == terms
    assert all((gradient == 0).all() for gradient in found.gradients.values())


def test_no_pairs_give_zero():
    pair, weights = make(False)
    pair.pairs = []
    found = run(pair, weights)
    assert found.loss == 0
    assert all((gradient == 0).all() for gradient in found.gradients.values())


def test_bfloat16_is_close_to_float64():
    pair, weights = make(True)
    weights = {name: weight.detach() for name, weight in weights.items()}
    exact = run(pair, weights, mask=False)

    def rounded(side: Recording) -> Recording:
        halves = (tensor.detach().bfloat16() for tensor in (side.hidden, side.head, side.embed))
        return Recording(side.labels, side.ids, *halves)

    coarse = Pair(rounded(pair.student), rounded(pair.teacher), pair.pairs, pair.ids, True)
    found = run(coarse, weights, mask=False)
    assert found.gradients["student_hidden"].dtype == torch.bfloat16
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=0.03, atol=0)
    for name, gradient in exact.gradients.items():
        difference = (found.gradients[name].double() - gradient).norm()
        assert difference < 0.1 * gradient.norm(), name
    start = found.start["kd.teacher_to_student.weight"].double()
    torch.testing.assert_close(start, exact.start["kd.teacher_to_student.weight"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("excluded", ["teacher", "student", "t2s", "s2t"])
def test_excluded_tokens_leave_loss_and_gradients_finite(excluded):
    torch.manual_seed(0)
    loss = DSKDv2(DSKDv2.Params(), make_pair(V, V, torch.arange(V)), {})
    logits = {name: torch.randn(5, V).double() for name in ("student", "teacher", "t2s", "s2t")}
    top = logits["teacher"].argmax(-1)
    logits["t2s"][:3] = logits["teacher"][:3]  # which agree
    logits[excluded][:, 4] = -torch.inf
    if excluded != "teacher":
        logits[excluded][4, top[4]] = -torch.inf
    for tensor in logits.values():
        tensor.requires_grad_()
    terms = loss.spaces(**seen(**logits))
    value = torch.stack([value for value, _ in terms.sums.values()]).sum()
    assert value.isfinite()
    trained = [logits[name] for name in ("student", "t2s", "s2t")]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, trained))
