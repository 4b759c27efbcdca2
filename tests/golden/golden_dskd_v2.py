"""Dual-space distillation, version 2 (songmzhang/DSKDv2), with one tokenizer and with exact token alignment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from golden_dskd import DIVERGENCES, component_gradients
from golden_files import CHUNK_BYTES, Golden, NotUnderstood, Pair, configuration, held

from kdzoo import Tokens, Vocabulary
from kdzoo.api.plugin import NoParams
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_aligners import ByBytes
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_dskd_v2 import DSKDv2

VOCABULARIES = {"student_vocab", "teacher_vocab", "student_unk_id", "aligned_response_indices"}
INERT = {"model_type", "report_logits", "criterion", "teacher_temperature"}
"""Of the authors' arguments: what these functions do not read, or what says which function it is."""
SETTINGS = {
    "label_smoothing",
    "kd_rate",
    "kd_temperature",
    "kd_objective",
    "adaptive_kl_alpha",
    "skew_lambda",
    "init_t2s_projector",
    "init_s2t_projector",
    "topk_vocab",
    "only_stu_kd",
    "only_tea_kd",
    "t2s_agreement",
}
TERMS = ("t2s_ce", "t2s_kd", "s2t_kd")


def params_of(given: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(given.keys() - SETTINGS - INERT):
        raise NotUnderstood(f"arguments {unknown}: nothing here knows what they mean")
    if given.get("label_smoothing", 0.0):
        raise NotUnderstood("label_smoothing: there is none here")
    if given["kd_objective"] not in DIVERGENCES:
        raise NotUnderstood(f"kd_objective '{given['kd_objective']}': no such divergence here")
    spaces = "student" if given.get("only_stu_kd") else "teacher" if given.get("only_tea_kd") else "both"
    return {
        "divergence": DIVERGENCES[given["kd_objective"]],
        "temperature": given["kd_temperature"],
        "skew": given["skew_lambda"],
        "head_mass": given["adaptive_kl_alpha"],
        "spaces": spaces,
        "preset": "dskdv2@5025279",
        "threshold": given["t2s_agreement"],
        "start": "pseudo_inverse" if given["init_t2s_projector"] else "random",
        "student_to_teacher": "pseudo_inverse" if given["init_s2t_projector"] else "trained",
        "top_vocabulary": None if given["topk_vocab"] == -1 else given["topk_vocab"],
    }


def dskd_v2(golden: Golden, *, exact_tokens: bool) -> Iterator[Pair]:
    found = configuration(golden, known={"args", "config", *VOCABULARIES})
    if found.get("student_unk_id") is not None:
        raise NotUnderstood("student_unk_id: what a student has no token for is left out here")
    given = found.get("args", found)
    params = params_of(given)

    def side(model: str, lexicon: Vocabulary | None = None) -> Recorded:
        prefix = f"{model}_" if exact_tokens else ""
        return Recorded(
            golden[f"{prefix}label"],
            hidden=golden[f"{model}_hidden"],
            head=golden[f"{model}_lm_head"],
            input_ids=golden[f"{prefix}input_ids"],
            vocabulary=lexicon,
        )

    aligned: dict[str, Any] = {}
    student, teacher = side("student"), side("teacher")
    if exact_tokens:
        ours, theirs = found["student_vocab"], found["teacher_vocab"]
        student, teacher = side("student", lexicon_of(ours)), side("teacher", lexicon_of(theirs))
        per_sequence = [exact_pairs(golden, b, ours, theirs) for b in range(len(golden["student_label"]))]
        for pairs, (of_teacher, of_student) in zip(per_sequence, found["aligned_response_indices"], strict=True):
            expected = torch.tensor([of_student, of_teacher]).T
            yield Pair(("aligned_response_indices",), torch.tensor(pairs).view(-1, 2), expected)
        first = [first_rows(golden[f"{model}_label"]) for model in ("student", "teacher")]
        aligned["pairs"] = [
            (first[0][b] + i, first[1][b] + j) for b, pairs in enumerate(per_sequence) for i, j in pairs
        ]
        aligned["student_ids"] = looked_up(ours, theirs)

    def run(kd: float, cross_entropy: float = 0.0, only: tuple[str, ...] | None = None, **changed: Any) -> Replay:
        settings = params | changed
        weights = {}
        if settings["spaces"] != "teacher":
            weights["kd.teacher_to_student.weight"] = golden["t2s_weight"]
        if settings["spaces"] != "student" and settings["student_to_teacher"] == "trained":
            weights["kd.student_to_teacher.weight"] = golden["s2t_weight"]
        return replay(
            {"ce": (CrossEntropy, {}, cross_entropy), "kd": (DSKDv2, settings, kd)},
            student,
            teacher,
            weights=weights,
            same_tokens=not exact_tokens,
            only=only,
            chunk_bytes=CHUNK_BYTES,
            **aligned,
        )

    rate = given["kd_rate"]
    total = run(rate, 1 - rate)
    if "loss_denom" in golden and float(golden["loss_denom"].item()) != total.tokens:
        raise NotUnderstood("loss_denom: is that of a larger batch than the file's")
    everything = run(1.0, spaces="both")
    terms = {term: everything.terms[f"kd/{term}"] for term in TERMS}
    kept = [term for term in TERMS if f"kd/{term}" in total.terms]
    values = {f"{term}_loss": value for term, value in terms.items()}
    values |= {"kd_loss": torch.stack([terms[term] for term in kept]).sum()}
    values |= {"t2s_agreement": everything.watched["kd/t2s_agreement"]}
    if params["start"] == "pseudo_inverse":
        yield Pair(("t2s_weight",), everything.start["kd.teacher_to_student.weight"], golden.tensor("t2s_weight"))
    yield from held(golden, {f"comp_{name}": value for name, value in values.items()})
    yield from held(golden, {f"log_{name}": value for name, value in values.items()})
    as_they_are = {"loss": total.loss.reshape(golden["loss"].shape), "loss_denom": torch.tensor(total.tokens)}
    yield from held(golden, as_they_are | {"log_nll_loss": total.terms["ce/cross_entropy"]})
    names = {"student_hidden": "student_hidden", "student_head": "student_lm_head"}
    names |= {"kd.teacher_to_student.weight": "t2s_w", "kd.student_to_teacher.weight": "s2t_w"}
    if not any(key.endswith("s2t_w") for key in golden.arrays):  # no weight that the authors train
        del names["kd.student_to_teacher.weight"]
    gradients = {names[name]: gradient for name, gradient in total.gradients.items() if name in names}
    yield from held(golden, {f"grad_total_{name}": gradient for name, gradient in gradients.items()})
    for component, of in {"kd": tuple(kept), **{term: (term,) for term in TERMS}}.items():
        prefix = f"grad_{component}_loss__"
        if any(key.startswith(prefix) for key in golden.arrays):
            found_here = run(1.0, only=tuple(f"kd/{term}" for term in of), spaces="both")
            zeros = {name: torch.zeros_like(value) for name, value in everything.gradients.items()}
            ours_here = {names[name]: value for name, value in (zeros | found_here.gradients).items() if name in names}
            yield from component_gradients(golden, prefix, ours_here)


def lexicon_of(vocabulary: list[str]) -> Vocabulary:
    return Vocabulary([piece.replace("Ġ", " ").replace("▁", " ") for piece in vocabulary], frozenset({0}), 0)


def exact_pairs(golden: Golden, b: int, ours: list[str], theirs: list[str]) -> list[tuple[int, int]]:
    """What the aligner for tokens of the same text finds: (student token, teacher token) of one response."""
    sides = []
    for model, vocabulary in (("student", ours), ("teacher", theirs)):
        labels = golden[f"{model}_label"][b]
        sides.append(tokens_of([vocabulary[i] if i else "" for i in labels[labels != -100]]))
    return list(ByBytes(NoParams()).align(*sides).pairs)


def tokens_of(pieces: list[str]) -> Tokens:
    words = [piece.replace("Ġ", " ").replace("▁", " ") for piece in pieces]
    ends = np.cumsum([len(word) for word in words]).tolist()
    return Tokens(range(len(words)), [0, *ends[:-1]], ends, "".join(words))


def first_rows(labels: np.ndarray) -> list[int]:
    """How many rows come before each sequence's."""
    return [0, *np.cumsum((labels != -100).sum(1)).tolist()]


def looked_up(ours: list[str], theirs: list[str]) -> list[int]:
    """By the strings of both vocabularies, and the ends."""
    return [0, *(ours.index(piece) if piece in ours else -1 for piece in theirs[1:])]


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    "songmzhang/DSKDv2: DualSpaceKDV2.forward": partial(dskd_v2, exact_tokens=False),
    "songmzhang/DSKDv2: DualSpaceKDV2.compute_dual_space_kd_loss": partial(dskd_v2, exact_tokens=False),
    "songmzhang/DSKDv2: DualSpaceKDV2WithETA.forward": partial(dskd_v2, exact_tokens=True),
    "songmzhang/DSKDv2: DualSpaceKDV2WithETA.compute_dual_space_kd_loss_with_eta": partial(dskd_v2, exact_tokens=True),
}
