"""Writes golden numbers of losses between blocks, from formulas written anew as the authors' code computes them.

    python tests/golden/make_between_blocks.py

`general_distill.py` of huawei-noah/Pretrained-Language-Model @ 1bb9b3e, TinyBERT: the mean square between the student's
states, through its one linear layer, and the teacher's. `MiniLM.forward` of bloomberg/minilmv2.bb @ 0d78e20: for each
relation, KL between softmaxes of scaled products, over relation heads and positions of a sequence, then over sequences.
All in float64; gradients are derived by hand, and held against finite differences before they are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "arrays"
Arrays = dict[str, np.ndarray]


def tinybert(inputs: Arrays) -> tuple[float, Arrays]:
    """`loss_mse(student_rep, teacher_rep)` of one block, where student_rep is `fit_dense(state)`."""
    h, t, w, b = (inputs[name] for name in ("student_state", "teacher_state", "weight", "bias"))
    error = h @ w.T + b - t
    slope = 2 * error / error.size
    return float((error**2).mean()), {
        "student_state": slope @ w,
        "weight": np.einsum("btd,bts->ds", slope, h),
        "bias": slope.sum((0, 1)),
    }


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def minilmv2(inputs: Arrays, heads: int, weights: dict[str, float]) -> tuple[float, Arrays]:
    """Sum over relations of weight times the mean over sequences of the sum of KLs / (heads x length)."""
    total, slopes = 0.0, {}
    lengths = inputs["attention_mask"].sum(1)
    for relation, weight in weights.items():
        slope = slopes[f"student_{relation}"] = np.zeros_like(inputs[f"student_{relation}"])
        for b, n in enumerate(lengths):
            of_student, of_teacher = (
                inputs[f"{model}_{relation}"][b, :n].reshape(n, heads, -1).transpose(1, 0, 2)
                for model in ("student", "teacher")
            )
            scores = [x @ x.transpose(0, 2, 1) / np.sqrt(x.shape[-1]) for x in (of_teacher, of_student)]
            log_p, log_q = map(log_softmax, scores)
            share = weight / (heads * n * len(lengths))
            total += share * float((np.exp(log_p) * (log_p - log_q)).sum())
            of_scores = share * (np.exp(log_q) - np.exp(log_p))
            of_vectors = (of_scores + of_scores.transpose(0, 2, 1)) @ of_student / np.sqrt(of_student.shape[-1])
            slope[b, :n] = of_vectors.transpose(1, 0, 2).reshape(n, -1)
    return total, slopes


def check(function: Callable[[Arrays], tuple[float, Arrays]], inputs: Arrays, rng: np.random.Generator) -> None:
    """That the gradient along a random direction is a finite difference."""
    _, gradients = function(inputs)
    for name, gradient in gradients.items():
        along = rng.normal(size=gradient.shape)
        up, down = (function(inputs | {name: inputs[name] + step * along})[0] for step in (1e-6, -1e-6))
        difference, expected = (up - down) / 2e-6, float((gradient * along).sum())
        assert abs(difference - expected) < 1e-7 * max(1.0, abs(expected)), (name, difference, expected)


def write(
    name: str,
    function: Callable[[Arrays], tuple[float, Arrays]],
    inputs: Arrays,
    rng: np.random.Generator,
    source: str,
    called: str,
    configuration: dict[str, Any],
) -> None:
    check(function, inputs, rng)
    loss, gradients = function(inputs)
    meta = {
        "source": f"independent float64 reference, of {source}",
        "function": called,
        "configuration": configuration,
    }
    found = {f"grad_{key}": value for key, value in gradients.items()}
    np.savez(FOLDER / name, loss=loss, meta_json=json.dumps(meta), **inputs, **found)


def main() -> None:
    rng = np.random.default_rng(0)
    states = {
        "student_state": rng.normal(size=(2, 5, 4)),
        "teacher_state": rng.normal(size=(2, 5, 6)),
        "weight": rng.normal(size=(6, 4)),
        "bias": rng.normal(size=6),
    }
    tiny = "huawei-noah/Pretrained-Language-Model@1bb9b3e"
    write("tinybert_rep_loss.npz", tinybert, states, rng, tiny, "general_distill rep_loss", {})

    heads, weights = 3, {"query": 1 / 3, "key": 0.5, "value": 1.0}
    vectors = {f"student_{relation}": rng.normal(size=(2, 5, 6)) for relation in weights}
    vectors |= {f"teacher_{relation}": rng.normal(size=(2, 5, 12)) for relation in weights}
    vectors["attention_mask"] = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    bloomberg = "bloomberg/minilmv2.bb@0d78e20"
    given = {"A_r": heads, "relations": weights}
    write(
        "minilmv2_r3.npz",
        lambda inputs: minilmv2(inputs, heads, weights),
        vectors,
        rng,
        bloomberg,
        "minilmv2 MiniLM.forward",
        given,
    )


if __name__ == "__main__":
    main()
