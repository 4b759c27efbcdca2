"""Approximate likelihood matching (bminixhofer/tokenkit): its losses, its notebook and its alignments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from golden_files import CHUNK_BYTES, Golden, NotUnderstood, Pair, configuration, held
from torch import Tensor

from kdzoo import Aligner, NoParams, Tokens, Vocabulary
from kdzoo.testing import Recorded, replay
from kdzoo_aligners import ByBytes, ByWords
from kdzoo_alm import Alm


def scored(golden: Golden, model: str, chunks: Tensor, mask: Tensor, lexicon: Vocabulary | None = None) -> Recorded:
    """Their chunks are of tokens [B, T, C], ours of the positions before them; the first token has none."""
    before = torch.cat([chunks[:, 1:], torch.zeros_like(chunks[:, :1])], dim=1)
    ids = golden.tensor(f"{model}_input_ids")
    return Recorded(
        torch.where(mask.bool(), ids, -100),
        convention="unshifted",
        logits=golden[f"{model}_logits"],
        input_ids=ids,
        chunks=before,
        vocabulary=lexicon,
    )


def notebook(golden: Golden) -> Iterator[Pair]:
    count = str(len(golden["student_input_ids"]))
    given = configuration(replace(golden, meta={**golden.meta, "sequences": count}), known={"sequences", *NOTEBOOK})
    params = {ours: given[theirs] for theirs, ours in NOTEBOOK.items() if theirs in given}
    found = replay(
        {"alm": (Alm, {**params, "append_boundary": False, "merge_below": None}, 1.0)},
        *(
            scored(
                golden,
                model,
                golden.tensor(f"{model}_tokens_to_chunks"),
                golden.tensor(f"{model}_attention_mask"),
            )
            for model in ("student", "teacher")
        ),
        same_tokens=False,
        chunk_bytes=CHUNK_BYTES,
    )
    yield from held(golden, {"loss": found.loss, "grad_student_logits": found.gradients["student_hidden"]})


NOTEBOOK = {"temp": "temperature", "epsilon": "epsilon"}

PARAMS = {
    "alm_diff_fn": "difference",
    "binarization_temp": "temperature",
    "renyi_alpha": "order",
    "distill_main_path_numerator": "numerator",
    "distill_main_path_denominator": "denominator",
}
MODES = {"none", "append_space", "merge_by_space_prob", "eos_as_space"}


INCIDENTAL = {"epsilon", "teacher_eos_id", "student_eos_id", "jax", "x64"}


def settings(golden: Golden, *, known: set[str]) -> dict[str, Any]:
    """The configuration, which stands under "config"."""
    meta = {key: value for key, value in golden.meta.items() if key not in INCIDENTAL}
    return configuration(replace(golden, meta={**meta, **meta.pop("config", {})}), known=known)


def likelihoods(golden: Golden) -> Iterator[Pair]:
    given = settings(golden, known={"alm_mode", "tokenizer_pair_bias_threshold", "distill_chunk_sizes", *PARAMS})
    mode = set(given["alm_mode"].split("+"))
    if not mode <= MODES or given.get("distill_chunk_sizes", [1]) != [1]:
        raise NotUnderstood(f"alm_mode '{given['alm_mode']}', distill_chunk_sizes {given.get('distill_chunk_sizes')}")
    params = {ours: given[theirs] for theirs, ours in PARAMS.items() if theirs in given}
    params |= {
        "epsilon": golden.meta.get("epsilon", 1e-6),
        "append_boundary": "append_space" in mode,
        "merge_below": given["tokenizer_pair_bias_threshold"] if "merge_by_space_prob" in mode else None,
        "boundary": "end" if "eos_as_space" in mode else "space",
        "preset": "tokenkit@bcacdef",
    }
    factor = 1.0
    if "merge_by_space_prob" in mode:
        joined, doubly = joined_counts(golden, params["merge_below"], "eos_as_space" in mode)
        by_tokens = params.pop("denominator") == "token_count"
        factor = float((joined > 0).sum() / (doubly.sum() if by_tokens else (doubly > 0).sum()))

    def side(model: str) -> Recorded:
        texts = [" a" if space else "a" for space in golden[f"space_mask_{model}"]]
        return scored(
            golden,
            model,
            golden.tensor(f"alignment_{model}"),
            golden.tensor(f"loss_mask_{model}"),
            Vocabulary(texts, frozenset(), golden.meta[f"{model}_eos_id"]),
        )

    found = replay(
        {"alm": (Alm, params, 1.0)}, side("student"), side("teacher"), same_tokens=False, chunk_bytes=CHUNK_BYTES
    )
    yield from held(
        golden,
        {
            "loss": found.loss * factor,
            "grad_student_logits": found.gradients["student_hidden"] * factor,
            "report_t_mean_p": found.watched["alm/teacher_log_likelihood"],
            "report_s_mean_p": found.watched["alm/student_log_likelihood"],
        },
    )


def joined_counts(golden: Golden, threshold: float, by_end: bool) -> tuple[Tensor, Tensor]:
    """Teacher tokens of every joined chunk [B, C]; and of chunks joined twice, which is what the authors divide by."""
    chunks = golden.tensor("alignment_teacher") & golden.tensor("loss_mask_teacher")[..., None]
    p = golden.tensor("teacher_logits").softmax(-1)
    closing = golden.meta["teacher_eos_id"] if by_end else torch.as_tensor(golden["space_mask_teacher"])
    mass = p[..., closing] if by_end else p[..., closing].sum(-1)
    last = chunks & ~torch.cat([chunks[:, 1:], torch.zeros_like(chunks[:, :1])], dim=1)
    ends = mass.gather(1, last.int().argmax(1)) > threshold
    counts = chunks[:, 1:].double().sum(1)
    above = ends.flip(1).cumsum(1).flip(1)
    group = above[:, :1] - above  # an unscored chunk counts here, as it does with them
    joins = torch.nn.functional.one_hot(group, counts.shape[1]) * (counts > 0)[..., None]
    joined = torch.einsum("bc,bcg->bg", counts, joins.double())
    return joined, torch.einsum("bc,bcg->bg", joined, joins.double())


def alignments(golden: Golden) -> Iterator[Pair]:
    """All but their "unbiased" ones."""
    configuration(golden, known={"bias_threshold", "teacher_vocab", "student_vocab", "alignment_indices"})
    for kind, aligner in (("unconstrained", ByBytes(NoParams())), ("space", ByWords(NoParams()))):
        yield from held(golden, aligned(golden, kind, aligner))


def aligned(golden: Golden, kind: str, aligner: Aligner) -> dict[str, Tensor]:
    sides = {model: responses(golden, model) for model in ("student", "teacher")}
    found = {
        f"{kind}_{model}": torch.zeros_like(golden.tensor(f"unconstrained_{model}")) for model in ("student", "teacher")
    }
    for b, (student, teacher) in enumerate(zip(sides["student"], sides["teacher"], strict=True)):
        # The token that begins a text is a chunk of its own, before our responses.
        spans = [(-1, 0, -1, 0), *aligner.align(student, teacher).spans]
        for chunk, (a, z, c, w) in enumerate(spans):
            found[f"{kind}_student"][b, a + 1 : z + 1, chunk] = True
            found[f"{kind}_teacher"][b, c + 1 : w + 1, chunk] = True
    return found


def responses(golden: Golden, model: str) -> Iterator[Tokens]:
    """Every sequence without its first token; the last one is the end."""
    for ids, mask in zip(golden[f"{model}_ids"], golden[f"{model}_attention_mask"], strict=True):
        kept = ids[mask.astype(bool)][1:].tolist()
        texts = [golden.meta[f"{model}_vocab"][token].replace("Ġ", " ") for token in kept[:-1]]
        ends = [len("".join(texts[: i + 1])) for i in range(len(texts))]
        length = len("".join(texts))
        yield Tokens(kept, [0, *ends], [*ends, length], "".join(texts))


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    "bminixhofer/tokenkit: cells 23": notebook,
    "bminixhofer/tokenkit: compute_alm_loss": likelihoods,
    **{
        f"bminixhofer/tokenkit: get_{name}": alignments
        for name in ("alignment_indices", "unconstrained_alignments", "space_alignments")
    },
}
