"""However an optimizer step is split over ranks and accumulation, the run is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TINY = Path(__file__).parent / "tiny.json"


def run(out: Path, cache: Path, *flags: str, recipe: Path = TINY) -> subprocess.CompletedProcess[str]:
    """`kdzoo run`, as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "kdzoo", "run", str(recipe), "--out", str(out), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"KDZOO_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_and_accumulation_give_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    # 20 rows in batches of 8: the third step of an epoch has 4 rows, so that with two ranks one of them has none.
    splits = {
        "one": ("--ranks", "1"),
        "two ranks": ("--ranks", "2"),
        "accumulation 4": ("--ranks", "1", "--set", "stages.distill.micro_batch=2"),
        "stage 0": ("--set", "deepspeed.zero_optimization.stage=0"),
        "stage 2 on two ranks": ("--ranks", "2", "--set", "deepspeed.zero_optimization.stage=2"),
        "offload": ("--set", 'deepspeed.zero_optimization.offload_optimizer={"device": "cpu"}'),
    }
    for name, flags in splits.items():
        done = run(tmp_path / name, tmp_path / "cache", *flags, "--set", "evaluation.sets=null")
        assert done.returncode == 0, done.stderr
    expected = metrics(tmp_path / "one")
    weights = load_file(tmp_path / "one" / "student" / "model.safetensors")
    assert len(expected) == 20
    assert expected[-1]["loss"] < 0.95 * expected[0]["loss"], "the loss must have moved for the comparison to mean much"
    for name in splits:
        found = metrics(tmp_path / name)
        for ours, theirs in zip(expected, found, strict=True):
            for key in ("loss", "sft/cross_entropy", "dskd/t2s_kd", "residual/wrong_rows", "gradient_norm"):
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4), f"{name}: {key} at step {ours['step']}"
        for key in ("sft/gradient_at_state", "dskd/gradient_at_state", "residual/gradient_at_state"):
            assert found[0][key] == pytest.approx(expected[0][key], rel=1e-4), f"{name}: {key}"
            assert key not in found[1]
        for key, weight in load_file(tmp_path / name / "student" / "model.safetensors").items():
            torch.testing.assert_close(weight, weights[key], rtol=1e-3, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.slow
def test_bf16_trains_on_two_ranks_close_to_fp32(tmp_path: Path) -> None:
    for name, flags in {"fp32": (), "bf16": ("--set", "precision=bf16", "--ranks", "2")}.items():
        done = run(tmp_path / name, tmp_path / "cache", *flags, "--set", "evaluation.sets=null")
        assert done.returncode == 0, done.stderr
    full, half = metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16")
    for ours, theirs in zip(full, half, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.05)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    for name, flags in {"plain": (), "again": ("--set", "student.gradient_checkpointing=true")}.items():
        done = run(tmp_path / name, tmp_path / "cache", *flags, "--set", "evaluation.sets=null")
        assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "again"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
