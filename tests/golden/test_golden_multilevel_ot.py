"""Files as the authors' code of MultiLevelOT would write them, of every release and configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_check import check
from golden_files import NotUnderstood
from torch import Tensor

COMMITS = ("712cfb4", "d8d298f", "77e32ae")
IGNORED = -100
GIVEN = {
    "f": 1,
    "student_temperature": 1.0,
    "teacher_temperature": 1.0,
    "skip_student_eos": True,
    "skip_teacher_eos": False,
    "distillation_weight": 1.5,
}


def windows(logits: Tensor, labels: Tensor, skip_last: bool, tau: float, per_token_sort: bool) -> list[Tensor]:
    """Probabilities of the answer's tokens per sample, of logits over their row's standard deviation."""
    found = []
    for row, label in zip(logits, labels, strict=True):
        answer = (label != IGNORED).nonzero()[:, 0] - 1
        z = row[answer[: len(answer) - skip_last]]
        q = (z / (z.std(-1, keepdim=True) + 1e-4) / tau).softmax(-1)
        found.append(q.sort(-1, descending=True).values if per_token_sort else q)
    return found


def in_order(samples: list[Tensor], k: int = 50) -> list[Tensor]:
    order = torch.cat(samples).sum(0).argsort(descending=True)[:k]
    return [sample[:, order] for sample in samples]


def transported(x: Tensor, y: Tensor) -> Tensor:
    cost = (x[:, None] - y[None]).abs().sum(-1)
    plan = (-cost / 0.1).exp()
    for _ in range(10):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return 0.001 * (plan * cost).sum()


def outputs(arrays: dict[str, Tensor], given: dict[str, Any], commit: str) -> dict[str, Tensor]:
    z = arrays["student_logits"]
    tokens = commit != "712cfb4"
    q, p = (
        in_order(
            windows(
                arrays[f"{model}_logits"],
                arrays[f"{model}_labels"],
                given[f"skip_{model}_eos"],
                given[f"{model}_temperature"],
                tokens,
            )
        )
        for model in ("student", "teacher")
    )
    width = max(q[0].shape[1], p[0].shape[1])
    length = max(len(sample) for sample in q + p)
    q_all, p_all = (
        torch.stack([F.pad(x, (0, width - x.shape[1], 0, length - len(x))) for x in samples]) for samples in (q, p)
    )
    had = []
    for b, sizes in enumerate(zip(map(len, q), map(len, p), strict=True)):
        had.append((q_all[b] - p_all[b])[: min(sizes)].abs().sum(-1).mean())
    had_value = torch.stack(had).mean()
    kl = -(q_all.softmax(-1) * p_all.log_softmax(-1)).sum(-1).mean()
    each = [transported((p_b / 2).softmax(-1), (q_b / 2).softmax(-1)) for p_b, q_b in zip(p_all, q_all, strict=True)]
    sinkhorn = each[-1] if commit == "77e32ae" else torch.stack(each).sum()
    distil = given["distillation_weight"] * (had_value + 0.1 * kl + 0.1 * sinkhorn)
    ce = F.cross_entropy(z[:, :-1].flatten(0, 1), arrays["student_labels"][:, 1:].flatten(), ignore_index=IGNORED)
    return {
        "had_component": had_value,
        "kl_component": kl,
        "sinkhorn_component": sinkhorn,
        "distil_loss": distil,
        "ce_loss": ce,
        "total_loss": ce + distil,
    }


def write(path: Path, commit: str, vocabularies: tuple[int, int] = (60, 64), **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(3)
    arrays: dict[str, Tensor] = {}
    for model, vocabulary, sizes in (("student", vocabularies[0], (4, 3)), ("teacher", vocabularies[1], (6, 2))):
        labels = torch.full((2, 9), IGNORED)
        for b, size in enumerate(sizes):
            labels[b, 3 - b : 3 - b + size] = torch.randint(vocabulary, (size,), generator=generator)
        arrays[f"{model}_labels"] = labels
        arrays[f"{model}_logits"] = 3 * torch.randn(2, 9, vocabulary, generator=generator).double()
    z = arrays["student_logits"].requires_grad_()
    given = GIVEN | changes
    found = outputs(arrays, given, commit)
    gradients = {}
    for name in ("distil", "total", "kl_component", "sinkhorn_component"):
        value = found.get(f"{name}_loss", found.get(name))
        (gradients[f"grad_{name}_student_logits"],) = torch.autograd.grad(value, z, retain_graph=True)
    meta = {"source": f"2018cx/Multi-Level-OT@{commit}", "function": "DistillationLoss.forward", **given}
    contents = {name: value.detach().numpy() for name, value in (arrays | found | gradients).items()}
    np.savez(path / "made.npz", meta_json=np.array(json.dumps(meta)), **contents)
    return path / "made.npz"


@pytest.mark.parametrize("vocabularies", [(60, 64), (11, 13), (70, 12), (13, 55)])
@pytest.mark.parametrize("commit", COMMITS)
def test_every_release_is_reproduced(tmp_path, commit, vocabularies):
    check(write(tmp_path, commit, vocabularies))


@pytest.mark.parametrize(
    "changes",
    [
        {"student_temperature": 2.0, "teacher_temperature": 1.5},
        {"skip_student_eos": False, "skip_teacher_eos": True},
        {"skip_teacher_eos": True},
        {"distillation_weight": 0.7},
    ],
)
@pytest.mark.parametrize("commit", COMMITS)
def test_every_setting_is_reproduced(tmp_path, commit, changes):
    check(write(tmp_path, commit, **changes))


@pytest.mark.parametrize("written", COMMITS)
@pytest.mark.parametrize("said", COMMITS)
def test_releases_are_told_apart(tmp_path, written, said):
    file = write(tmp_path, written)
    with np.load(file) as contents:
        arrays = dict(contents)
    meta = json.loads(str(arrays["meta_json"])) | {"source": f"2018cx/Multi-Level-OT@{said}"}
    np.savez(file, **(arrays | {"meta_json": np.array(json.dumps(meta))}))
    if said == written:
        return check(file)
    with pytest.raises(AssertionError, match=r": off by"):
        check(file)
    return None


@pytest.mark.parametrize("f", [2, 5])
def test_what_the_authors_code_gets_wrong_is_left_out(tmp_path, f):
    with pytest.raises(pytest.skip.Exception, match=rf"f '{f}': "):
        check(write(tmp_path, "712cfb4", f=f))


@pytest.mark.parametrize(("commit", "changes"), [("712cfb4", {"f": 3}), ("712cfb4", {"top_k": 20}), ("1234567", {})])
def test_what_is_not_known_fails(tmp_path, commit, changes):
    with pytest.raises(NotUnderstood):
        check(write(tmp_path, commit, **changes))
