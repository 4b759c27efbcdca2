"""Divergences between logits of one tokenizer: DSKD, DistiLLM and ABKD's copies of it, ABKD, TRL and DistillKit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from golden_files import CHUNK_BYTES, NOT_COVERED_SETTINGS, Golden, NotUnderstood, Pair, configuration, held
from torch import Tensor

from kdzoo import Loss
from kdzoo.testing import Recorded, replay
from kdzoo_abkd import ABKD
from kdzoo_divergences import JS, AdaptiveKL, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL, TotalVariation

Slots = dict[str, tuple[type[Loss], dict[str, Any], float]]


def compare(
    golden: Golden,
    losses: Slots,
    *,
    teacher: Tensor | None = None,
    reduction: str = "rows",
    masks_directly: bool = False,
    noise: float = 0.0,
) -> Iterator[Pair]:
    """Replay `losses` on the file's logits, `teacher` in place of its teacher's where that is not recorded.

    `reduction` says what the authors' scalar is: the mean over "rows", their "sum", or the mean over all "entries".
    `noise` is how far off it is.
    """
    student = golden.tensor("student_logits")
    teacher = golden.tensor("teacher_logits") if teacher is None else teacher
    rank = student.dim()  # of a classifier, [samples, classes]
    labels, convention = _labels(golden, student, masks_directly)
    found = replay(
        losses,
        Recorded(labels, convention, logits=student if rank == 3 else student[None]),
        Recorded(labels, convention, logits=teacher if rank == 3 else teacher[None]),
        same_tokens=True,
        chunk_bytes=CHUNK_BYTES,
    )
    total = found.loss * found.rows
    scale = {"rows": 1.0, "sum": found.rows, "entries": 1.0 / student.shape[-1]}[reduction]
    gradient = found.gradients["student_hidden"].reshape(student.shape)
    if "loss" in golden:
        yield Pair(("loss",), found.loss * scale, golden.tensor("loss"), noise)
    yield from held(
        golden,
        {
            "loss_sum": total,
            "loss_num_items20": total / 20,
            "n_tokens": torch.tensor(found.rows),
            "grad_student_logits": gradient * (scale if "loss" in golden else found.rows),
        },
    )


def _labels(golden: Golden, student: Tensor, masks_directly: bool) -> tuple[Tensor, Any]:
    """Labels, and whether they are shifted; functions that take a mask give it to the logits as it is."""
    for name in ("label", "labels"):
        if name in golden:
            return golden.tensor(name), "shifted" if name == "label" or masks_directly else "unshifted"
    if "mask" in golden:
        return torch.where(golden.tensor("mask").bool(), 0, -100), "shifted"
    return torch.zeros(student.shape[:-1] if student.dim() == 3 else (1, len(student)), dtype=torch.long), "shifted"


# songmzhang/DSKD

SHARED_KEYS = {"kd_temperature", "teacher_temperature", "use_tea_temp", "skew_lambda", "adaptive_kl_alpha"}
"""Of the authors' one set of arguments: every function is given all and reads some."""


def dskd(golden: Golden, *, loss: type[Loss], **own: str) -> Iterator[Pair]:
    """`own`: our parameter -> theirs. Their js takes log(prob + 1e-9), which is far below the tolerance."""
    given = configuration(golden, known=SHARED_KEYS)
    params = {"temperature": given["kd_temperature"]} | {ours: given[theirs] for ours, theirs in own.items()}
    if given.get("use_tea_temp"):
        params["teacher_temperature"] = given["teacher_temperature"]
    yield from compare(golden, {"kd": (loss, params, 1.0)})


# jongwooko/distillm, and ghwang-s/abkd

Made = Callable[[float], Slots]
"""The authors' `lam` -> losses and weights."""

DISTILLM: dict[str, tuple[Made, dict[str, float]]] = {
    "forward_kl": (lambda lam: {"kd": (ForwardKL, {"subtract_entropy": False}, 1.0)}, {}),
    "reverse_kl": (lambda lam: {"kd": (ReverseKL, {}, 1.0)}, {}),
    "symmetric_kl": (
        lambda lam: {
            "fkl": (ForwardKL, {"subtract_entropy": False}, 1 - lam),
            "rkl": (ReverseKL, {}, lam),
        },
        {"jongwooko/distillm": 0.9, "ghwang-s/abkd": 0.1},
    ),
    "js_distance": (
        lambda lam: {"kd": (JS, {"teacher_weight": 1 - lam}, 1.0)},
        {"jongwooko/distillm": 0.9, "ghwang-s/abkd": 0.1},
    ),
    "tv_distance": (lambda lam: {"kd": (TotalVariation, {}, 1.0)}, {}),
    "skewed_forward_kl": (
        lambda lam: {"kd": (SkewForwardKL, {"skew": lam, "subtract_entropy": False}, 1.0)},
        {"jongwooko/distillm": 0.1, "ghwang-s/abkd": 0.1},
    ),
    "skewed_reverse_kl": (
        lambda lam: {"kd": (SkewReverseKL, {"skew": lam}, 1.0)},
        {"jongwooko/distillm": 0.1, "ghwang-s/abkd": 0.1},
    ),
}
"""Their function -> our losses, and the default of `lam` by repository, where it has one."""
DISTILLM["wsd"] = (DISTILLM["symmetric_kl"][0], {"ghwang-s/abkd": 0.5})


def distillm(golden: Golden, *, made: Made, lam: float | None) -> Iterator[Pair]:
    given = configuration(golden, known=set() if lam is None else {"lam", "lambda"})
    yield from compare(golden, made(given.get("lam", given.get("lambda", lam))))


def abkd(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"alpha", "beta"})
    yield from compare(golden, {"kd": (ABKD, {**given, "constants": "authors"}, 1.0)}, noise=abkd_noise(given))


def abkd_noise(given: Mapping[str, Any]) -> float:
    """What float32 leaves of sums near 1 that the authors divide by αβ."""
    product = abs(given["alpha"] * given["beta"])
    return 4 * torch.finfo(torch.float32).eps / product if product else 0.0


def abkd_of_classifiers(golden: Golden) -> Iterator[Pair]:
    names = {"ab_alpha": "alpha", "ab_beta": "beta", "kd_T": "temperature", "T": "temperature", "tau": "temperature"}
    given = configuration(golden, known={*names, *names.values()})
    params = {names.get(key, key): value for key, value in given.items()}
    yield from compare(golden, {"kd": (ABKD, {**params, "constants": "authors"}, 1.0)}, noise=abkd_noise(params))


def abkd_akl(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"mu"})
    yield from compare(golden, {"kd": (AdaptiveKL, {"head_mass": given.get("mu", 0.5), "crossing": "tail"}, 1.0)})


# huggingface/trl


def generalized_jsd(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"beta", "temperature", "reduction", "num_items_in_batch", "logits_are_probs"})
    reductions = {"batchmean": "rows", "sum": "sum", "mean": "entries"}
    reduction = given.get("reduction", "batchmean")
    if reduction not in reductions or given.get("num_items_in_batch") or given.get("logits_are_probs"):
        raise NotUnderstood(f"configuration {given}: no such reduction here")
    params = {"teacher_weight": given.get("beta", 0.5), "temperature": given.get("temperature", 1.0)}
    yield from compare(golden, {"kd": (JS, params, 1.0)}, reduction=reductions[reduction])


# arcee-ai/DistillKit

NUMBER_OF_TOKENS = ("k", "top_k", "topk")
DISTILLKIT_KEYS = {
    *NUMBER_OF_TOKENS,
    "temperature",
    "missing",
    "missing_probability_handling",
    "log_target",
    "log_values",
    "target_generation_temperature",
    "student_generation_temperature",
    "eps",
    "chunk_length",
    "sparse_chunk_length",
}


def distillkit(golden: Golden, *, loss: type[Loss], function: str) -> Iterator[Pair]:
    """A class of theirs is a loss with τ² and a mean, a function what is under it, a sum over the mask.

    Of sparse ones, the teacher's tokens are recorded, or its `k` likeliest are what they were taken from.
    """
    given = configuration(golden, known=DISTILLKIT_KEYS)
    whole = function.endswith("__call__")
    tau = given.get("temperature", 1.0)
    student_tau = tau / given.get("student_generation_temperature", 1.0)
    teacher_tau = tau / given.get("target_generation_temperature", 1.0)
    params: dict[str, Any] = {"temperature": student_tau, "teacher_temperature": teacher_tau / student_tau}
    params["square_temperature"] = whole
    teacher = None
    k = next((given[key] for key in NUMBER_OF_TOKENS if given.get(key)), None)
    ids = next((golden.tensor(key) for key in ("target_ids", "sparse_ids") if key in golden), None)
    if ids is not None:
        k = ids.shape[-1]
        teacher = _of_likeliest(golden, ids, logarithms=given.get("log_target", given.get("log_values", True)))
    elif k is None and function.startswith("sparse"):
        raise NotUnderstood("nothing says how many of the teacher's tokens are compared")
    if k is not None:
        missing = str(given.get("missing", given.get("missing_probability_handling", "zero")))
        missing = missing.rpartition(".")[2].lower()
        if missing not in ("zero", "symmetric_uniform"):
            raise NotUnderstood(f"missing '{missing}': no such handling here")
        tempered = f"{missing}, tempered"
        listed = NOT_COVERED_SETTINGS["arcee-ai/DistillKit: sparse_kl_div"]["missing"]  # alike in all of them
        if teacher_tau != 1.0 and tempered in listed:
            pytest.skip(f"{golden.function}, missing '{tempered}': {listed[tempered]}")
        params |= {"top_k": k, "rest": "dropped" if missing == "zero" else "one_token"}
    yield from compare(
        golden,
        {"kd": (loss, params, 1.0)},
        teacher=teacher,
        reduction="rows" if whole else "sum",
        masks_directly=True,
    )


def _of_likeliest(golden: Golden, ids: Tensor, logarithms: bool) -> Tensor:
    """Logits of a teacher whose recorded tokens have these log-probabilities (or logits), the others alike."""
    student = golden.tensor("student_logits")
    values = next(golden.tensor(key) for key in ("target_values", "sparse_values") if key in golden).to(student.dtype)
    vocabulary = student.shape[-1]
    left = (1 - values.exp().sum(-1, keepdim=True)).clamp_min(0) / max(1, vocabulary - ids.shape[-1])
    others = left.log() if logarithms else torch.full_like(left, -torch.inf)
    return others.expand(*ids.shape[:-1], vocabulary).scatter(-1, ids.long(), values)


COVERED: Mapping[str, Callable[[Golden], Iterator[Pair]]] = {
    **{
        f"songmzhang/DSKD: VariousDivergence.compute_{theirs}_divergence": partial(dskd, loss=loss, **own)
        for theirs, loss, own in (
            ("forward_kl", ForwardKL, {}),
            ("reverse_kl", ReverseKL, {}),
            ("js", JS, {}),
            ("skewed_forward_kl", SkewForwardKL, {"skew": "skew_lambda"}),
            ("skewed_reverse_kl", SkewReverseKL, {"skew": "skew_lambda"}),
            ("adaptive_kl", AdaptiveKL, {"head_mass": "adaptive_kl_alpha"}),
        )
    },
    **{
        f"{repository}: {function}": partial(distillm, made=made, lam=lam.get(repository))
        for function, (made, lam) in DISTILLM.items()
        for repository in (lam or ("jongwooko/distillm", "ghwang-s/abkd"))
    },
    "ghwang-s/abkd: ab_div": abkd,
    "ghwang-s/abkd: ABKL": abkd_of_classifiers,
    "ghwang-s/abkd: ABKL.forward": abkd_of_classifiers,
    "ghwang-s/abkd: AKL": abkd_akl,
    "huggingface/trl: generalized_jsd_loss": generalized_jsd,
    "huggingface/trl: GKDTrainer.generalized_jsd_loss": generalized_jsd,
    **{
        f"arcee-ai/DistillKit: {function}": partial(distillkit, loss=loss, function=function)
        for loss, functions in (
            (ForwardKL, ("KLDLoss.__call__", "dense_kl_div", "sparse_kl_div")),
            (JS, ("JSDLoss.__call__", "dense_js_div", "sparse_js_div")),
            (TotalVariation, ("TVDLoss.__call__", "dense_tvd", "sparse_tvd")),
        )
        for function in functions
    },
}
