"""Files as the authors' functions would write them, of every configuration, by formulas written out here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_check import check
from golden_files import NotUnderstood
from torch import Tensor

ARRAYS = Path(__file__).parent / "arrays"

Formula = Callable[[Tensor, Tensor], Tensor]
"""Of the student's and the teacher's logits [..., V], a number per position."""


@pytest.fixture
def fabricate(tmp_path):
    """`fabricate(source, function, config, outputs)`: the logits of a committed file, with these outputs."""

    def fabricate(
        source: str, function: str, config: dict[str, Any], outputs: dict[str, Tensor], **arrays: Any
    ) -> Path:
        meta = {"source": source, "function": function, "norm": "made here", **config}
        values = {name: value.detach().numpy() for name, value in outputs.items()}
        inputs = {name: ARRAY[name] for name in ("student_logits", "teacher_logits", "label")}
        kept = {name: value for name, value in (inputs | arrays).items() if value is not None}
        np.savez(tmp_path / "fabricated.npz", **kept, **values, meta_json=np.array(json.dumps(meta)))
        return tmp_path / "fabricated.npz"

    return fabricate


with np.load(ARRAYS / "fkl_dskd_kt2.npz") as _file:
    ARRAY = {name: _file[name] for name in _file.files if name != "meta_json"}
LABEL = torch.tensor(ARRAY["label"])
MASK = LABEL != -100


def logits() -> tuple[Tensor, Tensor]:
    z, y = (torch.tensor(ARRAY[f"{model}_logits"]).double() for model in ("student", "teacher"))
    return z.requires_grad_(), y


def of_sum(formula: Formula) -> dict[str, Tensor]:
    """As DSKD's functions give it."""
    z, y = logits()
    total = formula(z, y)[MASK].sum()
    return {"loss_sum": total, "n_tokens": MASK.sum(), "grad_student_logits": torch.autograd.grad(total, z)[0]}


def of_mean(formula: Formula, mask: Tensor = MASK, scale: float = 1.0) -> dict[str, Tensor]:
    """As the others do."""
    z, y = logits()
    loss = formula(z, y)[mask].sum() / mask.sum() * scale
    return {"loss": loss, "n_tokens": mask.sum(), "grad_student_logits": torch.autograd.grad(loss, z)[0]}


def probabilities(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """q and p"""
    return z.softmax(-1), y.softmax(-1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def tempered(formula: Formula, tau: float, teacher_tau: float = 1.0) -> Formula:
    """`formula` of q and p."""
    return lambda z, y: formula((z / tau).softmax(-1), (y / tau / teacher_tau).softmax(-1))


# songmzhang/DSKD


def adaptive(q: Tensor, p: Tensor, alpha: float) -> Tensor:
    order = p.argsort(-1)
    tail = p.gather(-1, order).cumsum(-1) <= alpha
    gap = (p - q).abs().gather(-1, order).detach()
    g_tail, g_head = (gap * tail).sum(-1), (gap * ~tail).sum(-1)
    return (g_head * kl(p, q) + g_tail * kl(q, p)) / (g_head + g_tail)


DSKD: dict[str, Callable[[float, float], Formula]] = {
    "forward_kl": lambda skew, alpha: lambda q, p: kl(p, q),
    "reverse_kl": lambda skew, alpha: lambda q, p: kl(q, p),
    "js": lambda skew, alpha: lambda q, p: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    "skewed_forward_kl": lambda skew, alpha: lambda q, p: kl(p, skew * p + (1 - skew) * q),
    "skewed_reverse_kl": lambda skew, alpha: lambda q, p: kl(q, (1 - skew) * p + skew * q),
    "adaptive_kl": lambda skew, alpha: lambda q, p: adaptive(q, p, alpha),
}
"""`skew_lambda` and `adaptive_kl_alpha` -> formula of q and p."""
DSKD_DEFAULTS = {
    "kd_temperature": 2.0,
    "teacher_temperature": 1.0,
    "use_tea_temp": False,
    "skew_lambda": 0.1,
    "adaptive_kl_alpha": 0.5,
}


@pytest.mark.parametrize("name", DSKD)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kd_temperature": 1.0},
        {"teacher_temperature": 1.5},  # which does nothing
        {"teacher_temperature": 1.5, "use_tea_temp": True},
        {"skew_lambda": 0.4},
        {"adaptive_kl_alpha": 0.8},
    ],
    ids=str,
)
def test_every_setting_of_dskds_divergences_is_reproduced(fabricate, name, changes):
    given = DSKD_DEFAULTS | changes
    formula = tempered(
        DSKD[name](given["skew_lambda"], given["adaptive_kl_alpha"]),
        given["kd_temperature"],
        given["teacher_temperature"] if given["use_tea_temp"] else 1.0,
    )
    function = f"VariousDivergence.compute_{name}_divergence"
    check(fabricate("songmzhang/DSKD@077337a", function, given, of_sum(formula)))


OBJECTIVES = {name.replace("js", "js_divergence"): name for name in DSKD}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kd_rate": 0.3},
        {"kd_temperature": 1.0},
        {"teacher_temperature": 1.5, "use_tea_temp": True},  # which it does not pass on
        {"skew_lambda": 0.4},
        {"adaptive_kl_alpha": 0.8},
        {"batch_denom": 20.0},
    ],
    ids=str,
)
def test_every_objective_of_dskds_forward_is_reproduced_beside_the_cross_entropy(fabricate, objective, changes):
    given = DSKD_DEFAULTS | {"kd_objective": objective, "kd_rate": 0.5, "batch_denom": float(MASK.sum())} | changes
    formula = tempered(
        DSKD[OBJECTIVES[objective]](given["skew_lambda"], given["adaptive_kl_alpha"]), given["kd_temperature"]
    )
    z, y = logits()
    nll = -z.log_softmax(-1)[MASK].gather(-1, LABEL[MASK][:, None]).sum()
    kd, denom, rate = formula(z, y)[MASK].sum(), given.pop("batch_denom"), given["kd_rate"]
    loss = ((1 - rate) * nll + rate * kd) / denom
    outputs = {
        "loss": loss,
        "log_loss": loss,
        "log_nll_loss": nll / denom,
        "log_kd_loss": kd / denom,
        "log_accuracy": (z.argmax(-1) == LABEL).sum() / denom,
        "batch_denom": torch.tensor(denom),
        "grad_student_logits": torch.autograd.grad(loss, z)[0],
    }
    check(fabricate("songmzhang/DSKD@077337a", "VariousDivergence.forward", given, outputs))


# songmzhang/KDFlow


def kdflows_js(beta: float) -> Formula:
    def value(q: Tensor, p: Tensor) -> Tensor:
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)

    return value


KDFLOW: dict[str, Callable[[dict[str, float]], Formula]] = {
    "compute_kl_div": lambda given: lambda q, p: kl(p, q),
    "compute_reverse_kl_div": lambda given: lambda q, p: kl(q, p),
    "compute_js_div": lambda given: kdflows_js(given["jsd_beta"]),
    "compute_skewed_kl_div": lambda given: (
        lambda q, p: kl(p, given["skew_lambda"] * p + (1 - given["skew_lambda"]) * q)
    ),
    "compute_skewed_rkl_div": lambda given: (
        lambda q, p: kl(q, given["skew_lambda"] * q + (1 - given["skew_lambda"]) * p)
    ),
    "compute_adaptive_kl_div": lambda given: lambda q, p: adaptive(q, p, given["adaptive_kl_alpha"]),
    "compute_tvd": lambda given: lambda q, p: 0.5 * (p - q).abs().sum(-1),
}
KDFLOW_DEFAULTS = {"temperature": 1.0, "skew_lambda": 0.1, "jsd_beta": 0.5, "adaptive_kl_alpha": 0.5}


@pytest.mark.parametrize("function", KDFLOW)
@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 2.0}, {"skew_lambda": 0.4}, {"jsd_beta": 0.2}, {"adaptive_kl_alpha": 0.8}],
    ids=str,
)
def test_every_setting_of_kdflows_divergences_is_reproduced(fabricate, function, changes):
    given = KDFLOW_DEFAULTS | changes
    formula = tempered(KDFLOW[function](given), given["temperature"])
    check(fabricate("songmzhang/KDFlow@3a7a21a", function, given, of_sum(formula)))
    check(fabricate("songmzhang/KDFlow@3a7a21a", function, changes, of_sum(formula)))  # the others are their defaults


# jongwooko/distillm, and ghwang-s/abkd


def cross_entropy(p: Tensor, q: Tensor) -> Tensor:
    return -(p * q.log()).sum(-1)


def mixed_js(lam: float) -> Formula:
    def value(q: Tensor, p: Tensor) -> Tensor:
        m = (1 - lam) * p + lam * q
        return lam * kl(q, m) + (1 - lam) * kl(p, m)

    return value


DISTILLM: dict[str, tuple[dict[str, float], Callable[[float], Formula]]] = {
    "forward_kl": ({}, lambda lam: lambda q, p: cross_entropy(p, q)),
    "reverse_kl": ({}, lambda lam: lambda q, p: kl(q, p)),
    "tv_distance": ({}, lambda lam: lambda q, p: 0.5 * (p - q).abs().sum(-1)),
    "symmetric_kl": (
        {"jongwooko/distillm": 0.9, "ghwang-s/abkd": 0.1},
        lambda lam: lambda q, p: (1 - lam) * cross_entropy(p, q) + lam * kl(q, p),
    ),
    "js_distance": ({"jongwooko/distillm": 0.9, "ghwang-s/abkd": 0.1}, mixed_js),
    "skewed_forward_kl": (
        {"jongwooko/distillm": 0.1, "ghwang-s/abkd": 0.1},
        lambda lam: lambda q, p: cross_entropy(p, lam * p + (1 - lam) * q),
    ),
    "skewed_reverse_kl": (
        {"jongwooko/distillm": 0.1, "ghwang-s/abkd": 0.1},
        lambda lam: lambda q, p: kl(q, (1 - lam) * p + lam * q),
    ),
}


@pytest.mark.parametrize("repository", ["jongwooko/distillm", "ghwang-s/abkd"])
@pytest.mark.parametrize("name", DISTILLM)
@pytest.mark.parametrize("lam", [None, 0.35])
def test_every_setting_of_distillms_losses_is_reproduced(fabricate, repository, name, lam):
    defaults, made = DISTILLM[name]
    config = {} if lam is None or not defaults else {"lam": lam}
    used = config.get("lam", defaults.get(repository, 0.0))
    check(fabricate(f"{repository}@d47e77f", name, config, of_mean(tempered(made(used), 1.0))))


def abkds_adaptive(q: Tensor, p: Tensor, mu: float) -> Tensor:
    order = p.argsort(-1, descending=True)
    head = p.gather(-1, order).cumsum(-1) <= mu
    head[..., 0] = True
    gap = (p - q).abs().gather(-1, order).detach()
    share = (gap * head).sum(-1) / gap.sum(-1)
    return share * kl(p, q) + (1 - share) * kl(q, p)


@pytest.mark.parametrize("config", [{}, {"mu": 0.5}, {"mu": 0.8}], ids=str)
def test_abkds_copy_of_the_adaptive_divergence_is_reproduced(fabricate, config):
    formula = tempered(lambda q, p: abkds_adaptive(q, p, config.get("mu", 0.5)), 1.0)
    check(fabricate("ghwang-s/abkd@df81318", "AKL", config, of_mean(formula)))


# ghwang-s/abkd


def alpha_beta(a: float, b: float) -> Formula:
    """Case by case, with the constants of the authors' code."""

    def value(q: Tensor, p: Tensor) -> Tensor:
        if a == 0 and b == 0:
            return 0.5 * (q.log() - p.log()).square().sum(-1)
        if a == 0:
            return (q**b * (q**b / p**b).log() - q**b + p**b).sum(-1) / b
        if b == 0:
            return (p**a * (p**a / q**a).log() - p**a + q**a).sum(-1) / a
        if a + b == 0:
            return ((q**a / p**a).log() + (p / q) ** a - 1).sum(-1) / a
        both = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -both.sum(-1) / (a * b)

    return value


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        (0.2, 0.7),
        (0.1, 0.8),
        (0.5, 0.5),
        (0.9, -0.3),
        (-0.4, 1.2),
        (2.0, 1.0),
        (0.5, 0.001),
        (0.001, 0.5),
        (0.0, 0.0),
        (1.0, 0.0),
        (0.0, 1.0),
        (0.5, 0.0),
        (0.0, 0.5),
        (-0.5, 0.0),
        (0.5, -0.5),
        (-0.5, 0.5),
    ],
)
def test_every_case_of_abkds_divergence_is_reproduced(fabricate, alpha, beta):
    config = {"alpha": alpha, "beta": beta}
    outputs = of_mean(tempered(alpha_beta(alpha, beta), 1.0))
    check(fabricate("ghwang-s/abkd@df81318", "ab_div", config, outputs))


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (0.0, 0.5), (0.5, -0.5)])
@pytest.mark.parametrize(
    ("function", "names"), [("ABKL", ("alpha", "beta", "T")), ("ABKL.forward", ("ab_alpha", "ab_beta", "kd_T"))]
)
def test_abkds_divergence_of_classifiers_is_reproduced(fabricate, alpha, beta, function, names):
    z, y = (x.detach()[:, 0].clone() for x in logits())
    z.requires_grad_()
    loss = tempered(alpha_beta(alpha, beta), 4.0)(z, y).mean()
    outputs = {"loss": loss, "grad_student_logits": torch.autograd.grad(loss, z)[0]}
    config = dict(zip(names, (alpha, beta, 4.0), strict=True))
    arrays = {"student_logits": z.detach().numpy(), "teacher_logits": y.numpy(), "label": None}
    check(fabricate("ghwang-s/abkd@df81318", function, config, outputs, **arrays))


# huggingface/trl


@pytest.mark.parametrize("beta", [None, 0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("tau", [1.0, 0.9])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_every_setting_of_trls_divergence_is_reproduced(fabricate, beta, tau, reduction):
    w = 0.5 if beta is None else beta

    def value(q: Tensor, p: Tensor) -> Tensor:
        if w in (0.0, 1.0):
            return kl(q, p) if w else kl(p, q)
        m = w * p + (1 - w) * q
        return w * kl(p, m) + (1 - w) * kl(q, m)

    config = {"temperature": tau, "reduction": reduction} | ({} if beta is None else {"beta": beta})
    scale = {"batchmean": 1.0, "sum": float(MASK.sum()), "mean": 1 / ARRAY["student_logits"].shape[-1]}[reduction]
    outputs = of_mean(tempered(value, tau), scale=scale)
    if reduction == "batchmean":
        outputs["loss_num_items20"] = outputs["loss"] * MASK.sum() / 20
    function = "GKDTrainer.generalized_jsd_loss"
    check(fabricate("huggingface/trl@f2cd577 (1.10.0.dev0)", function, config, outputs))


# arcee-ai/DistillKit


def symmetric_js(q: Tensor, p: Tensor) -> Tensor:
    return mixed_js(0.5)(q, p)


def some_zero(q: Tensor, p: Tensor) -> Tensor:
    """KL(p || q) where p may be 0."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)


def js_with_zeros(q: Tensor, p: Tensor) -> Tensor:
    return 0.5 * some_zero((p + q) / 2, p) + 0.5 * some_zero((p + q) / 2, q)


def total_variation(q: Tensor, p: Tensor) -> Tensor:
    return 0.5 * (p - q).abs().sum(-1)


@pytest.mark.parametrize(
    ("whole", "dense", "formula"),
    [
        ("KLDLoss", "dense_kl_div", some_zero),
        ("JSDLoss", "dense_js_div", symmetric_js),
        ("TVDLoss", "dense_tvd", total_variation),
    ],
)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_distillkits_losses_of_whole_vocabularies_are_reproduced(fabricate, whole, dense, formula, tau):
    """The class multiplies by τ² and takes a mean, the function under it sums; logits are masked as they are."""
    config = {"temperature": tau, "missing": "zero"}
    mask = {"label": None, "mask": MASK.numpy()}
    source = "arcee-ai/DistillKit@a61c2e7"
    check(fabricate(source, f"{whole}.__call__", config, of_mean(tempered(formula, tau), scale=tau**2), **mask))
    check(fabricate(source, dense, config, of_mean(tempered(formula, tau), scale=float(MASK.sum())), **mask))
    labels = {"label": None, "labels": LABEL.numpy()}
    check(fabricate(source, dense, config, of_mean(tempered(formula, tau), scale=float(MASK.sum())), **labels))


@pytest.mark.parametrize(
    ("function", "formula"),
    [("sparse_kl_div", some_zero), ("sparse_js_div", js_with_zeros), ("sparse_tvd", total_variation)],
)
@pytest.mark.parametrize("missing", ["ZERO", "MissingProbabilityHandling.SYMMETRIC_UNIFORM"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("recorded", [True, False])
def test_distillkits_losses_of_the_likeliest_tokens_are_reproduced(
    fabricate, function, formula, missing, tau, recorded
):
    """`recorded`: the file holds the teacher's likeliest tokens, else how many of its logits they are."""
    zero = missing == "ZERO"
    _, y = logits()
    values, ids = y.log_softmax(-1).topk(4, dim=-1)

    def sparse(z: Tensor, y: Tensor) -> Tensor:
        q, top = (z / tau).softmax(-1), values.exp() ** (1 / tau)
        rest = torch.zeros_like(top[..., :1]) if zero else 1 - top.sum(-1, keepdim=True)
        p = torch.cat([top / top.sum(-1, keepdim=True) if zero else top, rest], -1)
        top_q = q.gather(-1, ids)
        return formula(torch.cat([top_q, 1 - top_q.sum(-1, keepdim=True)], -1), p)

    config = {"temperature": tau, "missing": missing, "log_target": True} | ({} if recorded else {"k": 4})
    arrays = {"label": None, "mask": MASK.numpy()}
    if recorded:
        arrays |= {"target_ids": ids.numpy(), "target_values": values.numpy(), "teacher_logits": None}
    file = fabricate(
        "arcee-ai/DistillKit@a61c2e7", function, config, of_mean(sparse, scale=float(MASK.sum())), **arrays
    )
    if zero or tau == 1.0:
        check(file)
    else:
        with pytest.raises(pytest.skip.Exception, match="tempers the teacher's other tokens"):
            check(file)


# What is not understood.


@pytest.mark.parametrize(
    ("source", "function", "config"),
    [
        ("songmzhang/DSKD@077337a", "VariousDivergence.compute_js_divergence", DSKD_DEFAULTS | {"js_weight": 0.3}),
        ("jongwooko/distillm@d47e77f", "tv_distance", {"lam": 0.1}),
        ("ghwang-s/abkd@df81318", "ab_div", {"alpha": 0.5, "beta": 0.5, "gamma": 1.0}),
        ("huggingface/trl@f2cd577", "generalized_jsd_loss", {"reduction": "none"}),
        ("arcee-ai/DistillKit@a61c2e7", "sparse_kl_div", {"temperature": 1.0}),
        ("arcee-ai/DistillKit@a61c2e7", "sparse_kl_div", {"k": 4, "missing": "dense"}),
    ],
)
def test_what_is_not_understood_fails(fabricate, source, function, config):
    with pytest.raises(NotUnderstood):
        check(fabricate(source, function, config, of_mean(tempered(lambda q, p: kl(p, q), 1.0))))
