"""Files as the authors of ULD, DSKD and TRL would write them, of every configuration, by formulas written out here."""

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
from torch.nn.functional import cross_entropy

ARRAYS = Path(__file__).parent / "arrays"
MODELS = ("student", "teacher")
MAPPING = {0: 0, 1: 3, 2: 7, 4: 1, 5: 10, 7: 2, 11: 5}
"""Teacher's token -> the student's of the same spelling."""


class File:
    """A committed file, to be written once more with another configuration and other outputs."""

    def __init__(self, name: str, folder: Path) -> None:
        with np.load(ARRAYS / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.meta = json.loads(str(self.arrays.pop("meta_json")))
        self.path = folder / "fabricated.npz"
        self.z = torch.tensor(self.arrays["student_logits"]).double().requires_grad_()
        self.y = torch.tensor(self.arrays["teacher_logits"]).double()

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[name])

    def answers(self, b: int, labels: str) -> list[Tensor]:
        """Positions of the labels that count, of student and teacher."""
        return [(self[f"{model}_{labels}"][b] != -100).nonzero()[:, 0] for model in MODELS]

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.z, retain_graph=True)[0]

    def write(self, meta: dict[str, Any], outputs: dict[str, Tensor], **arrays: np.ndarray) -> Path:
        values = {name: value.detach().numpy() for name, value in outputs.items()}
        meta_json = np.array(json.dumps(self.meta | meta))
        np.savez(self.path, **(self.arrays | values | arrays), meta_json=meta_json)
        return self.path


def ranked(q: Tensor, p: Tensor) -> Tensor:
    """[n] of [n, V] and [n, W]"""
    q, p = (x.sort(-1, descending=True).values for x in (q, p))
    width = max(q.shape[1], p.shape[1])
    q, p = (torch.cat([x, x.new_zeros(len(x), width - x.shape[1])], 1) for x in (q, p))
    return (q - p).abs().sum(-1)


# The paper's code.


def original(file: File, given: dict[str, Any]) -> dict[str, Tensor]:
    values, rows, labels = [], [], []
    for b in range(len(file.z)):
        s, t = file.answers(b, "labels")
        n = min(len(s) - given["skip_student_eos"], len(t) - given["skip_teacher_eos"])
        q = (file.z[b, s - 1][:n] / given["student_temperature"]).softmax(-1)
        p = (file.y[b, t - 1][:n] / given["teacher_temperature"]).softmax(-1)
        values.append(ranked(q, p).mean())
        rows.append(file.z[b, s - 1])
        labels.append(file["student_labels"][b, s])
    distil = given["distillation_weight"] * torch.stack(values).mean()
    ce = given["crossentropy_weight"] * cross_entropy(torch.cat(rows), torch.cat(labels))
    return {
        "distil_loss": distil,
        "ce_loss": ce,
        "total_loss": distil + ce,
        "grad_distil_student_logits": file.gradient(distil),
        "grad_total_student_logits": file.gradient(distil + ce),
    }


ORIGINAL = {
    "student_temperature": 1.0,
    "teacher_temperature": 1.0,
    "skip_student_eos": True,
    "skip_teacher_eos": False,
    "distillation_weight": 1.5,
    "crossentropy_weight": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"skip_student_eos": False},
        {"skip_teacher_eos": True},
        {"skip_student_eos": False, "skip_teacher_eos": True},
        {"student_temperature": 2.0},
        {"teacher_temperature": 0.5},
        {"distillation_weight": 0.7, "crossentropy_weight": 0.2},
    ],
)
def test_every_setting_of_the_papers_code_is_reproduced(tmp_path, changes):
    file = File("uld_orig_vs11_vt13_default", tmp_path)
    outputs = original(file, ORIGINAL | changes)
    check(file.write(changes, outputs))
    if not torch.isclose(outputs["total_loss"].float(), file["total_loss"]):
        with pytest.raises(AssertionError, match="off by"):
            check(file.write(changes, {}))


# DSKD's.


def test_dskds_sum_and_its_rate_are_reproduced(tmp_path):
    file = File("uld_dskd_vs11_vt13", tmp_path)
    values, ce, rows = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for b in range(len(file.z)):
        s, t = file.answers(b, "label")
        n = min(len(s), len(t))
        values = values + ranked(file.z[b, s[:n]].softmax(-1), file.y[b, t[:n]].softmax(-1)).sum()
        ce = ce + cross_entropy(file.z[b, s], file["student_label"][b, s], reduction="sum")
        rows += len(s)
    loss = (0.2 * ce + 0.8 * values) / rows
    outputs = {"uld_sum": values, "grad_uld_sum_student_logits": file.gradient(values)}
    name = "UniversalLogitDistillation.compute_universal_logit_distillation_loss"
    for meta in ({}, {"function": name}):
        whole = {"loss": loss, "grad_loss_student_logits": file.gradient(loss)}
        check(file.write({"kd_rate": 0.8, **meta}, outputs | whole))


# TRL's.


def gold(file: File, given: dict[str, Any]) -> dict[str, Tensor]:
    late = given["uld_token_merge_strategy"] == "observed"
    skips = [given[f"uld_skip_{model}_eos"] for model in MODELS]
    values, last = [], {}
    for b in range(len(file.z)):
        positions = [place[: len(place) - skip] for place, skip in zip(file.answers(b, "labels"), skips, strict=True)]
        x = [
            (logits[b, place - 1 + late] / given[f"uld_{model}_temperature"]).softmax(-1)
            for model, logits, place in zip(MODELS, (file.z, file.y), positions, strict=True)
        ]
        if given["use_extended_uld"]:
            ends = [file[f"{m}_byte_offsets"][b, p, 1].tolist() for m, p in zip(MODELS, positions, strict=True)]
            x = [
                torch.stack([merged(one, file[f"{model}_input_ids"][b, place], group, late) for group in groups])
                for one, model, place, groups in zip(x, MODELS, positions, walk(*ends), strict=True)
            ]
        n = min(map(len, x))
        q, p = x[0][:n], x[1][:n]
        if given["uld_use_hybrid_loss"]:
            value, last = hybrid(q, p, given)
        else:
            value = ranked(q, p).mean()
        values.append(value)
    loss = given["uld_distillation_weight"] * torch.stack(values).mean()
    if given["uld_crossentropy_weight"]:
        rows, labels = file.z[:, :-1].flatten(0, 1), file["student_labels"][:, 1:].flatten()
        loss = loss + given["uld_crossentropy_weight"] * cross_entropy(rows, labels)
    return {"loss": loss, "grad_student_logits": file.gradient(loss), **last}


def walk(student: list[int], teacher: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens between ends that both have; of ends without text, after all others there, both or none."""
    common = sorted(set(student) & set(teacher))
    found: tuple[list[list[int]], list[list[int]]] = ([], [])
    before = -1
    for end in common:
        inside = [[k for k, e in enumerate(ends) if before < e <= end] for ends in (student, teacher)]
        extra = [
            len([k for k in side if ends[k] == end]) - 1 for side, ends in zip(inside, (student, teacher), strict=True)
        ]
        for groups, side, more in zip(found, inside, extra, strict=True):
            groups.append(side[: len(side) - more])
            if min(extra):
                groups.append(side[-1:])
        before = end
    return found


def merged(x: Tensor, ids: Tensor, group: list[int], late: bool) -> Tensor:
    base = group[0] if late else group[-1]
    value = x[base]
    for k in group:
        value = value if k == base else value * x[k, ids[k]].clamp_min(1e-8)
    return value


def hybrid(q: Tensor, p: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    theirs, mine = list(MAPPING), list(MAPPING.values())
    a, b, beta = p[:, theirs].clamp_min(1e-8), q[:, mine].clamp_min(1e-8), given["beta"]
    if beta in (0, 1):
        each = a * (a / b).log() if beta == 0 else b * (b / a).log()
    else:
        m = beta * a + (1 - beta) * b
        each = beta * a * (a / m).log() + (1 - beta) * b * (b / m).log()
    matched = each.sum(-1).mean()
    rest_p = [k for k in range(p.shape[1]) if k not in theirs]
    rest_q = [k for k in range(q.shape[1]) if k not in mine]
    unmatched = ranked(q[:, rest_q], p[:, rest_p]).mean()
    weights = given["uld_hybrid_matched_weight"], given["uld_hybrid_unmatched_weight"]
    if weights[0] is None:
        weights = len(theirs) / p.shape[1], 1 - len(theirs) / p.shape[1]
    return weights[0] * matched + weights[1] * unmatched, {
        "last_matched_loss": matched,
        "last_unmatched_loss": unmatched,
    }


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"uld_skip_student_eos": False},
        {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False},
        {"uld_student_temperature": 2.0, "uld_teacher_temperature": 0.5},
        {"uld_distillation_weight": 0.7, "uld_crossentropy_weight": 0.3},
        {"uld_use_hybrid_loss": True},
        {"uld_use_hybrid_loss": True, "beta": 0.0, "uld_student_temperature": 1.5},
        {"uld_use_hybrid_loss": True, "beta": 1.0, "uld_hybrid_unmatched_weight": 5.0},
        {"uld_use_hybrid_loss": True, "uld_hybrid_matched_weight": 0.4, "uld_hybrid_unmatched_weight": 0.9},
    ],
)
def test_every_setting_of_trl_is_reproduced(tmp_path, merge, extended, changes):
    file = File("uld_trl_extended_bayesian", tmp_path)
    given = file.meta["config"] | {"uld_token_merge_strategy": merge, "use_extended_uld": extended} | changes
    mapping = np.array([MAPPING.get(token, -1) for token in range(max(MAPPING) + 1)])
    outputs = gold(file, given)
    check(file.write({"config": given}, outputs, mapping_tensor=mapping))
    if not torch.isclose(outputs["loss"], file["loss"]):
        with pytest.raises(AssertionError, match="off by"):
            check(file.write({"config": given}, {}, mapping_tensor=mapping))


def test_the_committed_file_is_what_the_formula_gives(tmp_path):
    file = File("uld_trl_extended_bayesian", tmp_path)
    found = gold(file, file.meta["config"])
    torch.testing.assert_close(found["loss"].detach(), file["loss"])
    torch.testing.assert_close(found["grad_student_logits"], file["grad_student_logits"])


@pytest.mark.parametrize("change", [{"uld_token_merge_strategy": "mean"}, {"uld_top_k": 3}])
def test_what_is_not_understood_fails(tmp_path, change):
    file = File("uld_trl_extended_bayesian", tmp_path)
    with pytest.raises(NotUnderstood):
        check(file.write({"config": file.meta["config"] | change}, {}))
