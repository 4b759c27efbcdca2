"""Files as the authors of DSKD v2 would write them, of every configuration, by formulas written out here in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_check import check
from golden_dskd_v2 import looked_up
from golden_files import NotUnderstood
from torch import Tensor
from torch.linalg import pinv
from torch.nn.functional import cross_entropy

ARRAYS = Path(__file__).parent / "arrays"
FILES = {"one tokenizer": "dskdv2_same_init", "two tokenizers": "dskdv2_eta_init"}


class File:
    """A committed file, to be written once more with another configuration and other outputs."""

    def __init__(self, name: str, folder: Path) -> None:
        with np.load(ARRAYS / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.meta = json.loads(str(self.arrays.pop("meta_json")))
        self.path = folder / "fabricated.npz"
        self.exact = "aligned_response_indices" in self.meta

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[name])

    def label(self, model: str) -> Tensor:
        return self[f"{model}_label" if self.exact else "label"]

    def write(self, args: dict[str, Any], outputs: dict[str, Tensor], **meta: Any) -> Path:
        inputs = {k: v for k, v in self.arrays.items() if not k.startswith(("comp_", "log_", "grad_")) and k != "loss"}
        values = {name: value.detach().numpy() for name, value in outputs.items()}
        contents = self.meta | {"args": self.meta["args"] | args} | meta
        np.savez(self.path, **(inputs | values), meta_json=np.array(json.dumps(contents)))
        return self.path


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def adaptive(p: Tensor, q: Tensor, mass: float) -> Tensor:
    """Token by token from the least likely up: the tail holds at most `mass`."""
    rows = []
    for one_p, one_q in zip(p, q, strict=True):
        order = one_p.argsort()
        tail = order[one_p[order].cumsum(0) <= mass]
        gap = (one_p - one_q).abs().detach()
        share = 1 - gap[tail].sum() / gap.sum()
        rows.append(share * kl(one_p, one_q) + (1 - share) * kl(one_q, one_p))
    return torch.stack(rows)


def divergence(given: dict[str, Any], teacher: Tensor, student: Tensor) -> Tensor:
    """[n] of logits [n, V]"""
    p, q = ((logits / given["kd_temperature"]).softmax(-1) for logits in (teacher, student))
    skew = given["skew_lambda"]
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "js_divergence": lambda: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
        "skewed_forward_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skewed_reverse_kl": lambda: kl(q, (1 - skew) * p + skew * q),
        "adaptive_kl": lambda: adaptive(p, q, given["adaptive_kl_alpha"]),
    }[given["kd_objective"]]()


def shared(file: File) -> tuple[list[int], list[int]]:
    """Entries of the same spelling, of student and teacher."""
    if not file.exact:
        every = list(range(len(file["student_lm_head"])))
        return every, every
    ours, theirs = file.meta["student_vocab"], file.meta["teacher_vocab"]
    both = [piece for piece in ours if piece in theirs]
    return [ours.index(piece) for piece in both], [theirs.index(piece) for piece in both]


def positions(file: File) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(sequence, position) of the rows that are compared, of student and teacher."""
    if not file.exact:
        every = [(int(b), int(t)) for b, t in (file.label("student") != -100).nonzero()]
        return every, every
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for b, (of_teacher, of_student) in enumerate(file.meta["aligned_response_indices"]):
        for into, model, rows in ((found[0], "student", of_student), (found[1], "teacher", of_teacher)):
            first = int((file.label(model)[b] != -100).nonzero()[0])
            into.extend((b, first + row) for row in rows)
    return found


def outputs(file: File, changes: dict[str, Any]) -> dict[str, Tensor]:
    """What the authors' forward returns and logs; the arrays of `file` get the start of this configuration."""
    given = file.meta["args"] | changes
    h, w = (file[f"student_{name}"].double().requires_grad_() for name in ("hidden", "lm_head"))
    h_t, w_t = (file[f"teacher_{name}"].double() for name in ("hidden", "lm_head"))
    mine, yours = (ids[: given["topk_vocab"]] if given["topk_vocab"] != -1 else ids for ids in shared(file))
    torch.manual_seed(1)
    if given["init_t2s_projector"]:
        start = (w_t[yours].T @ pinv(w.detach()[mine].T)).T
    else:
        start = torch.randn(h.shape[-1], h_t.shape[-1]).double() / 4
    t2s_w = start.float().double().requires_grad_()
    s2t_w = (torch.randn(h_t.shape[-1], h.shape[-1]).double() / 4).float().double().requires_grad_()
    file.arrays["t2s_weight"] = t2s_w.detach().float().numpy()
    trained = not given["init_s2t_projector"]
    to_teacher = s2t_w.T if trained else w.detach()[mine].T @ pinv(w_t[yours].T)
    file.arrays["s2t_weight"] = to_teacher.detach().T.float().numpy()

    ours, theirs = (tuple(torch.tensor(places).T) for places in positions(file))
    y = h_t[theirs] @ w_t.T
    z, t2s, s2t = h[ours] @ w.T, h_t[theirs] @ t2s_w.T @ w.detach().T, h[ours] @ to_teacher @ w_t.T
    ids = looked_up(file.meta["student_vocab"], file.meta["teacher_vocab"]) if file.exact else list(range(len(w_t)))
    target = torch.tensor(ids)[y.argmax(-1)]
    heard = target >= 0
    agrees = heard & (t2s.argmax(-1) == target)
    agreement = agrees.sum() / heard.sum()
    learns = agrees if agreement <= given["t2s_agreement"] else heard
    ce = cross_entropy(t2s[heard], target[heard])
    t2s_kd = (divergence(given, t2s.detach(), z) * learns).sum() / max(1e-3, learns.sum())
    s2t_kd = divergence(given, y, s2t)[heard].mean()
    kept = {"only_stu_kd": t2s_kd + ce, "only_tea_kd": s2t_kd}
    kd = next((value for name, value in kept.items() if given[name]), t2s_kd + ce + s2t_kd)
    scored = file.label("student") != -100
    nll = cross_entropy(h[scored] @ w.T, file.label("student")[scored])
    loss = (1 - given["kd_rate"]) * nll + given["kd_rate"] * kd
    leaves = {"student_hidden": h, "student_lm_head": w}
    leaves |= {} if given["only_tea_kd"] else {"t2s_w": t2s_w}
    leaves |= {"s2t_w": s2t_w} if trained and not given["only_stu_kd"] else {}
    gradients = torch.autograd.grad(loss, [*leaves.values()], retain_graph=True)
    of_ce = torch.autograd.grad(ce, t2s_w, retain_graph=True)[0]
    in_teacher = {"student_hidden": h} | ({"s2t_w": s2t_w} if trained else {})
    of_kd = torch.autograd.grad(s2t_kd, [*in_teacher.values()])
    components = {"t2s_ce_loss": ce, "t2s_kd_loss": t2s_kd, "s2t_kd_loss": s2t_kd, "kd_loss": kd}
    return {
        "loss": loss.reshape(file["loss"].shape),
        "log_nll_loss": nll,
        "comp_t2s_agreement": agreement.double(),
        **{f"comp_{name}": value for name, value in components.items()},
        **{f"grad_total_{name}": value for name, value in zip(leaves, gradients, strict=True)},
        "grad_t2s_ce_loss__t2s_w": of_ce,
        **{f"grad_s2t_kd_loss__{name}": value for name, value in zip(in_teacher, of_kd, strict=True)},
    }


@pytest.mark.parametrize("name", FILES.values(), ids=FILES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_t2s_projector": False, "init_s2t_projector": False},
        {"init_t2s_projector": False},
        {"init_s2t_projector": False},
        {"topk_vocab": 9},
        {"t2s_agreement": 0.0},
        {"only_stu_kd": True},
        {"only_tea_kd": True},
        {"only_tea_kd": True, "init_t2s_projector": False, "init_s2t_projector": False},
        {"kd_rate": 0.8, "kd_temperature": 1.5},
        {"kd_objective": "reverse_kl"},
        {"kd_objective": "js_divergence"},
        {"kd_objective": "skewed_forward_kl", "skew_lambda": 0.3},
        {"kd_objective": "skewed_reverse_kl", "skew_lambda": 0.3},
        {"kd_objective": "adaptive_kl", "adaptive_kl_alpha": 0.4},
    ],
    ids=str,
)
def test_every_setting_is_reproduced(tmp_path, name, changes):
    file = File(name, tmp_path)
    expected = outputs(file, changes)
    check(file.write(changes, expected))
    with pytest.raises(AssertionError, match="off by"):
        check(file.write(changes, expected | {"loss": expected["loss"] * 1.001}))


@pytest.mark.parametrize("name", FILES.values(), ids=FILES)
def test_the_committed_file_is_what_the_formula_gives(tmp_path, name):
    file = File(name, tmp_path)
    written = {key: file[key].double() for key in file.arrays}
    for key, value in outputs(file, {}).items():
        if key in written:
            torch.testing.assert_close(value.detach(), written[key], rtol=2e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", FILES.values(), ids=FILES)
@pytest.mark.parametrize(
    "change", [{"label_smoothing": 0.1}, {"kd_objective": "hellinger"}, {"on_policy": True}], ids=str
)
def test_what_is_not_understood_fails(tmp_path, name, change):
    with pytest.raises(NotUnderstood):
        check(File(name, tmp_path).write(change, {}))


def test_a_students_unknown_token_is_no_target(tmp_path):
    file = File(FILES["two tokenizers"], tmp_path)
    with pytest.raises(pytest.skip.Exception, match="an error of the authors'"):
        check(file.write({}, {}, student_unk_id=0))
