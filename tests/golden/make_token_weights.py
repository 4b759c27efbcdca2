"""Writes golden files of token weights: `python tests/golden/make_token_weights.py`.

The formulas are those of two authors' functions as these compute them on one micro-batch, written anew in float64:
`AdaKD` of `loss/losses.py` in SassyRong/AdaKD @ 66363ca, for a given selection ratio; and
`compute_student_entropy_and_select` of `sekd/distill/selective_lm_head.py` in almogtavor/SE-KD3x @ 0cbbafc, with the
loss of `sekd/distill/forward_batch_runner.py` @ 08b2763. Gradients are analytic, and checked by finite differences.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = Path(__file__).parent / "arrays"
Numbers = np.ndarray


def log_softmax(logits: Numbers) -> Numbers:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(student: Numbers, teacher: Numbers, reverse: bool) -> tuple[Numbers, Numbers]:
    """KL of each token [n], and its gradient for the student's logits [n, V]."""
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    p, q = np.exp(log_p), np.exp(log_q)
    if not reverse:
        return (p * (log_p - log_q)).sum(-1), q - p
    value = (q * (log_q - log_p)).sum(-1)
    return value, q * (log_q - log_p - value[:, None])


def adakd(student: Numbers, teacher: Numbers, sample: Numbers, given: dict[str, Any]) -> tuple[float, Numbers]:
    q, p = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    scores = np.sqrt(((np.sqrt(q) - np.sqrt(p)) ** 2).sum(-1)) / np.sqrt(2)
    chosen = np.argsort(-scores, kind="stable")[: max(1, int(len(scores) * given["selection_ratio"]))]
    ordered = np.sort(scores[chosen])
    middle = ordered[(len(ordered) - 1) // 2]  # torch's median is the lower one
    scale = np.tanh(np.log(np.maximum(scores[chosen] / middle, 1e-8)))
    sign = 1 if given["temperature_direction"] else -1
    tau = given["temperature_base"] * np.exp(sign * given["temperature_scale"] * scale)
    value, slope = divergence(student[chosen] / tau[:, None], teacher[chosen] / tau[:, None], given["loss_fn"] == "rkd")
    gradient = np.zeros_like(student)
    gradient[chosen] = slope * tau[:, None] / len(chosen)
    return float((value * tau**2).mean()), gradient


def se_kd(student: Numbers, teacher: Numbers, sample: Numbers, given: dict[str, Any]) -> tuple[float, Numbers]:
    log_q = log_softmax(student)
    entropy = -(np.exp(log_q) * log_q).sum(-1)
    chosen: list[int] = []
    for b in range(sample.max() + 1):
        own = np.flatnonzero(sample == b)
        kept = max(1, min(len(own), int(np.ceil(given["k_percent"] / 100 * len(own)))))
        chosen += own[np.argsort(-entropy[own], kind="stable")[:kept]].tolist()
    tau = given["temperature"]
    value, slope = divergence(student[chosen] / tau, teacher[chosen] / tau, given["kd_objective"] == "reverse")
    gradient = np.zeros_like(student)
    gradient[chosen] = slope * tau / len(chosen)
    return float(value.mean() * tau**2), gradient


FILES: dict[str, tuple[Callable[..., tuple[float, Numbers]], dict[str, Any]]] = {
    "adakd_reverse_kl": (
        adakd,
        {
            "rule": "hellinger",
            "loss_fn": "rkd",
            "selection_ratio": 0.6,
            "temperature_base": 1.0,
            "temperature_scale": 0.5,
            "temperature_direction": False,
        },
    ),
    "adakd_forward_kl_direct": (
        adakd,
        {
            "rule": "hellinger",
            "loss_fn": "fkd",
            "selection_ratio": 0.35,
            "temperature_base": 1.5,
            "temperature_scale": 0.3,
            "temperature_direction": True,
        },
    ),
    "se_kd_t2": (se_kd, {"k_percent": 25, "temperature": 2.0, "kd_objective": "forward"}),
}


def check(function: Callable[..., tuple[float, Numbers]], given: dict[str, Any], *arrays: Numbers) -> None:
    """The gradient is the slope, but that temperatures are detached: for AdaKD it is tried with equal ones."""
    student, teacher, sample = arrays
    given = {**given, "temperature_scale": 0.0}
    _, gradient = function(*arrays, given)
    rng, step = np.random.default_rng(1), 1e-6
    for _ in range(5):
        along = rng.normal(size=student.shape)
        up, down = (function(student + sign * step * along, teacher, sample, given)[0] for sign in (1, -1))
        assert abs((up - down) / (2 * step) - (gradient * along).sum()) < 1e-7


def main() -> None:
    rng = np.random.default_rng(0)
    for name, (function, given) in FILES.items():
        student, teacher = 2 * rng.normal(size=(2, 3, 7, 9))  # logits [B, T, V]
        label = rng.integers(9, size=(3, 7))
        label[:, 0], label[1, 4:], label[2, 2:] = -100, -100, -100
        scored = label != -100
        sample = np.nonzero(scored)[0]
        check(function, given, student[scored], teacher[scored], sample)
        loss, slope = function(student[scored], teacher[scored], sample, given)
        gradient = np.zeros_like(student)
        gradient[scored] = slope
        meta = {
            "source": "independent float64 reference",
            "function": function.__name__,
            "note": __doc__.split("\n\n")[1].replace("\n", " "),
            "configuration": given,
        }
        np.savez(
            ARRAYS / f"{name}.npz",
            student_logits=student,
            teacher_logits=teacher,
            label=label,
            loss=loss,
            grad_student_logits=gradient,
            meta_json=json.dumps(meta),
        )


if __name__ == "__main__":
    main()
