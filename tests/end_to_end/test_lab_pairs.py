"""The committed default recipe on every pair of the lab, shortened to a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_ranks_and_accumulation import metrics, run

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = (
    "stages.teacher.steps=6",
    "stages.teacher.warmup=0",
    "stages.teacher.data.limit=200",
    "stages.sft.steps=2",
    "stages.sft.warmup=0",
    "stages.projectors.epochs=null",
    "stages.projectors.steps=2",
    "stages.distill.steps=3",
    "stages.distill.warmup=0",
    "data.train.limit=100",
    "data.held_out.limit=16",
    "evaluation.sets.seen.limit=4",
    "evaluation.sets.longer=null",
    "evaluation.sets.phrasing=null",
    "evaluation.max_new_tokens=8",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "ranks"), [("lab_mixtral_to_gpt2", "1"), ("lab_mixtral_to_llama", "2"), ("lab_llama_to_llama", "1")]
)
def test_dskd_plus_residual_trains_on_the_lab_pair(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, pair: str, ranks: str
) -> None:
    recipe = RECIPES / "dskd_plus_residual.json"
    flags = [flag for short in SHORT for flag in ("--set", short)]
    cache = tmp_path_factory.getbasetemp() / "lab-cache"
    done = run(
        tmp_path / "run",
        cache,
        "--on",
        str(RECIPES / "pairs" / f"{pair}.json"),
        "--ranks",
        ranks,
        *flags,
        recipe=recipe,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    steps = metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert {"loss", "sft/cross_entropy", "dskd/t2s_ce", "dskd/t2s_kd", "dskd/s2t_kd", "residual/wrong_share"} <= steps[
        0
    ].keys()
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert set(scores["seen"]) == {
        "copy of the input",
        "teacher",
        "untrained student",
        "student, data alone",
        "student",
    }


@pytest.mark.slow
def test_heads_that_are_padded_differently_are_compared_on_what_their_tokenizer_has(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flags = [flag for short in SHORT for flag in ("--set", short)]
    cache = tmp_path_factory.getbasetemp() / "lab-cache"
    padded = ("--set", "student.config.vocab_size=3000")
    done = run(tmp_path / "run", cache, "--ranks", "2", *padded, *flags, recipe=RECIPES / "forward_kl.json")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "their heads are padded" in line]
    assert len(said) == 1
    assert "the student's to 3,000 entries" in said[0] and "of the tokenizer are compared" in said[0]
    assert len(metrics(tmp_path / "run")) == 3
