"""What plugin authors rely on: arrays in, values and gradients out, and one clear line where they do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdzoo import KdzooError
from kdzoo.testing import Recorded, replay
from kdzoo_adakd import Adaptive
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL
from kdzoo_dskd import DSKD
from kdzoo_residual import Residual
from kdzoo_token_weights import Column

GENERATOR = np.random.default_rng(0)
LABELS = np.array([[-100, 3, 1, 0], [-100, -100, 2, -100]])
IDS = GENERATOR.integers(0, 7, (2, 4))
HIDDEN = GENERATOR.normal(size=(2, 4, 5))
HEAD = GENERATOR.normal(size=(7, 5))
TEACHER_HIDDEN = GENERATOR.normal(size=(2, 4, 6))
TEACHER_HEAD = GENERATOR.normal(size=(7, 6))
STUDENT = Recorded(LABELS, hidden=HIDDEN, head=HEAD)
TEACHER = Recorded(LABELS, hidden=TEACHER_HIDDEN, head=TEACHER_HEAD)
SFT: Any = {"sft": (CrossEntropy, {}, 1.0)}
KD: Any = {"kd": (DSKD, {}, 1.0)}
WEIGHTS = {
    "kd.teacher_to_student.weight": GENERATOR.normal(size=(5, 6)),
    "kd.teacher_to_student.bias": GENERATOR.normal(size=5),
    "kd.student_to_teacher.weight": GENERATOR.normal(size=(6, 5)),
    "kd.student_to_teacher.bias": GENERATOR.normal(size=6),
}


def expected_loss(logits: torch.Tensor) -> torch.Tensor:
    labels = torch.as_tensor(LABELS)
    return torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])


def test_states_and_head():
    hidden, head = (torch.tensor(x, requires_grad=True) for x in (HIDDEN, HEAD))
    loss = expected_loss(hidden @ head.T)
    loss.backward()
    found = replay(SFT, STUDENT, None, same_tokens=True)
    assert found.loss.dtype == torch.float64
    assert found.tokens == 4
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.terms, {"sft/cross_entropy": loss.detach()})
    assert found.gradients.keys() == {"student_hidden", "student_head"}
    torch.testing.assert_close(found.gradients["student_hidden"], hidden.grad)
    torch.testing.assert_close(found.gradients["student_head"], head.grad)


def test_logits():
    logits = torch.tensor(HIDDEN @ HEAD.T, requires_grad=True)
    expected_loss(logits).backward()
    found = replay(SFT, Recorded(LABELS, logits=logits.detach()), None, same_tokens=True)
    assert found.gradients.keys() == {"student_hidden"}
    torch.testing.assert_close(found.gradients["student_hidden"], logits.grad)


def test_labels_that_are_not_shifted():
    unshifted = np.concatenate([np.full((2, 1), -100), LABELS], axis=1)
    padded = np.concatenate([HIDDEN, np.zeros((2, 1, 5))], axis=1)
    found = replay(SFT, Recorded(unshifted, "unshifted", hidden=padded, head=HEAD), None, same_tokens=True)
    torch.testing.assert_close(found.loss, replay(SFT, STUDENT, None, same_tokens=True).loss)


def test_float32_stays_float32():
    found = replay(SFT, Recorded(LABELS, logits=np.zeros((2, 4, 7), np.float32)), None, same_tokens=True)
    assert found.loss.dtype == found.gradients["student_hidden"].dtype == torch.float32


def test_the_recording_is_left_as_it_was():
    before = HIDDEN.copy()
    replay(KD, STUDENT, TEACHER, weights=WEIGHTS, same_tokens=True)
    assert (before == HIDDEN).all()


def test_a_chunks_size_does_not_matter():
    one, all_rows = (
        replay(KD, STUDENT, TEACHER, weights=WEIGHTS, same_tokens=True, chunk_bytes=size) for size in (1, 2**20)
    )
    torch.testing.assert_close(one.loss, all_rows.loss)
    torch.testing.assert_close(one.gradients, all_rows.gradients)


def test_single_terms_add_up_to_all():
    whole = replay(KD, STUDENT, TEACHER, weights=WEIGHTS, same_tokens=True)
    terms = ("kd/t2s_ce", "kd/t2s_kd", "kd/s2t_kd")
    single = [replay(KD, STUDENT, TEACHER, weights=WEIGHTS, same_tokens=True, only=[term]) for term in terms]
    for term, found in zip(terms, single, strict=True):
        assert found.terms.keys() == {term}
        torch.testing.assert_close(found.loss, whole.terms[term])
    for name, gradient in whole.gradients.items():
        parts = [found.gradients[name] for found in single if name in found.gradients]
        torch.testing.assert_close(sum(parts), gradient)


def test_facts_come_out():
    teacher = torch.as_tensor(TEACHER_HIDDEN @ TEACHER_HEAD.T).argmax(-1)
    low = {"teacher_to_low.weight": GENERATOR.normal(size=(3, 6))}
    found = replay(
        {"residual": (Residual, {}, 1.0)},
        STUDENT,
        TEACHER,
        weights={"residual.low_to_student.weight": GENERATOR.normal(size=(5, 3))},
        artifacts={"projectors": low},
        same_tokens=True,
    )
    correct = (teacher == torch.as_tensor(LABELS))[torch.as_tensor(LABELS) != -100]
    assert found.facts["residual"]["teacher.correct"].tolist() == correct.tolist()


CMA: Any = {"kd": (DSKD, {"alignment": "attention"}, 1.0)}


def changed(**weights: Any) -> dict[str, Any]:
    return {name: value for name, value in (WEIGHTS | weights).items() if value is not None}


@pytest.mark.parametrize(
    ("losses", "student", "teacher", "options", "message"),
    [
        (SFT, None, None, {}, "no model is recorded; give the student, the teacher or both"),
        (
            SFT,
            Recorded(LABELS),
            None,
            {},
            "the student is recorded either by its logits or by hidden states and head",
        ),
        (SFT, Recorded(LABELS, hidden=HIDDEN), None, {}, "the student's hidden states are recorded without its head"),
        (
            SFT,
            Recorded(LABELS[:, :3], hidden=HIDDEN, head=HEAD),
            None,
            {},
            "the student's labels [2, 3], states [2, 4, 5] and head [7, 5] do not fit together",
        ),
        (
            SFT,
            Recorded(LABELS, hidden=HIDDEN, head=TEACHER_HEAD),
            None,
            {},
            "the student's labels [2, 4], states [2, 4, 5] and head [7, 6] do not fit together",
        ),
        (KD, STUDENT, None, {}, "'kd' reads the teacher, which is not recorded"),
        (
            KD,
            STUDENT,
            TEACHER,
            {"weights": changed(**{"kd.student_to_teacher.bias": None})},
            "the weight 'kd.student_to_teacher.bias' is missing; every trainable parameter needs its recorded value",
        ),
        (
            KD,
            STUDENT,
            TEACHER,
            {"weights": changed(**{"kd.student_to_teacher.bais": np.zeros(6)})},
            "no trainable parameter is called 'kd.student_to_teacher.bais', did you mean 'kd.student_to_teacher.bias'?",
        ),
        (
            KD,
            STUDENT,
            TEACHER,
            {"weights": changed(**{"kd.student_to_teacher.bias": np.zeros(1)})},
            "the weight 'kd.student_to_teacher.bias' is [1], the parameter [6]",
        ),
        (CMA, STUDENT, TEACHER, {}, "the student's site 'embed.input' is needed and was not recorded"),
        (
            CMA,
            Recorded(LABELS, hidden=HIDDEN, head=HEAD, embed=HEAD),
            TEACHER,
            {},
            "the student's site 'embed.input' is needed and was not recorded",
        ),
        (
            {"kl": (ForwardKL, {}, 1.0)},
            STUDENT,
            TEACHER,
            {"same_tokens": False},
            "'kl' compares tokens of one tokenizer; it needs same_tokens=True",
        ),
        (
            {"kl": (ForwardKL, {}, 1.0)},
            STUDENT,
            Recorded(np.where(LABELS == 0, -100, LABELS), hidden=TEACHER_HIDDEN, head=TEACHER_HEAD),
            {},
            "same_tokens, but the student scores 4 tokens and the teacher 3",
        ),
        (
            {"kl": (ForwardKL, {"temprature": 2.0}, 1.0)},
            STUDENT,
            TEACHER,
            {},
            "the params of 'kl': temprature: extra inputs are not permitted",
        ),
        (
            {"residual": (Residual, {}, 1.0)},
            STUDENT,
            TEACHER,
            {},
            "'residual' needs the tensors of the stage 'projectors'; give them as artifacts",
        ),
        (
            SFT,
            STUDENT,
            None,
            {"only": ["sft/nll"]},
            "no loss has a term 'sft/nll'; leave `only` out to see all in `terms`",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(losses, student, teacher, options, message):
    defaults = {"same_tokens": True, "weights": WEIGHTS if losses is KD else {}}
    if losses is CMA:
        query = {"kd.query.weight": np.zeros((12, 10)), "kd.query.bias": np.zeros(12)}
        defaults["weights"] = WEIGHTS | query
    with pytest.raises(KdzooError) as caught:
        replay(losses, student, teacher, **(defaults | options))
    assert str(caught.value) == f"replay: {message}"


# Token weights

WEIGHED = torch.tensor([[-100, 1, 2], [-100, 0, -100]])


def weighed_replay(token_weights, same_tokens=True, **given):
    recorded = Recorded(WEIGHED, logits=torch.randn(2, 3, 4, dtype=torch.float64))
    teacher = given.pop("teacher", recorded)
    return replay(
        {"sft": (CrossEntropy, {}, 1.0)},
        recorded,
        teacher,
        same_tokens=same_tokens,
        token_weights=token_weights,
        **given,
    )


def test_a_column_weighs_the_tokens_that_are_scored():
    column = {"weight": torch.tensor([[9.0, 1.0, 0.0], [9.0, 0.0, 9.0]])}
    found = weighed_replay({"sft": (Column, {}, {})}, columns=column)
    gradient = found.gradients["student_hidden"]
    assert gradient[0, 1].any() and not gradient[0, 2].any() and not gradient[1].any()
    assert found.watched["sft/token_weight"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("token_weights", "given", "line"),
    [
        ({"kd": (Column, {}, {})}, {}, "token weights of 'kd', and no loss is called so"),
        ({"sft": (Column, {"colum": "a"}, {})}, {}, "the params of the token weights of 'sft': colum: extra inputs"),
        ({"sft": (Column, {}, {})}, {}, "the token weights of 'sft' read the column 'weight'; give it in columns"),
        ({"sft": (Column, {}, {"share": 1.0})}, {}, "the token weights of 'sft' have no buffer 'share'"),
        ({"sft": (Adaptive, {}, {})}, {"same_tokens": False}, "compare predictions; they need same_tokens=True"),
        ({"sft": (Adaptive, {}, {})}, {"teacher": None}, "read the teacher, which is not recorded"),
    ],
)
def test_token_weights_that_do_not_fit_are_one_line(token_weights, given, line):
    with pytest.raises(KdzooError, match=line):
        weighed_replay(token_weights, **given)
