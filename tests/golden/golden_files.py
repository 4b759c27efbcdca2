"""How a golden file is replayed: which plugin computes its source function, what is fed and what is compared.

A golden file holds inputs and outputs of an authors' function (or of an independent float64 computation), and
in `meta_json` the source, the function and its configuration. Formulas are covered, not files: any
configuration of a covered function is replayed, and one that cannot be understood fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdzoo import Experts, Fusion
from kdzoo.testing import Recorded, Replay, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL
from kdzoo_dskd import DSKD
from kdzoo_fusions import ExpertAttention, ExpertMean, ExpertRouterAll, RouterWeighted, attention
from kdzoo_residual import Projectors, Residual

_listed = json.loads((Path(__file__).parent / "not_covered.json").read_text())
NOT_COVERED: dict[str, str] = _listed["functions"]
"""Source function -> why no plugin computes it yet."""
NOT_COVERED_SETTINGS: dict[str, dict[str, dict[str, str]]] = _listed["settings"]
"""Covered source function -> configuration key -> value -> why no plugin has this documented setting yet."""

INDEPENDENT = "independent float64 reference"

CHUNK_BYTES = 400  # a few rows: a replay walks over several chunks


class NotUnderstood(Exception):
    """A golden file that cannot be replayed; says why."""


@dataclass(frozen=True)
class Golden:
    """One file, and which of its entries were asked for."""

    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Golden:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return cls(arrays, json.loads(str(arrays.pop("meta_json"))))

    @property
    def function(self) -> str:
        """`repository: function`: without commit, and of functions that were chained the outermost."""
        source = re.split(r"[@,]", self.meta["source"])[0].strip()
        name = re.split(r" / | \+ |[(;,]", self.meta["function"])[0].strip()
        return f"{source}: {name}"

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise NotUnderstood(f"the array '{name}' is missing")
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        return torch.as_tensor(self[name])


@dataclass(frozen=True)
class Pair:
    """Our value, and the file's, which is made of the entries `keys`."""

    keys: tuple[str, ...]
    ours: Tensor
    theirs: Tensor


def held(golden: Golden, ours: Mapping[str, Tensor]) -> Iterator[Pair]:
    """Our values under the file's keys, as far as it holds them."""
    for key, value in ours.items():
        if key in golden:
            yield Pair((key,), value, golden.tensor(key))


def check(path: Path) -> None:
    """Replay one file and compare; skips what stands in the list, fails where nothing covers it."""
    golden = Golden.read(path)
    if golden.function in NOT_COVERED:
        pytest.skip(f"{golden.function}: {NOT_COVERED[golden.function]}")
    if golden.function not in COVERED:
        pytest.fail(f"{golden.function}: no plugin covers it and not_covered.json does not name it")
    compared = list(COVERED[golden.function](golden))
    assert compared, "the file holds no output that is known"
    independent = golden.meta["source"].startswith(INDEPENDENT)
    for found in compared:
        what, ours, theirs = " + ".join(found.keys), found.ours.double(), found.theirs.double()
        relative = 1e-9 if independent else 2e-4 if what.startswith("grad_") else 2e-5
        noise = 1e-12 if independent else 1e-6  # the authors round to float32: their zeros are not quite zero
        assert ours.shape == theirs.shape, f"{what}: ours is {list(ours.shape)}, theirs {list(theirs.shape)}"
        error, size = (ours - theirs).abs().max(), theirs.abs().max()
        assert error <= relative * size + noise, f"{what}: off by {error:.2e}, where values reach {size:.2e}"
    outputs = {key for key in golden.arrays if re.fullmatch(r"loss|(?!max_).*_sum|grad_.*", key)}
    left = sorted(outputs.difference(*(found.keys for found in compared)))
    assert not left, f"outputs that nothing is compared with: {', '.join(left)}"


def configuration(golden: Golden, *, known: set[str]) -> dict[str, Any]:
    """The file's configuration, inline or under "configuration"; a key that is not `known` fails.

    Skips a setting that is listed as not covered.
    """
    about = {"source", "file", "function", "norm", "normalisation", "note", "notes", "label_convention"}
    given = golden.meta.get("configuration")
    found = dict(given) if given is not None else {k: v for k, v in golden.meta.items() if k not in about}
    for key, values in NOT_COVERED_SETTINGS.get(golden.function, {}).items():
        if isinstance(found.get(key), str) and found[key] in values:
            pytest.skip(f"{golden.function}, {key} '{found[key]}': {values[found[key]]}")
    if unknown := sorted(found.keys() - known):
        raise NotUnderstood(f"configuration keys {unknown}: nothing here knows what they mean")
    return found


# Divergences between logits, and dual-space distillation (songmzhang/DSKD).

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


def forward_kl(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"use_tea_temp", *SHARED_KEYS})
    params = {"temperature": given["kd_temperature"]}
    if given.get("use_tea_temp"):
        params["teacher_temperature"] = given["teacher_temperature"]
    found = replay(
        {"kd": (ForwardKL, params, 1.0)},
        Recorded(golden["label"], logits=golden["student_logits"]),
        Recorded(golden["label"], logits=golden["teacher_logits"]),
        same_tokens=True,
        chunk_bytes=CHUNK_BYTES,
    )
    yield from held(
        golden,
        {
            "loss_sum": found.loss * found.rows,
            "n_tokens": torch.tensor(found.rows),
            "grad_student_logits": found.gradients["student_hidden"] * found.rows,
        },
    )


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
    params |= {"divergence": DIVERGENCES[given["kd_objective"]], "std": "batch"}

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
    rows = total.rows
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


# Residual learning and its fusion of experts (independent references of the formulas; the authors published no code).


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
    params = configuration(golden, known={"lambda", *settings})
    weight = params.pop("lambda")
    if params.get("attend") == "sequence" and not golden.arrays.get("teacher_attention_mask", np.ones(1)).all():
        raise NotUnderstood("attend: a recorded side has no padding, all its positions are attended to")
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
            artefacts={"projectors": {"teacher_to_low.weight": golden["p_ta"]}},
            same_tokens=same,
            chunk_bytes=CHUNK_BYTES,
        )

    names = {"student_hidden": "student_hidden", "student_head": "student_lm_head"}
    names["residual.low_to_student.weight"] = "p_as"
    if not same:
        names["residual.student_to_low.weight"] = "p_sa"
    alone = run(1.0, 0.0)
    rows = alone.rows
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
    yield Pair(("wrong",), ~alone.facts["residual"]["teacher.correct"], golden.tensor("wrong")[scored])
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
    "songmzhang/DSKD: VariousDivergence.compute_forward_kl_divergence": forward_kl,
    "songmzhang/DSKD: DualSpaceKD.forward": partial(dskd, attention=False),
    "songmzhang/DSKD: DualSpaceKDWithCMA.forward": partial(dskd, attention=True),
    f"{INDEPENDENT}: stage 1": residual_stage_1,
    f"{INDEPENDENT}: stage 2": residual_stage_2,
    f"{INDEPENDENT}: expert fusion": expert_fusion,
}
"""Source function -> how it is replayed."""
