"""Writes the golden files of `top1_ce` and `ranking`: the authors' formulas, in plain numpy float64.

songmzhang/KDFlow @ 3a7a21a, kdflow/loss/top1_ce.py and hierarchical_ranking_loss.py; songmzhang/NMT-KD @ e01c09c,
fairseq-kd/fairseq/criterions/label_smoothed_cross_entropy_advanced_kd.py, of which the ranking alone. Gradients are
analytic, and each is held to finite differences before it is written. Run it in this folder: `python make_ranking.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = Path(__file__).parent / "arrays"
Loss = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]
"""From one row of the student's logits and one of the teacher's to the loss and its gradient."""


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def top1_ce(temperature: float) -> Loss:
    def loss(student: np.ndarray, teacher: np.ndarray) -> tuple[float, np.ndarray]:
        p, q = softmax(teacher / temperature), softmax(student / temperature)
        top = int(p.argmax())
        return -p[top] * np.log(q[top]), p[top] * (q - np.eye(len(q))[top]) / temperature

    return loss


def ranking(k: int, asks: str) -> Loss:
    def loss(student: np.ndarray, teacher: np.ndarray) -> tuple[float, np.ndarray]:
        p, q = softmax(teacher), softmax(student)
        t, s = np.argsort(-p)[:k], np.argsort(-q)[:k]
        total, by_q = 0.0, np.zeros_like(q)
        for a in range(k):
            if q[t[a]] > q[t[0]]:
                total += q[t[a]] - q[t[0]]
                by_q[t[a]] += 1
                by_q[t[0]] -= 1
            for b in range(k):
                before = p[t[a]] if asks == "teacher" else q[s[a]]
                if before > p[s[b]] and q[s[b]] > q[t[a]]:
                    total += q[s[b]] - q[t[a]]
                    by_q[s[b]] += 1
                    by_q[t[a]] -= 1
        return total, q * (by_q - (q * by_q).sum())

    return loss


def write(name: str, loss: Loss, source: str, function: str, configuration: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = 2 * rng.normal(size=(2, 2, 6, 9))
    label = rng.integers(9, size=(2, 6))
    label[:, 0] = label[1, -1] = -100
    total, gradient = 0.0, np.zeros_like(student)
    for at in zip(*np.nonzero(label != -100), strict=True):
        value, gradient[at] = loss(student[at], teacher[at])
        total += value
        for direction in rng.normal(size=(3, 9)):
            ends = [loss(student[at] + step * direction, teacher[at])[0] for step in (1e-6, -1e-6)]
            assert np.isclose((ends[0] - ends[1]) / 2e-6, gradient[at] @ direction, rtol=1e-5, atol=1e-8)
    meta = {"source": f"independent float64 reference, {source}", "function": function, "configuration": configuration}
    np.savez(
        ARRAYS / f"{name}.npz",
        student_logits=student,
        teacher_logits=teacher,
        label=label,
        loss_sum=total,
        n_tokens=float((label != -100).sum()),
        grad_student_logits=gradient,
        meta_json=json.dumps(meta),
    )


if __name__ == "__main__":
    kdflow, nmt_kd = "songmzhang/KDFlow@3a7a21a", "songmzhang/NMT-KD@e01c09c"
    write("top1_ce_kdflow_t2", top1_ce(2.0), kdflow, "compute_top1_ce", {"temperature": 2.0}, 1)
    hrl = "compute_hierarchical_ranking_loss"
    write("ranking_kdflow_k4", ranking(4, "both"), kdflow, hrl, {"hr_topk": 4, "temperature": 2.0}, 2)
    advanced = "compute_advanced_kd_loss, the ranking alone"
    write("ranking_nmtkd_k3", ranking(3, "teacher"), nmt_kd, advanced, {"topk": 3}, 3)
