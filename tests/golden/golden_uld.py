"""Universal logit distillation: the paper's code, DSKD's, and that of TRL's GOLD."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from golden_files import CHUNK_BYTES, Golden, NotUnderstood, Pair, configuration, held
from torch import Tensor

from kdzoo import Tokens
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_aligners import ByBytes
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_uld import ULD


def run(
    golden: Golden,
    params: Mapping[str, Any],
    *,
    uld: float = 1.0,
    cross_entropy: float = 0.0,
    convention: str = "unshifted",
    chunks: Mapping[str, Tensor] | None = None,
    only: slice = slice(None),
) -> Replay:
    """Both losses on the recorded logits, of the sequences `only`."""

    def side(model: str) -> Recorded:
        labels = "labels" if convention == "unshifted" else "label"
        return Recorded(
            golden[f"{model}_{labels}"][only],
            convention,  # type: ignore[arg-type]
            logits=golden[f"{model}_logits"][only],
            chunks=None if chunks is None else chunks[model][only],
        )

    return replay(
        {"ce": (CrossEntropy, {}, cross_entropy), "uld": (ULD, params, uld)},
        side("student"),
        side("teacher"),
        same_tokens=False,
        student_ids=golden.arrays.get("mapping_tensor") if params.get("hybrid") else None,
        chunk_bytes=CHUNK_BYTES,
    )


def original(golden: Golden) -> Iterator[Pair]:
    renamed = ("student_temperature", "teacher_temperature", "skip_student_eos", "skip_teacher_eos")
    given = configuration(golden, known={*renamed, "distillation_weight", "crossentropy_weight"})
    params = {"preset": "llm-recipes@ab6e798"} | {name: given[name] for name in renamed if name in given}
    uld, cross_entropy = given["distillation_weight"], given.get("crossentropy_weight", 1)
    alone, both = run(golden, params, uld=uld), run(golden, params, uld=uld, cross_entropy=cross_entropy)
    yield from held(
        golden,
        {
            "distil_loss": alone.loss,
            "ce_loss": cross_entropy * both.terms["ce/cross_entropy"],
            "total_loss": both.loss,
            "grad_distil_student_logits": alone.gradients["student_hidden"],
            "grad_total_student_logits": both.gradients["student_hidden"],
        },
    )


def dskd(golden: Golden) -> Iterator[Pair]:
    # The scripts pass a temperature, and the criterion does not read it.
    rate = configuration(golden, known={"kd_rate", "kd_temperature", "teacher_temperature"}).get("kd_rate", 0.5)
    params = {"preset": "dskd@077337a"}
    alone = run(golden, params, convention="shifted")
    both = run(golden, params, uld=rate, cross_entropy=1 - rate, convention="shifted")
    yield from held(
        golden,
        {
            "uld_sum": alone.loss * alone.tokens,
            "batch_denom": torch.tensor(alone.tokens),
            "loss": both.loss,
            "log_nll_loss": both.terms["ce/cross_entropy"],
            "log_uld_loss": both.terms["uld/uld"],
            "grad_uld_sum_student_logits": alone.gradients["student_hidden"] * alone.tokens,
            "grad_loss_student_logits": both.gradients["student_hidden"],
        },
    )


STRATEGIES = {"observed": "trl@f2cd577", "bayesian": "trl@f2cd577, bayesian"}


def gold(golden: Golden) -> Iterator[Pair]:
    renamed = {
        "uld_student_temperature": "student_temperature",
        "uld_teacher_temperature": "teacher_temperature",
        "uld_skip_student_eos": "skip_student_eos",
        "uld_skip_teacher_eos": "skip_teacher_eos",
        "uld_use_hybrid_loss": "hybrid",
        "uld_hybrid_matched_weight": "matched_weight",
        "uld_hybrid_unmatched_weight": "unmatched_weight",
        "beta": "beta",
    }
    others = {"uld_crossentropy_weight", "uld_distillation_weight", "use_extended_uld", "uld_token_merge_strategy"}
    given = configuration(golden, known={*renamed, *others})
    if given["uld_token_merge_strategy"] not in STRATEGIES:
        raise NotUnderstood(f"uld_token_merge_strategy '{given['uld_token_merge_strategy']}'")
    params = {ours: given[theirs] for theirs, ours in renamed.items()}
    params["preset"] = STRATEGIES[given["uld_token_merge_strategy"]]
    if params["matched_weight"] is None:
        params["unmatched_weight"] = None  # without the one, theirs reads neither
    if not given["use_extended_uld"]:
        params["align"] = "position"
    chunks = spans(golden) if given["use_extended_uld"] else None
    weights = {"uld": given["uld_distillation_weight"], "cross_entropy": given["uld_crossentropy_weight"]}
    found = run(golden, params, **weights, chunks=chunks)
    yield from held(golden, {"loss": found.loss, "grad_student_logits": found.gradients["student_hidden"]})
    if given["uld_use_hybrid_loss"]:
        last = run(golden, params, chunks=chunks, only=slice(-1, None))
        share = (golden["mapping_tensor"] >= 0).sum() / golden["teacher_logits"].shape[-1]
        weight = share if params["matched_weight"] is None else params["matched_weight"]
        rest = 1 - weight if params["unmatched_weight"] is None else params["unmatched_weight"]
        for name, factor in (("matched", weight), ("unmatched", rest)):
            yield from held(golden, {f"last_{name}_loss": last.terms[f"uld/{name}"] / factor})


def spans(golden: Golden) -> dict[str, Tensor]:
    """Model -> [B, T, spans]: what our aligner makes of the byte offsets, at the rows that score the tokens."""
    sides = {model: golden.tensor(f"{model}_labels") for model in ("student", "teacher")}
    most = min(labels.shape[1] for labels in sides.values())
    found = {model: torch.zeros(*labels.shape, most, dtype=torch.bool) for model, labels in sides.items()}
    for b in range(len(sides["student"])):
        tokens, places = {}, {}
        for model, labels in sides.items():
            places[model] = (labels[b] != -100).nonzero().squeeze(-1)
            offsets = golden.tensor(f"{model}_byte_offsets")[b, places[model]]
            ends = offsets[:, 1].tolist()
            tokens[model] = Tokens(labels[b, places[model]].tolist(), offsets[:, 0].tolist(), ends, "x" * max(ends))
        aligned = ByBytes(ByBytes.Params()).align(tokens["student"], tokens["teacher"]).spans
        for number, (first_s, end_s, first_t, end_t) in enumerate(aligned):
            found["student"][b, places["student"][first_s:end_s] - 1, number] = True
            found["teacher"][b, places["teacher"][first_t:end_t] - 1, number] = True
    return found


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    "Nicolas-BZRD/llm-recipes: DistillationLoss.forward": original,
    "songmzhang/DSKD: UniversalLogitDistillation.forward": dskd,
    "songmzhang/DSKD: UniversalLogitDistillation.compute_universal_logit_distillation_loss": dskd,
    "huggingface/trl: ULDLoss.__call__": gold,
}
