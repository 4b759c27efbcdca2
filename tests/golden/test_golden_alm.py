"""Files as the authors' code of approximate likelihood matching would write them, of every configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_check import check
from golden_files import NotUnderstood
from torch import Tensor

ARRAYS = Path(__file__).parent / "arrays"
PLAIN = "alm_tokenkit_plain_binary_ce"


def last_index(matrix: Tensor) -> Tensor:
    """[B, T, C] -> the last token of each chunk [B, C]; 0 where it has none."""
    places = torch.arange(matrix.shape[1])[None, :, None]
    return (matrix.bool() * places).amax(1)


def log1mexp(x: Tensor) -> Tensor:
    return torch.log1p(-x.exp())


def distance(kind: str, a: Tensor, b: Tensor, tau: float, order: float, epsilon: float = 1e-6) -> Tensor:
    """Of the teacher's and the student's log-probabilities, one formula per name."""
    x, y = a / tau - epsilon, b / tau - epsilon
    u, v = a - epsilon, b - epsilon
    r = (a - b) / tau
    p, q = u.exp(), v.exp()
    return {
        "binary_ce": -(x.exp() * y + (1 - x.exp()) * log1mexp(y)),
        "reverse_binary_kl": y.exp() * (y - x) + (1 - y.exp()) * (log1mexp(y) - log1mexp(x)),
        "binary_kl_temp_limit": (u - v) + (u * (-v).log() - u * (-u).log()),
        "abs": (a - b).abs(),
        "abs_exp": (x.exp() - y.exp()).abs(),
        "renyi": (p**order * q ** (1 - order) + (1 - p) ** order * (1 - q) ** (1 - order)).log() / (order - 1),
        "joschu_k2": r**2 / 2,
        "joschu_k3": r.exp() - 1 - r,
    }[kind]


def outputs(arrays: dict[str, np.ndarray], config: dict[str, Any], ends: dict[str, int]) -> dict[str, np.ndarray]:
    """Loss and gradient, matrix by matrix as the authors' code goes, its mistake in the denominator included."""
    mode, tau = config["alm_mode"], config["binarization_temp"]
    logits = {m: torch.as_tensor(arrays[f"{m}_logits"]).double() for m in ("student", "teacher")}
    logits["student"].requires_grad_()
    main, space, counts = {}, {}, {}
    for model, z in logits.items():
        matrix = torch.as_tensor(arrays[f"alignment_{model}"] & arrays[f"loss_mask_{model}"][..., None])
        log_p = z.log_softmax(-1)
        ids = torch.as_tensor(arrays[f"{model}_input_ids"])
        token = log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        main[model] = torch.einsum("bt,btc->bc", token, matrix[:, 1:].double())
        mask = torch.as_tensor(arrays[f"space_mask_{model}"]).double()
        by_end = "eos_as_space" in mode
        mass = log_p[..., ends[model]] if by_end else (log_p.exp() @ mask).log()
        space[model] = mass.gather(1, last_index(matrix))
        counts[model] = matrix[:, 1:].double().sum(1)
    count = divisor = counts["teacher"]
    if "merge_by_space_prob" in mode:
        ends_here = space["teacher"].exp() > config["tokenizer_pair_bias_threshold"]
        join = torch.zeros(*count.shape, count.shape[1]).double()
        for b in range(len(count)):
            group = 0
            for c in range(count.shape[1]):
                join[b, c, group] = float(count[b, c] > 0)
                group += int(ends_here[b, c])
        last = last_index(join)
        main = {m: torch.einsum("bc,bcg->bg", value, join) for m, value in main.items()}
        space = {m: value.gather(1, last) for m, value in space.items()}
        count = torch.einsum("bc,bcg->bg", count, join)
        divisor = torch.einsum("bc,bcg->bg", count, join)
    kept = count > 0
    a, b = ((main[m] + space[m] if "append_space" in mode else main[m])[kept] for m in ("teacher", "student"))
    weights = {"chunk_count": torch.ones_like(a), "token_count": count[kept], "log1p_token_count": count[kept].log1p()}
    total = distance(config["alm_diff_fn"], a.detach(), b, tau, config["renyi_alpha"])
    total = (total * weights[config["distill_main_path_numerator"]]).sum()
    by_tokens = config["distill_main_path_denominator"] == "token_count"
    loss = total / (divisor.sum() if by_tokens else (divisor > 0).sum())
    (gradient,) = torch.autograd.grad(loss, logits["student"])
    return {"loss": loss.detach().numpy(), "grad_student_logits": gradient.numpy()}


def written(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> Path:
    """The committed file's inputs, another configuration, and what follows."""
    with np.load(ARRAYS / f"{PLAIN}.npz") as file:
        contents = {k: v for k, v in file.items() if not k.startswith(("report_", "loss", "grad_")) or "mask" in k}
    meta = json.loads(str(contents.pop("meta_json")))
    meta["config"] |= config
    contents |= arrays or {}
    contents |= outputs(contents, meta["config"], {m: meta[f"{m}_eos_id"] for m in ("student", "teacher")})
    np.savez(folder / "written.npz", meta_json=np.array(json.dumps(meta)), **contents)
    return folder / "written.npz"


DISTANCES = (
    "binary_ce",
    "reverse_binary_kl",
    "binary_kl_temp_limit",
    "abs",
    "abs_exp",
    "renyi",
    "joschu_k2",
    "joschu_k3",
)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mode", ["none", "merge_by_space_prob+append_space"])
def test_every_distance(tmp_path, kind, mode):
    config = {"alm_diff_fn": kind, "alm_mode": mode, "binarization_temp": 5.0, "renyi_alpha": 1.5}
    check(written(tmp_path, config | {"tokenizer_pair_bias_threshold": 0.5}))


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("mode", ["merge_by_space_prob", "merge_by_space_prob+append_space"])
@pytest.mark.parametrize("end", ["", "+eos_as_space"])
def test_joined_chunks(tmp_path, mode, threshold, end):
    threshold = threshold / 24 if end else threshold  # so that some ends are likelier, some not
    check(written(tmp_path, {"alm_mode": mode + end, "tokenizer_pair_bias_threshold": threshold}))


@pytest.mark.parametrize("mode", ["none", "append_space", "append_space+eos_as_space", "merge_by_space_prob"])
@pytest.mark.parametrize("numerator", ["chunk_count", "token_count", "log1p_token_count"])
@pytest.mark.parametrize("denominator", ["chunk_count", "token_count"])
def test_every_count(tmp_path, mode, numerator, denominator):
    counts = {"distill_main_path_numerator": numerator, "distill_main_path_denominator": denominator}
    check(written(tmp_path, counts | {"alm_mode": mode, "tokenizer_pair_bias_threshold": 0.85}))


@pytest.mark.parametrize("mode", ["none", "merge_by_space_prob+append_space"])
def test_what_is_masked_is_not_scored(tmp_path, mode):
    # Of one chunk the teacher has only the last token. (One that only the student lacks has for the authors a student
    # who is certain of it, and for us is none.)
    masks = {}
    with np.load(ARRAYS / f"{PLAIN}.npz") as file:
        for model, first in (("student", 2), ("teacher", 4)):
            masks[f"loss_mask_{model}"] = file[f"loss_mask_{model}"].copy()
            masks[f"loss_mask_{model}"][:, :first] = False
    check(written(tmp_path, {"alm_mode": mode, "tokenizer_pair_bias_threshold": 0.5}, masks))


def test_the_independent_computation_is_what_the_authors_code_gives():
    """The two committed files, and what is known of a third that joins chunks at 0.85."""
    for name in (PLAIN, "alm_tokenkit_appendspace_binary_ce"):
        with np.load(ARRAYS / f"{name}.npz") as file:
            arrays, meta = dict(file), json.loads(str(file["meta_json"]))
        ends = {model: meta[f"{model}_eos_id"] for model in ("student", "teacher")}
        found = outputs(arrays, meta["config"], ends)
        np.testing.assert_allclose(found["loss"], arrays["loss"], rtol=1e-6)
        np.testing.assert_allclose(found["grad_student_logits"], arrays["grad_student_logits"], atol=1e-8)
    mode = {"alm_mode": "merge_by_space_prob+append_space", "tokenizer_pair_bias_threshold": 0.85}
    assert round(float(outputs(arrays, meta["config"] | mode, ends)["loss"]), 3) == 1.705


def test_a_configuration_that_is_not_understood_fails(tmp_path):
    for config in ({"alm_mode": "append_tab"}, {"distill_chunk_sizes": [1, 2]}):
        with np.load(ARRAYS / f"{PLAIN}.npz") as file:
            contents = dict(file)
        meta = json.loads(str(contents["meta_json"]))
        contents["meta_json"] = np.array(json.dumps(meta | {"config": meta["config"] | config}))
        np.savez(tmp_path / "changed.npz", **contents)
        with pytest.raises(NotUnderstood):
            check(tmp_path / "changed.npz")


def test_the_notebook_is_a_formula_for_one_sequence(tmp_path):
    with np.load(ARRAYS / "alm_notebook_b1_sample0_f64.npz") as file:
        twice = {k: np.concatenate([v, v]) if v.ndim else v for k, v in file.items()}
    np.savez(tmp_path / "changed.npz", **twice)
    with pytest.raises(pytest.skip.Exception, match=r"sequences '2': the notebook"):
        check(tmp_path / "changed.npz")
