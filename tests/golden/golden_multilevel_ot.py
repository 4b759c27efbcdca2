"""Multi-level optimal transport (2018cx/Multi-Level-OT), each release with the settings that reproduce it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from golden_files import CHUNK_BYTES, Golden, NotUnderstood, Pair, configuration, held

from kdzoo.testing import Recorded, Replay, replay
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_multilevel_ot import MultiLevelOT

BETA = 0.1  # of both further terms

INERT = 1e4
"""The gradients of the two further terms are so small that the tolerance for zeros would let anything pass."""


def multilevel_ot(golden: Golden) -> Iterator[Pair]:
    ours = {"student_temperature", "teacher_temperature", "skip_student_eos", "skip_teacher_eos"}
    given = configuration(golden, known={"f", "distillation_weight", "crossentropy_weight", *ours})
    release = "2018cx@" + golden.meta["source"].partition("@")[2][:7]
    if release not in MultiLevelOT.Params.presets:
        raise NotUnderstood(f"'{release}': known are {', '.join(MultiLevelOT.Params.presets)}")
    if given["f"] != 1:
        raise NotUnderstood(f"f {given['f']}: no such matching here")
    params = {"preset": release} | {key: value for key, value in given.items() if key in ours}

    def run(cross_entropy: float, kd: float, only: tuple[str, ...] | None = None) -> Replay:
        return replay(
            {"ce": (CrossEntropy, {}, cross_entropy), "kd": (MultiLevelOT, params, kd)},
            Recorded(golden["student_labels"], "unshifted", logits=golden["student_logits"]),
            Recorded(golden["teacher_labels"], "unshifted", logits=golden["teacher_logits"]),
            same_tokens=False,
            only=only,
            chunk_bytes=CHUNK_BYTES,
        )

    weight = given.get("crossentropy_weight", 1.0)
    distil, total = (run(ce, given["distillation_weight"]) for ce in (0.0, weight))
    yield from held(
        golden,
        {
            "ce_loss": weight * total.terms["ce/cross_entropy"],
            "distil_loss": distil.loss,
            "total_loss": total.loss,
            "had_component": distil.terms["kd/had"],
            "kl_component": distil.terms["kd/sl"] / BETA,
            "sinkhorn_component": distil.terms["kd/sd"] / BETA,
            "grad_distil_student_logits": distil.gradients["student_hidden"],
            "grad_total_student_logits": total.gradients["student_hidden"],
        },
    )
    for component, term in {"kl_component": "kd/sl", "sinkhorn_component": "kd/sd"}.items():
        gradient = run(0.0, 1 / BETA, only=(term,)).gradients["student_hidden"]
        key = f"grad_{component}_student_logits"
        if key in golden:
            yield Pair((key,), INERT * gradient, INERT * golden.tensor(key))


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    "2018cx/Multi-Level-OT: DistillationLoss.forward": multilevel_ot,
}
