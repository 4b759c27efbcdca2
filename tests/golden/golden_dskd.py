"""Dual-space distillation (songmzhang/DSKD)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from golden_files import CHUNK_BYTES, Golden, NotUnderstood, Pair, configuration, held
from torch import Tensor

from kdzoo.testing import Recorded, Replay, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_dskd import DSKD

DIVERGENCES = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "adaptive_kl": "adaptive_kl",
    "skewed_forward_kl": "skew_forward_kl",
    "skewed_reverse_kl": "skew_reverse_kl",
    "js_divergence": "js",
}
"""Their `kd_objective` -> our name. Their js takes log(prob + 1e-9), which is far below the tolerance."""

SHARED_KEYS = {"kd_temperature", "teacher_temperature", "skew_lambda", "adaptive_kl_alpha"}
"""Of the authors' one set of arguments: every function is given all and reads some."""


DSKD_WEIGHTS = {
    "kd.teacher_to_student.weight": "t2s_w",
    "kd.teacher_to_student.bias": "t2s_b",
    "kd.student_to_teacher.weight": "s2t_w",
    "kd.student_to_teacher.bias": "s2t_b",
    "kd.query.weight": "query_w",
    "kd.query.bias": "query_b",
}
DSKD_TERMS = ("t2s_ce", "t2s_kd", "s2t_kd")


def dskd(golden: Golden, *, attention: bool) -> Iterator[Pair]:
    where_embeddings_stand = {"student_embed", "teacher_embed"}
    given = configuration(golden, known={"kd_objective", "kd_rate", *where_embeddings_stand, *SHARED_KEYS})
    if given["kd_objective"] not in DIVERGENCES:
        raise NotUnderstood(f"kd_objective '{given['kd_objective']}': no such divergence here")
    renamed = {
        "kd_temperature": "temperature",
        "teacher_temperature": "teacher_temperature",
        "skew_lambda": "skew",
        "adaptive_kl_alpha": "head_mass",
    }
    params = {ours: given[theirs] for theirs, ours in renamed.items() if theirs in given}
    params |= {"divergence": DIVERGENCES[given["kd_objective"]], "preset": "dskd@077337a"}

    def side(model: str) -> Recorded:
        prefix = f"{model}_" if attention else ""
        return Recorded(
            golden[f"{prefix}label"],
            hidden=golden[f"{model}_hidden"],
            head=golden[f"{model}_lm_head"],
            input_ids=golden[f"{prefix}input_ids"],
            embed=golden[f"{model}_embed"] if attention else None,
        )

    weights = {
        ours: golden[theirs.replace("_w", "_weight").replace("_b", "_bias")]
        for ours, theirs in DSKD_WEIGHTS.items()
        if attention or not theirs.startswith("query")
    }

    def run(kd: float, cross_entropy: float = 0.0, only: tuple[str, ...] | None = None) -> Replay:
        losses = {"ce": (CrossEntropy, {}, cross_entropy), "kd": (DSKD, params, kd)}
        return replay(
            losses,
            side("student"),
            side("teacher"),
            weights=weights,
            same_tokens=not attention,
            only=only,
            chunk_bytes=CHUNK_BYTES,
        )

    rate = given["kd_rate"]
    total = run(rate, 1 - rate)
    rows = total.tokens
    sums = {term: total.terms[f"kd/{term}"] * rows for term in DSKD_TERMS}
    yield from held(
        golden,
        {
            "loss": total.loss,
            "batch_denom": torch.tensor(rows),
            "log_nll_loss": total.terms["ce/cross_entropy"],
            "kd_sum": torch.stack([*sums.values()]).sum(),
            "t2s_acc_count": total.watched["kd/t2s_accuracy"] * rows,
            **{f"{term}_sum": value for term, value in sums.items()},
        },
    )
    names = {"student_hidden": "student_hidden", "student_head": "student_lm_head"}
    names |= {ours: theirs for ours, theirs in DSKD_WEIGHTS.items() if ours in weights}
    yield from held(golden, {f"grad_total_{theirs}": total.gradients[ours] for ours, theirs in names.items()})
    for component, terms in {"kd": DSKD_TERMS, **{term: (term,) for term in DSKD_TERMS}}.items():
        found = run(1.0, only=tuple(f"kd/{term}" for term in terms))
        zeros = {ours: torch.zeros_like(total.gradients[ours]) for ours in names}
        ours = {names[name]: g * rows for name, g in (zeros | found.gradients).items()}
        yield from component_gradients(golden, f"grad_{component}_loss__", ours)


def component_gradients(golden: Golden, prefix: str, ours: Mapping[str, Tensor]) -> Iterator[Pair]:
    """Gradients of one component; the file takes student logits and hidden states as leaves of their own.

    Ours flow on from the logits into states and head, so the file's are brought there too. A tensor that the
    file has no gradient of must get none.
    """
    hidden, head = golden.tensor("student_hidden"), golden.tensor("student_lm_head")
    logits = golden.arrays.get(f"{prefix}student_logits")
    through = {}
    if logits is not None:
        through["student_hidden"] = torch.as_tensor(logits) @ head
        through["student_lm_head"] = torch.as_tensor(logits).flatten(0, 1).T @ hidden.flatten(0, 1)
    for tensor, gradient in ours.items():
        expected = through.get(tensor, torch.zeros_like(gradient))
        keys = [f"{prefix}student_logits"] if tensor in through else []
        if prefix + tensor in golden:
            expected = expected + golden.tensor(prefix + tensor)
            keys.append(prefix + tensor)
        yield Pair(tuple(keys) or (f"{prefix}{tensor} (absent)",), gradient, expected)


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    "songmzhang/DSKD: DualSpaceKD.forward": partial(dskd, attention=False),
    "songmzhang/DSKD: DualSpaceKDWithCMA.forward": partial(dskd, attention=True),
}
