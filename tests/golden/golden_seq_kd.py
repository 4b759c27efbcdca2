"""Sequence-level distillation: cross-entropy on the teacher's answers, divided by sequences."""

from __future__ import annotations

from collections.abc import Iterator

from golden_files import CHUNK_BYTES, INDEPENDENT, Golden, Pair, configuration, held

from kdzoo.testing import Recorded, replay
from kdzoo_seq_kd import SeqKD


def seq_kd(golden: Golden) -> Iterator[Pair]:
    params = configuration(golden, known={"reduction"})
    student = golden.tensor("student_logits")
    recorded = Recorded(golden.tensor("label"), logits=student)
    found = replay({"seq_kd": (SeqKD, params, 1.0)}, recorded, None, same_tokens=True, chunk_bytes=CHUNK_BYTES)
    gradient = found.gradients["student_hidden"].reshape(student.shape)
    yield from held(golden, {"loss": found.loss, "grad_student_logits": gradient})


COVERED = {f"{INDEPENDENT}: seq_kd": seq_kd}
