"""Writes `arrays/seq_kd_*.npz`: sequence-level distillation as its authors train on the teacher's answers.

harvardnlp/seq2seq-attn@2d36b43, train.lua: `nn.ClassNLLCriterion` with `sizeAverage = false` and weight 0 on padding
(s2sa/models.lua, make_generator), summed over time and divided by the sentences of the batch. Its formula in numpy and
float64; the gradient is checked against complex steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

ARRAYS = Path(__file__).parent / "arrays"
LABEL = np.array([[-100, 3, 1, 4, 0], [-100, -100, 2, -100, -100], [5, 6, 6, -100, -100]])  # -100: no target


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.real.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def loss_of(logits: np.ndarray) -> np.ndarray:
    """One time step after the other, as they add them up."""
    total = np.zeros((), logits.dtype)
    for t in range(LABEL.shape[1]):
        log_q = log_softmax(logits[:, t])
        for b, target in enumerate(LABEL[:, t]):
            total += 0 if target == -100 else -log_q[b, target]
    return total / len(LABEL)


def gradient_of(logits: np.ndarray) -> np.ndarray:
    scored = (LABEL != -100)[..., None]
    gold = np.eye(logits.shape[-1])[np.where(LABEL == -100, 0, LABEL)]
    return (np.exp(log_softmax(logits)) - gold) * scored / len(LABEL)


def complex_steps(function: Callable[[np.ndarray], np.ndarray], at: np.ndarray) -> np.ndarray:
    found = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        moved = at.astype(complex)
        moved[place] += 1e-30j
        found[place] = function(moved).imag / 1e-30
    return found


def main() -> None:
    logits = 2 * np.random.default_rng(0).normal(size=(*LABEL.shape, 7))
    gradient = gradient_of(logits)
    np.testing.assert_allclose(gradient, complex_steps(loss_of, logits), rtol=1e-12, atol=1e-15)
    meta = {
        "source": "independent float64 reference, of harvardnlp/seq2seq-attn@2d36b43",
        "function": "seq_kd (train.lua, train_batch)",
        "configuration": {"reduction": "sequences"},
    }
    np.savez(
        ARRAYS / "seq_kd_seq2seq_attn.npz",
        student_logits=logits,
        label=LABEL,
        loss=loss_of(logits),
        grad_student_logits=gradient,
        meta_json=json.dumps(meta),
    )


if __name__ == "__main__":
    main()
