"""Residual learning and expert fusion: independent references of the formulas; the authors published no code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from golden_files import CHUNK_BYTES, INDEPENDENT, Golden, NotUnderstood, Pair, configuration, held

from kdzoo import Experts, Fusion
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_fusions import ExpertAttention, ExpertMean, ExpertRouterAll, RouterWeighted, attention
from kdzoo_residual import Projectors, Residual


def residual_stage_1(golden: Golden) -> Iterator[Pair]:
    # How the projectors began is in the file itself.
    params = configuration(golden, known={"rows", "target", "reconstruction_weight", "init"})
    params.pop("init", None)
    found = replay(
        {"projectors": (Projectors, {"width": len(golden["p_ta"]), **params}, 1.0)},
        None,
        Recorded(golden["teacher_label"], hidden=golden["teacher_hidden"], head=golden["teacher_lm_head"]),
        weights={
            "projectors.teacher_to_low.weight": golden["p_ta"],
            "projectors.low_to_teacher.weight": golden["p_at"],
        },
        same_tokens=True,
        chunk_bytes=CHUNK_BYTES,
    )
    yield from held(
        golden,
        {
            "loss": found.loss,
            "agreement": found.watched["projectors/teacher_agreement"],
            "relative_error": found.watched["projectors/relative_error"],
            "grad_loss__p_ta": found.gradients["projectors.teacher_to_low.weight"],
            "grad_loss__p_at": found.gradients["projectors.low_to_teacher.weight"],
        },
    )


def residual_stage_2(golden: Golden) -> Iterator[Pair]:
    settings = {"beta", "beta_gradient", "normalise", "attend", "wrong", "head_gradient", "state_gradient"}
    params = configuration(golden, known={"lambda", "mask", *settings})
    weight, mask = params.pop("lambda"), params.pop("mask", True)
    if not mask:
        params["indicator"] = "all"
    same = "student_tokens_to_chunks" not in golden
    weights = {"residual.low_to_student.weight": golden["p_as"]}
    if not same:
        weights["residual.student_to_low.weight"] = golden["p_sa"]

    def side(model: str) -> Recorded:
        return Recorded(
            golden[f"{model}_label"],
            hidden=golden[f"{model}_hidden"],
            head=golden[f"{model}_lm_head"],
            chunks=None if same else golden[f"{model}_tokens_to_chunks"],
            attention_mask=golden.arrays.get(f"{model}_attention_mask"),
        )

    def run(residual: float, cross_entropy: float) -> Replay:
        return replay(
            {
                "sft": (CrossEntropy, {}, cross_entropy),
                "residual": (Residual, {"width": len(golden["p_ta"]), **params}, residual),
            },
            side("student"),
            side("teacher"),
            weights=weights,
            artifacts={"projectors": {"teacher_to_low.weight": golden["p_ta"]}},
            same_tokens=same,
            chunk_bytes=CHUNK_BYTES,
        )

    names = {"student_hidden": "student_hidden", "student_head": "student_lm_head"}
    names["residual.low_to_student.weight"] = "p_as"
    if not same:
        names["residual.student_to_low.weight"] = "p_sa"
    alone = run(1.0, 0.0)
    rows = alone.tokens
    both = run(weight, 1 - weight)
    yield from held(
        golden,
        {
            "loss": both.loss,
            "residual_sum": alone.loss * rows,
            "sft_sum": alone.terms["sft/cross_entropy"] * rows,
            "n_tokens": torch.tensor(rows),
        },
    )
    scored = golden.tensor("student_label") != -100
    # Without a mask, the file's `wrong` is all of them.
    wrong, share = golden.tensor("wrong")[scored], alone.watched["residual/residual_share"]
    yield Pair(("wrong, watched",), share, wrong.double().mean())
    if mask:
        yield Pair(("wrong",), ~alone.facts["residual"]["teacher.correct"], wrong)
    yield Pair(("beta",), alone.watched["residual/beta"], golden.tensor("beta")[scored].mean())
    for ours, theirs in names.items():
        for found, prefix, factor in ((alone, "grad_residual_sum__", rows), (both, "grad_loss__", 1.0)):
            gradient = found.gradients[ours] * factor
            # A file may leave out a gradient that is none.
            nothing = torch.zeros_like(gradient)
            expected = golden.tensor(prefix + theirs) if prefix + theirs in golden else nothing
            yield Pair((prefix + theirs,), gradient, expected)


FUSIONS: dict[str, type[Fusion]] = {
    fusion.name: fusion for fusion in (ExpertAttention, ExpertMean, ExpertRouterAll, RouterWeighted)
}


def expert_fusion(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"fusion", "top_k"})
    if given["fusion"] not in FUSIONS:
        raise NotUnderstood(f"fusion '{given['fusion']}': no such fusion here")
    fusion = FUSIONS[given["fusion"]]
    shape = golden["experts"].shape[:2]  # [B, T]; there are no padded rows
    outputs, logits = golden.tensor("experts").flatten(0, 1), golden.tensor("router_logits").flatten(0, 1)
    weights = logits.softmax(-1)
    if fusion in (ExpertAttention, RouterWeighted):
        # The router's own weights are the model's business: as Mixtral makes them.
        kept, which = weights.topk(given["top_k"])
        weights = torch.zeros_like(weights).scatter(1, which, kept / kept.sum(-1, keepdim=True))
    experts, ours = Experts(outputs, logits, weights), fusion(fusion.Params())
    yield Pair(("fused",), ours.fuse(experts).unflatten(0, shape), golden.tensor("fused"))
    if fusion is ExpertAttention:
        yield from held(golden, {"alpha": attention(outputs).unflatten(0, shape)})
        if "alpha" in golden:
            share = golden.tensor("alpha").diagonal(dim1=-2, dim2=-1).mean(-1)
            yield Pair(("alpha, watched",), ours.watch(experts)["self_attention"].unflatten(0, shape), share)


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    f"{INDEPENDENT}: stage 1": residual_stage_1,
    f"{INDEPENDENT}: stage 2": residual_stage_2,
    f"{INDEPENDENT}: expert fusion": expert_fusion,
}
