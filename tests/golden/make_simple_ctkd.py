"""Writes the golden file of `simple_ctkd`: the authors' formulas as they compute them, in plain numpy float64.

songmzhang/KDFlow @ 3a7a21a, kdflow/algorithms/simple_ctkd.py, `SimpleCrossTokenizerKD.training_step`, which takes one
row of packed tokens. Gradients are analytic, and held to finite differences before they are written. Run it in this
folder: `python make_simple_ctkd.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ARRAYS = Path(__file__).parent / "arrays"


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def write(name: str, divergence: str, temperature: float, rate: float, average: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = 2 * rng.normal(size=(1, 9, 8)), 2 * rng.normal(size=(1, 11, 10))
    student_label, teacher_label = rng.integers(8, size=(1, 9)), rng.integers(10, size=(1, 11))
    student_label[0, :2] = teacher_label[0, :3] = teacher_label[0, -1] = -100
    mine, theirs = np.array([5, 0, 2, 7, 3]), np.array([1, 9, 4, 2, 6])  # of entries that are spelt alike, as found
    ours, of_teacher = np.array([0, 2, 3, 6]), np.array([0, 1, 4, 6])  # of tokens, counted over the scored ones
    scored = student_label != -100
    labels = student_label[scored]
    target = softmax(teacher[teacher_label != -100][of_teacher][:, theirs] / temperature)

    def loss(logits: np.ndarray) -> tuple[float, float, np.ndarray]:
        q = softmax(logits[scored][ours][:, mine] / temperature)
        if divergence == "kl":
            kd = (target * np.log(target / q)).sum()
            by_shared = (q - target) / temperature
        else:  # "rkl"
            ratio = np.log(q / target)
            kd = (q * ratio).sum()
            by_shared = q * (ratio - (q * ratio).sum(-1, keepdims=True)) / temperature
        whole = softmax(logits[scored])
        gold = np.eye(logits.shape[-1])[labels]
        of_rows = (1 - rate) * (whole - gold) / average
        of_rows[np.ix_(ours, mine)] += rate * by_shared / average
        gradient = np.zeros_like(logits)
        gradient[scored] = of_rows
        ce = -np.log((whole * gold).sum(-1)).sum()
        return float(((1 - rate) * ce + rate * kd) / average), float(kd / average), gradient

    value, kd, gradient = loss(student)
    for direction in rng.normal(size=(5, *student.shape)):
        slope = (loss(student + 1e-6 * direction)[0] - loss(student - 1e-6 * direction)[0]) / 2e-6
        assert np.isclose(slope, (gradient * direction).sum(), rtol=1e-6)
    meta = {
        "source": "independent float64 reference, songmzhang/KDFlow@3a7a21a",
        "function": "SimpleCrossTokenizerKD.training_step",
        "configuration": {"kd_loss_fn": divergence, "kd_temperature": temperature, "kd_ratio": rate},
    }
    np.savez(
        ARRAYS / f"{name}.npz",
        student_logits=student,
        teacher_logits=teacher,
        student_label=student_label,
        teacher_label=teacher_label,
        student_overlap_token_ids=mine,
        teacher_overlap_token_ids=theirs,
        student_aligned_idx=ours,
        teacher_aligned_idx=of_teacher,
        avg_micro_batch_token_num=average,
        loss=value,
        kd_loss=kd,
        grad_student_logits=gradient,
        meta_json=json.dumps(meta),
    )


if __name__ == "__main__":
    write("simple_ctkd_kl_t2", "kl", temperature=2.0, rate=0.5, average=12.0, seed=0)
    write("simple_ctkd_rkl_t1", "rkl", temperature=1.0, rate=0.3, average=7.0, seed=1)
