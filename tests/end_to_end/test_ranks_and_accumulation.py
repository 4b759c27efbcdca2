"""However an optimizer step is split over ranks and accumulation, the run is the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from running import TINY, Run, run, run_on_two_ranks, sets
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# 20 rows in batches of 8: the third step of an epoch has 4 rows, so that with two ranks one of them has none.
SPLITS = {
    "accumulation 4": ("stages.distill.micro_batch=2",),
    "stage 0": ("deepspeed.zero_optimization.stage=0",),
    "offload": ('deepspeed.zero_optimization.offload_optimizer={"device": "cpu"}',),
}
"""On one rank."""
THREE_SETS = (
    'evaluation.sets={"seen": {"limit": 4}, "longer": {"lab": "eval_longer", "limit": 4}, '
    '"phrasing": {"lab": "eval_phrasing", "limit": 4}}'
)
TWO_RANKS = {"stage 2": ("deepspeed.zero_optimization.stage=2",), "bf16": ("precision=bf16",)}


def assert_the_same(found: Run, first: Run) -> None:
    """Losses, terms, gradients and weights."""
    steps = first.lines()
    assert len(steps) == 20
    assert steps[-1]["loss"] < 0.95 * steps[0]["loss"], "the loss must have moved for the comparison to mean much"
    for ours, theirs in zip(steps, found.lines(), strict=True):
        for key in ("loss", "sft/cross_entropy", "dskd/t2s_kd", "residual/wrong_rows", "gradient_norm"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4), f"{key} at step {ours['step']}"
    for key in ("sft/gradient_at_state", "dskd/gradient_at_state", "residual/gradient_at_state"):
        assert found.lines()[0][key] == pytest.approx(steps[0][key], rel=1e-4), key
        assert key not in found.lines()[1]
    weights = load_file(first.folder / "student" / "model.safetensors")
    for key, weight in load_file(found.folder / "student" / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[key], rtol=1e-3, atol=2e-5, msg=key)


def without_scores(settings: Sequence[str]) -> list[str]:
    return sets(*settings, "evaluation.sets=null")


@pytest.mark.parametrize("split", SPLITS)
def test_accumulation_and_stages_give_the_losses_and_weights_of_one_batch(
    first: Run, warm_cache: Path, tmp_path: Path, split: str
) -> None:
    assert_the_same(run(tmp_path / "run", *without_scores(SPLITS[split])), first)


def test_ranks_that_a_launcher_started_are_joined_and_give_the_losses_and_weights_of_one(
    first: Run, warm_cache: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "kdzoo", "run", str(TINY), "--out", str(tmp_path / "run"), *without_scores(())]
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run folder:") == 1
    found = Run(tmp_path / "run")
    assert found.read("environment.json")["ranks"] == 2
    assert_the_same(found, first)


@pytest.fixture(scope="module")
def two_ranks(first: Run, warm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("two-ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDZOO_CACHE", str(warm))
        commands = {folder / name: [str(TINY), *without_scores(flags)] for name, flags in TWO_RANKS.items()}
        commands[folder / "three sets"] = [str(TINY), *sets("stages.distill.steps=1", THREE_SETS)]
        return run_on_two_ranks(folder, commands)


def test_gradients_that_are_sharded_alone_give_the_losses_and_weights_of_one(
    first: Run, two_ranks: dict[str, Run]
) -> None:
    assert two_ranks["stage 2"].read("environment.json")["ranks"] == 2
    assert_the_same(two_ranks["stage 2"], first)


def test_a_sharded_model_generates_and_is_read_set_after_set(two_ranks: dict[str, Run]) -> None:
    """ZeRO-3 remembers the order of its passes, which generation changes."""
    scores = two_ranks["three sets"].read("scores.json")
    for name in ("seen", "longer", "phrasing"):
        assert scores[name]["student"]["cross_entropy"] > 0


def test_bf16_trains_on_two_ranks_close_to_fp32(first: Run, two_ranks: dict[str, Run]) -> None:
    for ours, theirs in zip(first.lines(), two_ranks["bf16"].lines(), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.05)


def test_gradient_checkpointing_changes_no_number(first: Run, warm_cache: Path, tmp_path: Path) -> None:
    again = run(tmp_path / "again", *without_scores(["student.gradient_checkpointing=true"]))
    for ours, theirs in zip(first.lines(), again.lines(), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
