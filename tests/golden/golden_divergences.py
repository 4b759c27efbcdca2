"""Divergences between logits of one tokenizer: DSKD, KDFlow, DistiLLM, ABKD (and its copies of it), TRL, DistillKit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from golden_files import CHUNK_BYTES, NOT_COVERED_SETTINGS, Golden, NotUnderstood, Pair, configuration, held
from torch import Tensor

from kdzoo import Loss, TokenWeights
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_abkd import ABKD
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import JS, AdaptiveKL, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL, TotalVariation

Slots = dict[str, tuple[type[Loss], dict[str, Any], float]]
Weighing = dict[str, tuple[type[TokenWeights], dict[str, Any], dict[str, Any]]]


def compare(
    golden: Golden,
    losses: Slots,
    *,
    teacher: Tensor | None = None,
    reduction: str = "rows",
    masks_directly: bool = False,
    noise: float = 0.0,
    weighing: Weighing | None = None,
) -> Iterator[Pair]:
    """Replay `losses` on the file's logits, `teacher` in place of its teacher's where that is not recorded.

    `reduction` says what the authors' scalar is: the mean over "rows", their "sum", or the mean over all "entries".
    `noise` is how far off it is.
    """
    student, found = golden.tensor("student_logits"), run(golden, losses, teacher, masks_directly, weighing)
    total = found.loss * found.tokens
    scale = {"rows": 1.0, "sum": found.tokens, "entries": 1.0 / student.shape[-1]}[reduction]
    gradient = found.gradients["student_hidden"].reshape(student.shape)
    if "loss" in golden:
        yield Pair(("loss",), found.loss * scale, golden.tensor("loss"), noise)
    yield from held(
        golden,
        {
            "loss_sum": total,
            "loss_num_items20": total / 20,
            "n_tokens": torch.tensor(found.tokens),
            "grad_student_logits": gradient * (scale if "loss" in golden else found.tokens),
        },
    )


def run(
    golden: Golden,
    losses: Slots,
    teacher: Tensor | None = None,
    masks_directly: bool = False,
    weighing: Weighing | None = None,
) -> Replay:
    student = golden.tensor("student_logits")
    teacher = golden.tensor("teacher_logits") if teacher is None else teacher
    rank = student.dim()  # of a classifier, [samples, classes]
    labels, convention = _labels(golden, student, masks_directly)
    return replay(
        losses,
        Recorded(labels, convention, logits=student if rank == 3 else student[None]),
        Recorded(labels, convention, logits=teacher if rank == 3 else teacher[None]),
        same_tokens=True,
        token_weights=weighing,
        chunk_bytes=CHUNK_BYTES,
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


DSKD: dict[str, tuple[type[Loss], dict[str, str]]] = {
    "forward_kl": (ForwardKL, {}),
    "reverse_kl": (ReverseKL, {}),
    "js": (JS, {}),
    "skewed_forward_kl": (SkewForwardKL, {"skew": "skew_lambda"}),
    "skewed_reverse_kl": (SkewReverseKL, {"skew": "skew_lambda"}),
    "adaptive_kl": (AdaptiveKL, {"head_mass": "adaptive_kl_alpha"}),
}
"""Their divergence -> our loss, and our parameter -> theirs. Their js takes log(prob + 1e-9), which is far below the
tolerance."""
DSKD_DEFAULTS = {"kd_temperature": 1.0, "teacher_temperature": 1.0, "skew_lambda": 0.1, "adaptive_kl_alpha": 0.5}


def dskd(golden: Golden, *, divergence: str) -> Iterator[Pair]:
    loss, own = DSKD[divergence]
    given = DSKD_DEFAULTS | configuration(golden, known=SHARED_KEYS)
    params = {"temperature": given["kd_temperature"]} | {ours: given[theirs] for ours, theirs in own.items()}
    if given.get("use_tea_temp"):
        params["teacher_temperature"] = given["teacher_temperature"]
    yield from compare(golden, {"kd": (loss, params, 1.0)})


def dskd_forward(golden: Golden) -> Iterator[Pair]:
    """A divergence beside the cross-entropy, over a denominator that they are given. It reads no teacher's temperature.

    (Of a `model_type` "qwen" they take the first 151851 entries; here heads have as many as the tokenizer.)
    """
    inert = {"model_type", "report_logits"}
    known = {"kd_objective", "kd_rate", "label_smoothing", "criterion", *inert, *SHARED_KEYS}
    given = DSKD_DEFAULTS | configuration(golden, known=known)
    objective = given.get("kd_objective", "forward_kl").replace("js_divergence", "js")
    if objective not in DSKD or given.get("label_smoothing"):
        raise NotUnderstood(f"kd_objective '{objective}', label_smoothing {given.get('label_smoothing')}: not here")
    loss, own = DSKD[objective]
    params = {"temperature": given["kd_temperature"]} | {ours: given[theirs] for ours, theirs in own.items()}
    rate = given.get("kd_rate", 0.5)
    found = run(golden, {"sft": (CrossEntropy, {}, 1 - rate), "kd": (loss, params, rate)})
    scale = found.tokens / float(golden["batch_denom"].item()) if "batch_denom" in golden else 1.0
    yield from held(
        golden,
        {
            "loss": found.loss * scale,
            "grad_student_logits": found.gradients["student_hidden"] * scale,
            "log_nll_loss": found.terms["sft/cross_entropy"] * scale,
            "log_kd_loss": found.terms[f"kd/{loss.name}"] * scale,
            "log_loss": found.loss * scale,
            "log_accuracy": found.watched["sft/token_accuracy"] * scale,
        },
    )


# songmzhang/KDFlow

KDFLOW: dict[str, tuple[type[Loss], Callable[[Mapping[str, float]], dict[str, float]]]] = {
    "kl": (ForwardKL, lambda given: {}),
    "reverse_kl": (ReverseKL, lambda given: {}),
    "js": (JS, lambda given: {"teacher_weight": 1 - given["jsd_beta"]}),
    "skewed_kl": (SkewForwardKL, lambda given: {"skew": given["skew_lambda"]}),
    "skewed_rkl": (SkewReverseKL, lambda given: {"skew": given["skew_lambda"]}),
    "adaptive_kl": (AdaptiveKL, lambda given: {"head_mass": given["adaptive_kl_alpha"]}),
}
"""Their `compute_<name>_div` -> our loss, and its parameters from theirs."""
KDFLOW_DEFAULTS = {"temperature": 1.0, "jsd_beta": 0.5, "skew_lambda": 0.1, "adaptive_kl_alpha": 0.5}
"""Of all of them: every function takes any argument and reads some."""


def kdflow(
    golden: Golden, *, loss: type[Loss], own: Callable[[Mapping[str, float]], dict[str, float]]
) -> Iterator[Pair]:
    given = KDFLOW_DEFAULTS | configuration(golden, known={*KDFLOW_DEFAULTS, "reduction"})
    if given.get("reduction", "none") != "none":
        raise NotUnderstood(f"reduction '{given['reduction']}': is over prompts and padding, too")
    yield from compare(golden, {"kd": (loss, {"temperature": given["temperature"], **own(given)}, 1.0)})


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
    yield from compare(golden, {"kd": (ABKD, {"preset": "abkd@df81318", **given}, 1.0)}, noise=abkd_noise(given))


def abkd_noise(given: Mapping[str, Any]) -> float:
    """What float32 leaves of sums near 1 that the authors divide by αβ."""
    product = abs(given["alpha"] * given["beta"])
    return 4 * torch.finfo(torch.float32).eps / product if product else 0.0


def abkd_of_classifiers(golden: Golden) -> Iterator[Pair]:
    names = {"ab_alpha": "alpha", "ab_beta": "beta", "kd_T": "temperature", "T": "temperature", "tau": "temperature"}
    given = configuration(golden, known={*names, *names.values()})
    params = {names.get(key, key): value for key, value in given.items()}
    yield from compare(golden, {"kd": (ABKD, {"preset": "abkd@df81318", **params}, 1.0)}, noise=abkd_noise(params))


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
        f"songmzhang/DSKD: VariousDivergence.compute_{divergence}_divergence": partial(dskd, divergence=divergence)
        for divergence in DSKD
    },
    "songmzhang/DSKD: VariousDivergence.forward": dskd_forward,
    **{
        f"songmzhang/KDFlow: compute_{name}_div": partial(kdflow, loss=loss, own=own)
        for name, (loss, own) in KDFLOW.items()
    },
    "songmzhang/KDFlow: compute_tvd": partial(kdflow, loss=TotalVariation, own=lambda given: {}),
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
