"""KDFlow's simple cross-tokenizer distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from golden_files import CHUNK_BYTES, INDEPENDENT, Golden, NotUnderstood, Pair, configuration, held

from kdzoo.testing import Recorded, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_simple_ctkd import SimpleCTKD

DIVERGENCES = {
    "kl": ("forward_kl", {}),
    "rkl": ("reverse_kl", {}),
    "jsd": ("js", {}),
    "skl": ("skew_forward_kl", {"skew_lambda": "skew"}),
    "srkl": ("skew_reverse_kl", {"skew_lambda": "skew"}),
    "akl": ("adaptive_kl", {"adaptive_alpha": "head_mass"}),
    "tvd": ("total_variation", {}),
}
"""Their `kd_loss_fn` -> our divergence, and their parameters by the names of ours."""
DEFAULTS = {"kd_loss_fn": "kl", "kd_temperature": 1.0, "kd_ratio": 0.5, "jsd_beta": 0.5}


def simple_ctkd(golden: Golden) -> Iterator[Pair]:
    """The sum over pairs of tokens is divided by a count that they are given."""
    given = DEFAULTS | configuration(golden, known={*DEFAULTS, "skew_lambda", "adaptive_alpha"})
    if given["kd_loss_fn"] not in DIVERGENCES or given["jsd_beta"] != 0.5:
        raise NotUnderstood(f"kd_loss_fn '{given['kd_loss_fn']}', jsd_beta {given['jsd_beta']}: not here")
    divergence, own = DIVERGENCES[given["kd_loss_fn"]]
    params: dict[str, Any] = {ours: given[theirs] for theirs, ours in own.items() if theirs in given}
    params |= {"preset": "kdflow@3a7a21a", "divergence": divergence, "temperature": given["kd_temperature"]}
    partners = torch.full((golden["teacher_logits"].shape[-1],), -1)
    partners[golden.tensor("teacher_overlap_token_ids")] = golden.tensor("student_overlap_token_ids")
    ours, theirs = (golden.tensor(f"{model}_aligned_idx") for model in ("student", "teacher"))
    rate = given["kd_ratio"]
    found = replay(
        {"sft": (CrossEntropy, {}, 1 - rate), "kd": (SimpleCTKD, params, rate)},
        *(Recorded(golden[f"{model}_label"], logits=golden[f"{model}_logits"]) for model in ("student", "teacher")),
        same_tokens=False,
        pairs=torch.stack([ours, theirs], 1),
        student_ids=partners,
        chunk_bytes=CHUNK_BYTES,
    )
    scale = found.tokens / float(golden["avg_micro_batch_token_num"].item())
    yield from held(
        golden,
        {
            "loss": found.loss * scale,
            "kd_loss": found.terms["kd/divergence"] * scale,
            "ce_loss": found.terms["sft/cross_entropy"] * scale,
            "grad_student_logits": found.gradients["student_hidden"] * scale,
        },
    )


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    f"{source}: SimpleCrossTokenizerKD.training_step": simple_ctkd for source in ("songmzhang/KDFlow", INDEPENDENT)
}
