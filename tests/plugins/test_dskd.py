from __future__ import annotations

import pytest
import torch
from recordings import D, Recording, S, assert_same, make_models, make_weights, nll
from torch import Tensor

from kdzoo import KdzooError
from kdzoo.testing import Replay, replay
from kdzoo_dskd import DSKD

SHAPES = {
    "kd.teacher_to_student.weight": (S, D),
    "kd.teacher_to_student.bias": (S,),
    "kd.student_to_teacher.weight": (D, S),
    "kd.student_to_teacher.bias": (D,),
}
QUERY = {"kd.query.weight": (2 * D, 2 * S), "kd.query.bias": (2 * D,)}


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def adaptive(p: Tensor, q: Tensor, head_mass: float) -> Tensor:
    """Row by row, as the authors describe it: unlikely tokens up to `head_mass` are the tail."""
    values = []
    for one_p, one_q in zip(p, q, strict=True):
        order = one_p.argsort()
        tail = order[one_p[order].cumsum(0) <= head_mass]
        gap = (one_p - one_q).abs().detach()
        g_tail = gap[tail].sum()
        g_head = gap.sum() - g_tail
        values.append((g_head * kl(one_p, one_q) + g_tail * kl(one_q, one_p)) / (g_head + g_tail))
    return torch.stack(values)


DIVERGENCES = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "js": lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    "skew_forward_kl": lambda p, q: kl(p, 0.3 * p + 0.7 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.7 * p + 0.3 * q),
    "adaptive_kl": lambda p, q: adaptive(p, q, 0.6),
    "total_variation": lambda p, q: 0.5 * (p - q).abs().sum(-1),
}
OPTIONS = {"skew_forward_kl": {"skew": 0.3}, "skew_reverse_kl": {"skew": 0.3}, "adaptive_kl": {"head_mass": 0.6}}


def run(student: Recording, teacher: Recording, weights: dict[str, Tensor], same: bool, **params: object) -> Replay:
    return replay(
        {"kd": (DSKD, params, 1.0)},
        student.recorded(),
        teacher.recorded(),
        weights={name: weight.detach() for name, weight in weights.items()},
        same_tokens=same,
        chunk_bytes=400,
    )


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"kd.{name}.weight"].T + weights[f"kd.{name}.bias"]


def leaves(student: Recording, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"student_hidden": student.hidden, "student_head": student.head, **weights}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identity(divergence):
    student, teacher = make_models(True)
    weights = make_weights(SHAPES)
    tau, total, rows = 1.5, torch.zeros(()).double(), 0
    for b in range(len(student)):
        scored = student.rows(b)
        t2s = linear(weights, "teacher_to_student", teacher.hidden[b, scored]) @ student.head.detach().T
        s2t = linear(weights, "student_to_teacher", student.hidden[b, scored]) @ teacher.head.T
        q = (student.logits(b) / tau).softmax(-1)
        total = total + nll(t2s, student.gold(b)).sum()
        total = total + DIVERGENCES[divergence]((t2s.detach() / tau).softmax(-1), q).sum()
        total = total + kl((teacher.logits(b) / tau).softmax(-1), (s2t / tau).softmax(-1)).sum()
        rows += int(scored.sum())
    options = OPTIONS.get(divergence, {})
    # A teacher's temperature counts only where attention aligns, as in the authors' code.
    found = run(
        student, teacher, weights, True, divergence=divergence, temperature=tau, teacher_temperature=3.0, **options
    )
    assert_same(found, total / rows, leaves(student, weights))


def attention_loss(
    student: Recording, teacher: Recording, weights: dict[str, Tensor], tau: float, teacher_tau: float, std: str
) -> Tensor:
    """Sequence by sequence; the standard deviations over its response rows, or as the authors take them."""
    embed_s, embed_t = student.embed, teacher.embed
    # The authors put token 0 wherever nothing is scored, and normalise over the whole padded batch.
    ids = teacher.ids.where(teacher.labels != -100, 0)
    labels = teacher.labels.where(teacher.labels != -100, 0)
    padded = torch.cat([embed_t[ids], embed_t[labels]], -1).std(), embed_t[labels].std(), teacher.hidden.std()
    total, rows = torch.zeros(()).double(), 0
    for b in range(len(student)):
        mine, theirs = student.rows(b), teacher.rows(b)
        e = torch.cat([embed_s[student.ids[b, mine]], embed_s[student.gold(b)]], -1)
        f_out = embed_t[teacher.gold(b)]
        f = torch.cat([embed_t[teacher.ids[b, theirs]], f_out], -1)
        h_t, h_s = teacher.hidden[b, theirs], student.hidden[b, mine]
        key_std, out_std, hidden_std = padded if std == "batch" else (f.std(), f_out.std(), h_t.std())
        scores = linear(weights, "query", e) @ (f / key_std).T / (2 * D) ** 0.5
        values = linear(weights, "teacher_to_student", h_t / hidden_std + f_out / out_std)
        t2s = scores.softmax(1) @ values @ student.head.detach().T
        s2t = scores.T.softmax(1) @ linear(weights, "student_to_teacher", h_s) @ teacher.head.T
        right = t2s.argmax(-1) == student.gold(b)
        target = (t2s.detach() / tau / teacher_tau).softmax(-1)
        total = total + nll(t2s, student.gold(b)).sum()
        total = total + kl(target, (student.logits(b) / tau).softmax(-1))[right].sum()
        total = total + kl((teacher.logits(b) / tau).softmax(-1), (s2t / tau).softmax(-1)).sum()
        rows += int(mine.sum())
    return total / rows


@pytest.mark.parametrize("std", ["sequence", "batch"])
@pytest.mark.parametrize(("same", "alignment"), [(False, "auto"), (True, "attention")])
def test_attention(same, alignment, std):
    student, teacher = make_models(same)
    weights = make_weights(SHAPES | QUERY)
    params = {"alignment": alignment, "temperature": 1.5, "teacher_temperature": 1.3, "std": std}
    found = run(student, teacher, weights, same, **params)
    assert_same(found, attention_loss(student, teacher, weights, 1.5, 1.3, std), leaves(student, weights))
    assert 0 < found.watched["kd/t2s_accuracy"] < 1  # so that the mask of right rows is put to the test


def only(recording: Recording, b: int) -> Recording:
    parts = (recording.labels, recording.ids, recording.hidden)
    return Recording(*(part[b : b + 1] for part in parts), recording.head, recording.embed)


@pytest.mark.parametrize(("std", "couples"), [("sequence", False), ("batch", True)])
def test_a_sequence_depends_on_its_neighbours_only_where_that_is_declared(std, couples):
    student, teacher = make_models(False)
    weights = make_weights(SHAPES | QUERY)
    together = run(student, teacher, weights, False, std=std)
    alone = [run(only(student, b), only(teacher, b), weights, False, std=std) for b in range(len(student))]
    apart = sum(found.loss * found.tokens for found in alone)
    assert torch.isclose(together.loss * together.tokens, apart) != couples
    assert DSKD.needs(DSKD.Params(std=std), same_tokens=False).batch_coupled == couples


def test_one_row_sequences_are_finite():
    student, teacher = make_models(False, rows=([1, 1], [1, 2]))
    found = run(student, teacher, make_weights(SHAPES | QUERY), False)
    assert found.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())


def test_where_projected_teachers_are_all_wrong_their_space_teaches_nothing():
    student, teacher = make_models(False)
    weights = make_weights(SHAPES | QUERY)
    weights["kd.teacher_to_student.weight"] = torch.zeros(S, D).double().requires_grad_()
    weights["kd.teacher_to_student.bias"] = student.head.detach()[0].clone().requires_grad_()
    top = int((student.head.detach() @ student.head.detach()[0]).argmax())
    student.labels = torch.where(student.labels == top, (top + 1) % len(student.head), student.labels)
    found = run(student, teacher, weights, False)
    assert found.terms["kd/t2s_kd"] == 0
    assert found.watched["kd/t2s_accuracy"] == 0


def test_identity_is_for_one_tokenizer():
    student, teacher = make_models(False)
    with pytest.raises(KdzooError, match=r"^replay: 'kd' compares tokens of one tokenizer"):
        run(student, teacher, {}, False, alignment="identity")


def test_embeddings_are_read_only_where_attention_aligns():
    plain = DSKD.needs(DSKD.Params(), same_tokens=True)
    assert plain.student == plain.teacher == {"hidden.last"}
    assert "embed.input" in DSKD.needs(DSKD.Params(), same_tokens=False).student
