"""Minimum edit distance: DSKD's criterion and tokenkit's baseline loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from golden_files import CHUNK_BYTES, INDEPENDENT, Golden, NotUnderstood, Pair, configuration, held
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from kdzoo import ModelInfo, ModelPair
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_min_ed import MinED

# songmzhang/DSKD

ABOUT_TOKENS = {"student_vocab", "teacher_vocab", "dtw_base_to_blending"}
OF_DSKD = {"kd_rate", "kd_temperature", "teacher_temperature", "kd_objective", "label_smoothing", "criterion"}
MARKERS = str.maketrans("", "", "Ġ▁")


def dskd(golden: Golden) -> Iterator[Pair]:
    """The divergence beside the cross-entropy. It reads no teacher's temperature.

    In float32 the authors' targets overwrite the student's logits, so that the divergence and its gradient are 0 and
    only the cross-entropy is left: such numbers are those without the divergence.
    """
    given = {"kd_rate": 0.5, "kd_temperature": 2.0} | configuration(golden, known=OF_DSKD | ABOUT_TOKENS)
    if given.get("label_smoothing") or given.get("kd_objective", "forward_kl") != "forward_kl":
        raise NotUnderstood(f"kd_objective '{given.get('kd_objective')}', label_smoothing: not here")
    rate, params = given["kd_rate"], {"preset": "dskd@077337a", "temperature": given["kd_temperature"]}
    overwritten = "log_forward_kl" in golden and not golden["log_forward_kl"].any()
    found = dskd_replay(golden, given, params, 1 - rate, 0.0 if overwritten else rate)
    alone = dskd_replay(golden, given, params, 1 - rate, 0.0)
    scale = found.tokens / float(golden["batch_denom"].item()) if "batch_denom" in golden else 1.0
    yield from held(
        golden,
        {
            "loss": found.loss * scale,
            "grad_student_logits": found.gradients["student_hidden"] * scale,
            "log_nll_loss": found.terms["sft/cross_entropy"] * scale,
            "log_forward_kl": found.terms["kd/kd"] * scale * (not overwritten),
            "log_loss": found.loss * scale,
            "loss_fp32alias": alone.loss * scale,
            "grad_fp32alias": alone.gradients["student_hidden"] * scale,
            "log_fp32alias_nll_loss": alone.terms["sft/cross_entropy"] * scale,
            "log_fp32alias_loss": alone.loss * scale,
        },
    )
    if "log_accuracy" in golden and not overwritten:
        yield from held(golden, {"log_accuracy": found.watched["sft/token_accuracy"] * scale})
    yield from targets(golden, given, params)


def dskd_replay(golden: Golden, given: Any, params: dict[str, Any], sft: float, kd: float) -> Replay:
    def side(model: str) -> Recorded:
        return Recorded(
            golden[f"{model}_label"],
            logits=golden.tensor(f"{model}_logits").double(),
            input_ids=golden[f"{model}_input_ids"],
        )

    return replay(
        {"sft": (CrossEntropy, {}, sft), "kd": (MinED, params, kd)},
        side("student"),
        side("teacher"),
        same_tokens=False,
        pairs=walked_pairs(golden, given),
        student_ids=golden["tea2stu_id_mapping"],
        chunk_bytes=CHUNK_BYTES,
    )


def targets(golden: Golden, given: Any, params: dict[str, Any]) -> Iterator[Pair]:
    """The distributions that the student is compared with, token by token; and which are the gold token alone."""
    if "aligned_teacher_logits" not in golden:
        return
    scored = golden.tensor("student_label") != -100
    labels, v = golden.tensor("student_label")[scored], golden["student_logits"].shape[-1]
    partners = golden.tensor("tea2stu_id_mapping").long()
    pairs = walked_pairs(golden, given)
    inputs = {
        model: golden.tensor(f"{model}_input_ids")[golden.tensor(f"{model}_label") != -100]
        for model in ("student", "teacher")
    }
    taught = partners[inputs["teacher"][pairs[:, 1]]] == inputs["student"][pairs[:, 0]]
    ours, theirs = pairs[taught].unbind(1)
    logits = golden.tensor("teacher_logits")[golden.tensor("teacher_label") != -100].double()
    log_p = (logits[theirs] / params["temperature"]).log_softmax(-1)
    found = torch.nn.functional.one_hot(labels, v).double()
    if len(ours):
        found[ours] = made(golden, params, partners).moved(log_p).exp()
    aligned = golden.tensor("aligned_teacher_logits")[scored].double()
    yield Pair(("aligned_teacher_logits",), found, (aligned / params["temperature"]).softmax(-1))
    if "onehot_fallback" in golden:
        alone = torch.ones(len(labels)).index_fill(0, ours, 0)
        yield Pair(("onehot_fallback",), alone, golden.tensor("onehot_fallback")[scored].double())


def made(golden: Golden, params: dict[str, Any], partners: Tensor) -> MinED:
    student, teacher = (
        ModelInfo(1, golden[f"{model}_logits"].shape[-1], 1, "recorded") for model in ("student", "teacher")
    )
    pair = ModelPair(student, teacher, False, partners, {"nearest_in_student": partners})
    return MinED(MinED.Params(**params), pair, {})


def walked_pairs(golden: Golden, given: Any) -> Tensor:
    """[P, 2] the student's token and the teacher's, where the walk leads from the one to a single other.

    They walk over the tokens at scored positions, those that the models have read there.
    """
    found, first_s, first_t = [], 0, 0
    rows = [
        [
            ids[label != -100].tolist()
            for ids, label in zip(golden.tensor(f"{model}_input_ids"), golden.tensor(f"{model}_label"), strict=True)
        ]
        for model in ("student", "teacher")
    ]
    for b, (student, teacher) in enumerate(zip(*rows, strict=True)):
        if "student_vocab" in given:
            texts = [
                [given[f"{model}_vocab"][token].translate(MARKERS) for token in tokens]
                for model, tokens in (("student", student), ("teacher", teacher))
            ]
            walked = warp(*texts)
        else:
            walked = given["dtw_base_to_blending"][b]
        found += [(first_s + i, first_t + at[0]) for i, at in enumerate(walked) if len(at) == 1]
        first_s, first_t = first_s + len(student), first_t + len(teacher)
    return torch.tensor(found, dtype=torch.long).view(-1, 2)


def warp(student: Sequence[str], teacher: Sequence[str]) -> list[list[int]]:
    """For each of the student's texts those of the teacher's on the cheapest walk; ties as in simpledtw."""
    infinite = float("inf")
    total = {(i, -1): infinite for i in range(len(teacher))} | {(-1, j): infinite for j in range(len(student))}
    total[-1, -1] = 0.0
    for i, theirs in enumerate(teacher):
        for j, mine in enumerate(student):
            before = min(total[i - 1, j], total[i, j - 1], total[i - 1, j - 1])
            total[i, j] = before + Levenshtein.distance(theirs, mine)
    found: list[list[int]] = [[] for _ in student]
    i, j = len(teacher) - 1, len(student) - 1
    while i >= 0 and j >= 0:
        found[j].insert(0, i)
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(steps, key=lambda step: total[step])
    return found


# bminixhofer/tokenkit


def tokenkit(golden: Golden) -> Iterator[Pair]:
    """Two sums over one count: pairs of chunks of one token, and tokens of other chunks with the gold token.

    Their chunks are of tokens [B, T, C], and what stands at a token predicts the next one: a pair's distributions are
    those behind it, while the gold token is that of the chunk itself. The count takes an empty chunk for a pair.
    """
    meta = {**golden.meta, **golden.meta.get("config", {})}
    meta.pop("config", None)
    known = {"kd_temp", "temperature", "student_vocab", "teacher_vocab", "jax", "x64"}
    given = configuration(replace(golden, meta=meta), known=known)
    params = {"preset": "tokenkit@bcacdef", "temperature": given.get("kd_temp", given.get("temperature", 2.0))}
    chunks = {model: scored_chunks(golden, model) for model in ("student", "teacher")}
    counts = {model: found[:, 1:].sum(1) for model, found in chunks.items()}
    single = (counts["student"] == 1) & (counts["teacher"] == 1)  # [B, C]
    counted = counts["teacher"] == (counts["student"] == 1).long()
    alone, alone_counted = (
        (chunks["student"][:, 1:] & ~kept[:, None]).any(-1) for kept in (single, counted)
    )  # [B, S - 1]
    count = (counted.sum() + alone_counted.sum()).double()
    taught = of_pairs(golden, params, chunks, single)
    gold = of_gold(golden, params, alone)
    total = taught.loss * taught.tokens + gold.loss * gold.tokens
    gradient = taught.gradients["student_hidden"] * taught.tokens + gold.gradients["student_hidden"] * gold.tokens
    yield from held(
        golden,
        {
            "loss": total / count,
            "grad_student_logits": gradient / count,
            "report_mined_one_to_one_mask_sum": single.sum(),
            "report_mined_onehot_mask_sum": alone.sum(),
        },
    )


def scored_chunks(golden: Golden, model: str) -> Tensor:
    """[B, T, C] which tokens are in which chunk, where the token behind is scored; the last one is as it was."""
    chunks = golden.tensor(f"alignment_{model}").bool().clone()
    chunks[:, :-1] &= golden.tensor(f"loss_mask_{model}").bool()[:, 1:, None]
    return chunks


def last_of(chunks: Tensor) -> Tensor:
    """[B, C] the last token of each chunk."""
    ends = chunks.clone()
    ends[:, :-1] &= ~chunks[:, 1:]
    return ends.int().argmax(1)


def of_pairs(golden: Golden, params: dict[str, Any], chunks: dict[str, Tensor], single: Tensor) -> Replay:
    sequence = single.nonzero()[:, 0]
    places, sides = [], []
    for model, members in chunks.items():
        logits = golden.tensor(f"{model}_logits").double()
        at = sequence * logits.shape[1] + last_of(members)[single]
        labels = torch.full((logits.shape[0] * logits.shape[1],), -100).index_fill(0, at, 0)
        places.append(torch.searchsorted((labels != -100).nonzero().squeeze(-1), at))
        sides.append(Recorded(labels.view(logits.shape[:2]), logits=logits))
    return mined(golden, {**params, "gold": False}, *sides, pairs=torch.stack(places, 1))


def of_gold(golden: Golden, params: dict[str, Any], alone: Tensor) -> Replay:
    student, teacher = (golden.tensor(f"{model}_logits").double() for model in ("student", "teacher"))
    labels = torch.full(student.shape[:2], -100)
    labels[:, :-1] = torch.where(alone, golden.tensor("student_input_ids")[:, 1:].long(), -100)
    nothing = torch.full(teacher.shape[:2], -100)
    return mined(golden, params, Recorded(labels, logits=student), Recorded(nothing, logits=teacher))


def mined(golden: Golden, params: dict[str, Any], student: Recorded, teacher: Recorded, pairs: Any = None) -> Replay:
    mapping = golden.tensor("mined_mapping").long()
    partners = torch.zeros(golden["student_logits"].shape[-1], dtype=torch.long)  # they fill up with the first entry
    partners[: len(mapping)] = mapping
    if "logit_mask_new" in golden:
        partners = torch.where(golden.tensor("logit_mask_new") < 0, -1, partners)
    return replay(
        {"kd": (MinED, params, 1.0)},
        student,
        teacher,
        same_tokens=False,
        pairs=pairs,
        teacher_ids=partners,
        chunk_bytes=CHUNK_BYTES,
    )


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    "songmzhang/DSKD: MinEditDisForwardKLD.forward": dskd,
    "songmzhang/DSKD: MinEditDisForwardKLD.get_aligned_teacher_logits": dskd,
    "bminixhofer/tokenkit: compute_baseline_mined_loss": tokenkit,
    f"{INDEPENDENT}: MinEditDisForwardKLD.forward": dskd,
    f"{INDEPENDENT}: compute_baseline_mined_loss": tokenkit,
}
