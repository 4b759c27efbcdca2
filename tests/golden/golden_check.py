"""Replay one golden file and compare. Every method has a module `golden_<method>.py` that says what it covers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import golden_alm
import golden_between_blocks
import golden_divergences
import golden_dskd
import golden_dskd_v2
import golden_min_ed
import golden_multilevel_ot
import golden_newer_divergences
import golden_ranking
import golden_residual
import golden_seq_kd
import golden_simple_ctkd
import golden_token_weights
import golden_uld
import pytest
from golden_files import INDEPENDENT, NOT_COVERED, Golden, Pair

COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    **golden_alm.COVERED,
    **golden_between_blocks.COVERED,
    **golden_divergences.COVERED,
    **golden_dskd.COVERED,
    **golden_dskd_v2.COVERED,
    **golden_min_ed.COVERED,
    **golden_multilevel_ot.COVERED,
    **golden_newer_divergences.COVERED,
    **golden_ranking.COVERED,
    **golden_residual.COVERED,
    **golden_simple_ctkd.COVERED,
    **golden_seq_kd.COVERED,
    **golden_token_weights.COVERED,
    **golden_uld.COVERED,
}
"""Source function -> our values beside the file's."""


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
        allowed = relative * size + noise + found.noise
        assert error <= allowed, f"{what}: off by {error:.2e}, where values reach {size:.2e}"
    outputs = {key for key in golden.arrays if re.fullmatch(r"loss|(?!max_).*_sum|grad_.*", key)}
    left = sorted(outputs.difference(*(found.keys for found in compared)))
    assert not left, f"outputs that nothing is compared with: {', '.join(left)}"
