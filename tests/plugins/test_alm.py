from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import Recording, S, assert_same, make_models
from torch import Tensor

from kdzoo import Batch, KdzooError, Logits, ModelInfo, ModelPair, Side, Step, View, Vocabulary, ops
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_alm import Alm

TEXTS = ("a", " b", "c", "\nd", "e", "\tf", "<end>", "g", " ", "h", "\u00a0i")
"""Of which 1, 3, 5 and 8 begin with a space, a line or a tab, and 6 is special."""
CLOSING = [1, 3, 5, 6, 8]
END = 6


def vocabulary_of(model: Recording) -> Vocabulary:
    return Vocabulary(TEXTS[: len(model.head)], frozenset({END}), END)


def recorded(model: Recording) -> Recorded:
    return replace(model.recorded(), vocabulary=vocabulary_of(model))


def run(student: Recording, teacher: Recording, same: bool = False, **params: Any) -> Replay:
    return replay({"kd": (Alm, params, 1.0)}, recorded(student), recorded(teacher), same_tokens=same, chunk_bytes=300)


def log1m(x: Tensor) -> Tensor:
    return (1 - x.exp()).log()


def distance(kind: str, a: Tensor, b: Tensor, tau: float, order: float, e: float) -> Tensor:
    """From log-probabilities of the teacher and the student."""
    p, q = (a / tau - e).exp(), (b / tau - e).exp()
    if kind == "binary_ce":
        return -(p * q.log() + (1 - p) * (1 - q).log())
    if kind == "reverse_binary_kl":
        return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    if kind == "binary_kl_temp_limit":
        return (a - b) + (a - e) * ((b - e) / (a - e)).log()
    if kind == "abs":
        return (a - b).abs()
    if kind == "abs_exp":
        return (p - q).abs()
    if kind == "renyi":
        x, y = (a - e).exp(), (b - e).exp()
        return (x**order * y ** (1 - order) + (1 - x) ** order * (1 - y) ** (1 - order)).log() / (order - 1)
    r = (a - b) / tau
    return r**2 / 2 if kind == "joschu_k2" else r.exp() - 1 - r


Part = tuple[Tensor, Tensor, Tensor, Tensor, int]
"""A chunk: log-probabilities of teacher and student, of a boundary after it, and the teacher's tokens."""


def parts(
    student: Recording, teacher: Recording, b: int, closing: list[int], last_state: bool, same: bool
) -> list[Part]:
    """The chunks of one sequence, one by one."""
    rows = {m: x.rows(b).nonzero()[:, 0].tolist() for m, x in (("student", student), ("teacher", teacher))}
    if same:
        groups = [([i], [i]) for i in range(len(rows["student"]))]
    else:
        assert student.chunks is not None and teacher.chunks is not None
        groups = []
        for c in range(student.chunks.shape[-1]):
            mine = [i for i, t in enumerate(rows["student"]) if student.chunks[b, t, c]]
            yours = [i for i, t in enumerate(rows["teacher"]) if teacher.chunks[b, t, c]]
            if mine and yours:
                groups.append((mine, yours))
    found = []
    for mine, yours in groups:
        likelihood, after = {}, {}
        is_followed = True
        for model, side, members in (("teacher", teacher, yours), ("student", student, mine)):
            q = (side.hidden[b] @ side.head.T).softmax(-1)  # [T, V]
            places = [rows[model][i] for i in members]
            likelihood[model] = torch.stack([q[t, side.labels[b, t]].log() for t in places]).sum()
            after[model] = q[places[-1] + 1, closing].sum().log()
            is_followed &= places[-1] + 1 in rows[model]
        if not (is_followed or last_state):
            after = {model: torch.zeros(()).double() for model in after}
        found.append((likelihood["teacher"], likelihood["student"], after["teacher"], after["student"], len(yours)))
    return found


def joined(chunks: list[Part], threshold: float | None) -> list[Part]:
    groups: list[list[Part]] = [[]]
    for chunk in chunks:
        groups[-1].append(chunk)
        if threshold is None or chunk[2].exp() > threshold:
            groups.append([])
    return [(sum(c[0] for c in g), sum(c[1] for c in g), g[-1][2], g[-1][3], sum(c[4] for c in g)) for g in groups if g]


def expected(student: Recording, teacher: Recording, same: bool = False, **params: Any) -> Tensor:
    p = Alm.Params.model_validate(params)
    closing = [c for c in (CLOSING if p.boundary == "space" else [END]) if c < len(student.head)]
    total, chunks, groups, teacher_rows = torch.zeros(()).double(), 0, 0, 0
    for b in range(len(student)):
        teacher_rows += int(teacher.rows(b).sum())
        single = parts(student, teacher, b, closing, p.last_state, same)
        chunks += len(single)
        for a, q, after_a, after_q, tokens in joined(single, p.merge_below):
            groups += 1
            if p.append_boundary:
                a, q = a + after_a, q + after_q
            n = torch.tensor(float(tokens)).double()
            weight = {"chunk_count": 1.0, "token_count": n, "log1p_token_count": n.log1p()}[p.numerator]
            total = total + weight * distance(p.difference, a.detach(), q, p.temperature, p.order, p.epsilon)
    return total / {"chunk_count": chunks, "token_count": teacher_rows, "merged_chunk_count": groups}[p.denominator]


def leaves(student: Recording) -> dict[str, Tensor]:
    return {"student_hidden": student.hidden, "student_head": student.head}


DIFFERENCES = (
    "binary_ce",
    "reverse_binary_kl",
    "binary_kl_temp_limit",
    "abs",
    "abs_exp",
    "renyi",
    "joschu_k2",
    "joschu_k3",
)


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_every_difference(difference):
    student, teacher = make_models(False)
    params = {"difference": difference, "temperature": 20.0, "order": 1.7, "epsilon": 1e-4}
    found = run(student, teacher, **params)
    assert_same(found, expected(student, teacher, **params), leaves(student), at=1e-8)


@pytest.mark.parametrize("merge_below", [None, 0.0, 0.2, 0.4])
@pytest.mark.parametrize("append_boundary", [True, False])
@pytest.mark.parametrize("boundary", ["space", "end"])
@pytest.mark.parametrize("last_state", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_boundaries(same, last_state, boundary, append_boundary, merge_below):
    student, teacher = make_models(same, ([6, 1, 5], [6, 1, 6]))
    params = {"append_boundary": append_boundary, "boundary": boundary, "merge_below": merge_below}
    params |= {"last_state": last_state, "temperature": 10.0}
    found = run(student, teacher, same, **params)
    assert_same(found, expected(student, teacher, same, **params), leaves(student), at=1e-8)


@pytest.mark.parametrize("numerator", ["chunk_count", "token_count", "log1p_token_count"])
@pytest.mark.parametrize("denominator", ["chunk_count", "token_count", "merged_chunk_count"])
@pytest.mark.parametrize("merge_below", [None, 0.3])
def test_counts(numerator, denominator, merge_below):
    student, teacher = make_models(False, seed=2)
    params = {"numerator": numerator, "denominator": denominator, "merge_below": merge_below}
    found = run(student, teacher, **params)
    assert_same(found, expected(student, teacher, **params), leaves(student), at=1e-8)


def test_some_chunks_are_joined_and_some_are_not():
    student, teacher = make_models(False, seed=2)
    alone, joint, whole = (
        run(student, teacher, merge_below=value).watched["kd/teacher_tokens_per_chunk"] for value in (None, 0.3, 0.99)
    )
    assert alone < joint < whole


@pytest.mark.parametrize("merge_below", [None, 0.3, 0.99])
@pytest.mark.parametrize("alone", ["student", "teacher"])
def test_what_one_model_alone_has_is_left_out_also_between_joined_chunks(alone, merge_below):
    student, teacher = make_models(False, ([6, 3, 5], [5, 4, 6]), seed=2)
    lacks = {"student": teacher, "teacher": student}[alone]
    assert lacks.chunks is not None
    lacks.chunks[:, :, 1] = False
    found = run(student, teacher, merge_below=merge_below)
    assert_same(found, expected(student, teacher, merge_below=merge_below), leaves(student), at=1e-8)


def test_what_is_watched():
    student, teacher = make_models(False)
    found = run(student, teacher, merge_below=None, append_boundary=False).watched
    chunks = [part for b in range(3) for part in parts(student, teacher, b, [], False, False)]
    for place, model in enumerate(("teacher", "student")):
        mean = torch.stack([part[place] for part in chunks]).mean()
        torch.testing.assert_close(found[f"kd/{model}_log_likelihood"], mean.detach())


def test_the_temperature_limit():
    """The binary divergence times the temperature, where that is large."""
    student, teacher = make_models(False)
    tau = 1e5
    large, small = {"temperature": tau, "epsilon": 1e-13}, {"epsilon": 1e-13}
    plain = {"append_boundary": False, "merge_below": None}
    apart = expected(student, teacher, **plain, **large)
    together = expected(teacher_as_student(student, teacher), teacher, **plain, **large)
    limit = run(student, teacher, difference="binary_kl_temp_limit", **plain, **small).loss
    # The cross-entropy less its own teacher's entropy is the divergence.
    torch.testing.assert_close((tau * (apart - together)).detach(), limit, rtol=1e-3, atol=1e-4)


def teacher_as_student(student: Recording, teacher: Recording) -> Recording:
    """The teacher, in the place of the student, with as many chunks."""
    return replace(teacher, hidden=teacher.hidden.clone(), head=teacher.head.clone())


def only(recording: Recording, b: int) -> Recording:
    parts = (recording.labels, recording.ids, recording.hidden)
    chunks = None if recording.chunks is None else recording.chunks[b : b + 1]
    return Recording(*(part[b : b + 1] for part in parts), recording.head, recording.embed, chunks)


def chunk_count(student: Recording, teacher: Recording) -> int:
    return sum(len(parts(student, teacher, b, CLOSING, True, False)) for b in range(len(student)))


@pytest.mark.parametrize("params", [{}, {"last_state": True}, {"denominator": "merged_chunk_count"}])
def test_a_sequence_depends_on_its_neighbours_only_where_that_is_declared(params):
    student, teacher = make_models(False, ([6, 3, 5], [4, 2, 6]), seed=2)
    params = params | {"merge_below": 0.3}
    together = run(student, teacher, **params).loss * chunk_count(student, teacher)
    apart = torch.zeros(()).double()
    for b in range(len(student)):
        mine, yours = only(student, b), only(teacher, b)
        apart = apart + run(mine, yours, **params).loss * chunk_count(mine, yours)
    coupled = "denominator" in params
    assert torch.isclose(together, apart) != coupled
    assert Alm.needs(Alm.Params.model_validate(params), same_tokens=False).batch_coupled == coupled
    assert not Alm.needs(Alm.Params(), same_tokens=False).batch_coupled


def reordered(recording: Recording, order: list[int], padding: int) -> Recording:
    """The same sequences in another order, with so many positions of padding more."""

    def pad(values: Tensor, fill: float) -> Tensor:
        more = torch.full((len(order), padding, *values.shape[2:]), fill, dtype=values.dtype)
        return torch.cat([values[order], more], 1)

    assert recording.chunks is not None
    return Recording(
        pad(recording.labels, -100),
        pad(recording.ids, 0),
        pad(recording.hidden.detach(), 7.0).requires_grad_(recording.hidden.requires_grad),
        recording.head.detach().clone().requires_grad_(recording.head.requires_grad),
        recording.embed,
        pad(recording.chunks, False),
    )


@settings(max_examples=20, deadline=None)
@given(
    st.permutations(range(3)),
    st.integers(0, 3),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=3, max_size=3),
    st.booleans(),
)
def test_neither_order_nor_padding_matters(order, more, other, rows, last_state):
    mine, yours = ([*column] for column in zip(*rows, strict=True))
    student, teacher = make_models(False, (mine, yours), seed=3)
    params = {"last_state": last_state, "merge_below": 0.3}
    found = run(student, teacher, **params)
    again = run(reordered(student, order, more), reordered(teacher, order, other), **params)
    torch.testing.assert_close(again.loss, found.loss)
    for name in ("student_hidden", "student_head"):
        gradient = again.gradients[name]
        if name == "student_hidden":
            gradient = gradient[:, : student.hidden.shape[1]][torch.tensor(order).argsort()]
        torch.testing.assert_close(gradient, found.gradients[name])
    assert found.loss.isfinite()


@pytest.mark.parametrize("last_state", [True, False])
@pytest.mark.parametrize("rows", [([0, 0], [0, 0]), ([0, 3], [2, 0]), ([2, 0], [0, 3])])
def test_without_chunks_there_is_nothing_to_learn(rows, last_state):
    student, teacher = make_models(False, rows)
    found = run(student, teacher, last_state=last_state)
    assert found.loss == 0
    assert all((gradient == 0).all() for gradient in found.gradients.values())


@pytest.mark.parametrize("last_state", [True, False])
def test_only_scored_rows_learn(last_state):
    student, teacher = make_models(False)
    gradient = run(student, teacher, last_state=last_state).gradients["student_hidden"]
    scored = student.labels != -100
    assert (gradient[scored] != 0).any()
    # With the state at the last token, the position after the last row learns too.
    assert (gradient[~scored] != 0).any() == last_state


SPANS = torch.tensor([0, 0, 1, 2, 2])
IMPOSSIBLE = {
    "the student's gold tokens": ({"student"}, "gold"),
    "the teacher's gold tokens": ({"teacher"}, "gold"),
    "both models' gold tokens": ({"student", "teacher"}, "gold"),
    "boundaries": ({"student", "teacher"}, "boundaries"),
    "all but the gold tokens": ({"student", "teacher"}, "others"),
}


@pytest.mark.parametrize("which", IMPOSSIBLE)
@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("params", [{}, {"append_boundary": False, "merge_below": None}, {"temperature": 1.0}])
def test_impossible_tokens_leave_everything_finite(difference, which, params):
    torch.manual_seed(1)
    models, tokens = IMPOSSIBLE[which]
    info = ModelInfo(S, 11, 1, "test", Vocabulary(TEXTS, frozenset({END}), END))
    loss = Alm(Alm.Params(difference=difference, **params), ModelPair(info, info, False), {})
    labels = torch.tensor([0, 2, 4, 7, 9])
    n = torch.arange(5)
    ids = torch.zeros(1, 6, dtype=torch.long)
    side = Side(ids, torch.ones_like(ids), n, labels, n, torch.zeros_like(n), SPANS)
    leaves, values = {}, {}
    for model in ("student", "teacher"):
        logits = torch.randn(5, 11)
        gold = torch.nn.functional.one_hot(labels, 11).bool()
        masked = {"gold": gold & (n != 2)[:, None], "others": ~gold, "boundaries": torch.zeros_like(gold)}[tokens]
        if tokens == "boundaries":
            masked[:, CLOSING] = True
        if model in models:
            logits[masked] = -torch.inf
        leaves[model] = logits.requires_grad_()
        found = loss.outcome(Logits(model, logits, labels))
        values |= {f"outcome.{model}.{name}": value for name, value in found.items()}
    views = [View(side, {}, "kd", frozenset()) for _ in range(2)]
    step = Step(Batch(side, side, torch.zeros(0, 2), False, {}), *views, values=values)
    value, _ = loss.finish(step).sums["likelihood"]
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, leaves["student"])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_equal_likelihoods_have_no_gradient(difference):
    a = torch.tensor([-1e-6, -0.01, -0.7, -5.0, -1e4])
    b = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ops.LIKELIHOOD_DIFFERENCES[difference](a, b, 2.0).sum(), b)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-3)


def test_the_ratio_of_k3_is_cut_where_it_would_overflow_and_never_points_away():
    b = torch.tensor([-1.0, -79.0, -200.0, -1e6], requires_grad=True)
    value = ops.LIKELIHOOD_DIFFERENCES["joschu_k3"](torch.zeros(4), b, 2.0)
    (gradient,) = torch.autograd.grad(value.sum(), b)
    assert value.isfinite().all()
    assert (gradient[:2] < 0).all() and (gradient[2:] == 0).all()


def test_k3_of_a_small_ratio_keeps_its_digits():
    r = torch.tensor(1e-3)
    value = ops.LIKELIHOOD_DIFFERENCES["joschu_k3"](r - 1, -torch.ones(()), 2.0)
    torch.testing.assert_close(value, r.square() / 2, rtol=1e-2, atol=0)


def test_bfloat16_is_close():
    student, teacher = make_models(False)
    params = {"temperature": 5.0}
    exact = run(student, teacher, **params)

    def half(side: Recording) -> Recorded:
        return Recorded(
            side.labels,
            hidden=side.hidden.detach().bfloat16(),
            head=side.head.detach().bfloat16(),
            input_ids=side.ids,
            chunks=side.chunks,
            vocabulary=vocabulary_of(side),
        )

    found = replay({"kd": (Alm, params, 1.0)}, half(student), half(teacher), same_tokens=False, chunk_bytes=300)
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=0.02, atol=0.02)
    for name, gradient in exact.gradients.items():
        ours = found.gradients[name].double()
        assert (ours - gradient).norm() < 0.05 * gradient.norm()


def test_what_the_vocabulary_says_is_read_only_where_a_boundary_matters():
    plain = Alm.Params(append_boundary=False, merge_below=None, last_state=True)
    needs = Alm.needs(plain, same_tokens=False)
    assert not needs.vocabularies and not needs.student and not needs.teacher and needs.aligned
    assert Alm.needs(Alm.Params(), same_tokens=True).vocabularies
    assert not Alm.needs(Alm.Params(), same_tokens=True).aligned
    student, teacher = make_models(False)
    with pytest.raises(KdzooError, match=r"^replay: 'kd' reads what the student's vocabulary says"):
        replay({"kd": (Alm, {}, 1.0)}, student.recorded(), teacher.recorded(), same_tokens=False)


def test_a_head_may_be_longer_or_shorter_than_its_vocabulary():
    for vocabulary in (5, 20):
        info = ModelInfo(S, vocabulary, 1, "test", Vocabulary(TEXTS, frozenset({END}), END))
        mask = Alm(Alm.Params(), ModelPair(info, info, False), {}).get_buffer("student_boundary")
        assert mask.nonzero()[:, 0].tolist() == [token for token in CLOSING if token < vocabulary]


def test_the_order_1_is_refused():
    student, teacher = make_models(False)
    with pytest.raises(KdzooError, match=r"order: .*the limit 1 is a kl divergence"):
        run(student, teacher, order=1.0)
