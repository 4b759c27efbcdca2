"""Files as a reference of residual learning would write them, by the formulas written out here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_check import check
from torch import Tensor
from torch.nn.functional import cross_entropy

ARRAYS = Path(__file__).parent / "arrays"
TRAINED = ("student_hidden", "student_lm_head", "p_as", "p_sa")


def normalised(x: Tensor) -> Tensor:
    return x / x.std(-1, keepdim=True)


def without_mask(arrays: dict[str, Tensor], beta: str | float) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token of the response: its loss with the residual and without, and beta."""
    h, head, p_as, p_sa = (arrays[name] for name in TRAINED)
    low, wide = p_sa.shape
    states, residuals, gold = [], [], []
    for b, labels in enumerate(arrays["student_label"]):
        mine, theirs = labels != -100, arrays["teacher_label"][b] != -100
        z = arrays["teacher_hidden"][b, theirs] @ arrays["p_ta"].T
        attention = (normalised(h[b, mine] @ p_sa.T) @ normalised(z).T / math.sqrt(low)).softmax(-1)
        states.append(h[b, mine])
        residuals.append(attention @ z @ p_as.T)
        gold.append(labels[mine])
    ratios = [math.sqrt(wide / low) * s.norm(dim=-1) / u.norm(dim=-1) for s, u in zip(states, residuals, strict=True)]
    if beta == "sequence":
        scale = torch.cat([ratio.mean().expand_as(ratio) for ratio in ratios])
    elif beta == "row":
        scale = torch.cat(ratios)
    elif beta == "batch":
        scale = torch.cat(ratios).mean().expand(len(torch.cat(ratios)))
    else:
        scale = torch.full_like(torch.cat(ratios), 1.0 if beta == "none" else float(beta))
    state, u, labels, scale = torch.cat(states), torch.cat(residuals), torch.cat(gold), scale.detach()
    with_residual = cross_entropy((state - scale[:, None] * u) @ head.T, labels, reduction="none")
    return with_residual, cross_entropy(state @ head.T, labels, reduction="none"), scale


@pytest.mark.parametrize("wrong", ["by_bytes", "attention", "projected", "entropy"])
@pytest.mark.parametrize("beta", ["sequence", "row", "batch", "none", 0.7])
def test_without_a_mask_every_token_has_a_residual_whatever_the_verdict(tmp_path, wrong, beta):
    with np.load(ARRAYS / "residual_cross_a.npz") as file:
        given = {name: file[name] for name in file.files if not name.startswith("grad_")}
    meta = json.loads(str(given.pop("meta_json")))
    meta["configuration"] |= {"beta": beta, "wrong": wrong, "mask": False, "lambda": 0.3}
    arrays = {name: torch.as_tensor(value) for name, value in given.items()}
    leaves = [arrays[name].requires_grad_() for name in TRAINED]
    residual, sft, scale = without_mask(arrays, beta)
    outputs = {
        "residual_sum": residual.sum(),
        "sft_sum": sft.sum(),
        "loss": (0.3 * residual.sum() + 0.7 * sft.sum()) / len(residual),
    }
    for name in ("residual_sum", "loss"):
        gradients = torch.autograd.grad(outputs[name], leaves, retain_graph=True)
        outputs |= {f"grad_{name}__{leaf}": gradient for leaf, gradient in zip(TRAINED, gradients, strict=True)}
    scored = arrays["student_label"] != -100
    outputs["wrong"], outputs["beta"] = scored, torch.zeros_like(arrays["beta"])
    outputs["beta"][scored] = scale
    outputs = {name: value.detach().numpy() for name, value in outputs.items()}
    np.savez(tmp_path / "made.npz", **(given | outputs), meta_json=np.array(json.dumps(meta)))
    check(tmp_path / "made.npz")
