"""Runs whose student learns through adapters: what they leave says what they scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_every_recipe import METHODS, RECIPES, SHORTER, on_ranks
from test_ranks_and_accumulation import metrics, run
from transformers import AutoModelForCausalLM

from kdzoo.adapters import add_lora, save_adapter
from kdzoo.models.source import resolve_model
from kdzoo.plugin.registry import load_plugins
from kdzoo.recipe.model import Lora, ModelSource

pytestmark = pytest.mark.slow

LORA = ("student.lora.rank=4", "student.lora.alpha=16")
LORA += ("teacher.lora.rank=8", "teacher.lora.alpha=64", "stages.teacher.lr=0.01", "stages.teacher.steps=20")
"""Few weights and few steps: a teacher that knows nothing is refused."""


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Two runs that differ in what they leave."""
    folder = tmp_path_factory.mktemp("runs")
    for export in ("merged", "adapter"):
        done = run(folder / export, cache, "--ranks", "1", *sets(*LORA, f"student.lora.export={export}"))
        assert done.returncode == 0, done.stderr
        assert "arning" not in done.stderr, done.stderr
    return folder


def test_a_run_trains_the_adapters_alone_and_its_export_scores_the_same_either_way(runs: Path) -> None:
    losses = [step["loss"] for step in metrics(runs / "merged")]
    assert losses[-1] < losses[0]
    assert losses == pytest.approx([step["loss"] for step in metrics(runs / "adapter")], rel=1e-6)
    merged, adapter = (json.loads((runs / name / "scores.json").read_text()) for name in ("merged", "adapter"))
    for rows in ("seen", "held out"):
        for model in ("student", "student, data alone"):
            ours, theirs = merged[rows][model], adapter[rows][model]
            assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-5)
            assert ours["rouge_l"] == theirs["rouge_l"]
        assert merged[rows]["student"]["cross_entropy"] != merged[rows]["student, data alone"]["cross_entropy"]
    answers = [
        (runs / name / "predictions" / "seen.student.greedy.jsonl").read_text() for name in ("merged", "adapter")
    ]
    assert answers[0] == answers[1]


def test_the_exports_load_as_their_libraries_say_and_as_a_model_of_a_recipe(
    runs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    from kdzoo.quiet import quiet

    monkeypatch.setenv("KDZOO_CACHE", str(cache))
    files = {path.name for path in (runs / "adapter" / "student").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not {"config.json", "model.safetensors"} & files
    with quiet():
        merged = AutoModelForCausalLM.from_pretrained(runs / "merged" / "student").eval()
        beside = AutoPeftModelForCausalLM.from_pretrained(runs / "adapter" / "student").eval()
    source = ModelSource(name=str(runs / "adapter" / "student"))
    again = resolve_model(source, "student", teacher_folder=None, anatomies=load_plugins().anatomies, address="student")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = merged(ids).logits
        torch.testing.assert_close(beside(ids).logits, expected, rtol=1e-5, atol=1e-5)
        reopened = AutoModelForCausalLM.from_pretrained(again.folder).eval()
        torch.testing.assert_close(reopened(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_card_says_what_was_trained_and_how_to_load_it(runs: Path) -> None:
    merged, adapter = ((runs / name / "student" / "README.md").read_text() for name in ("merged", "adapter"))
    line = "- Trained: LoRA, rank 4, alpha 16, dropout 0, on all linear modules; "
    assert line + "merged into the weights\n" in merged
    assert line + "this folder holds nothing else\n" in adapter
    assert "AutoPeftModelForCausalLM.from_pretrained" in adapter
    assert "AutoModelForCausalLM.from_pretrained" in merged


def test_a_teacher_scores_the_same_with_its_adapter_merged_or_beside(tmp_path: Path, runs: Path, cache: Path) -> None:
    teacher = next(cache.glob("teacher/*/config.json")).parent
    model = add_lora(
        AutoModelForCausalLM.from_pretrained(teacher), load_plugins().anatomies["mixtral"], Lora(rank=2), 3, "teacher"
    )
    torch.manual_seed(4)
    state = {name: torch.randn(p.shape) * 0.25 for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(tmp_path / "adapter", teacher, str(teacher), Lora(rank=2), state)
    told = {}
    for merge in ("true", "false", "none"):
        adapter = "null" if merge == "none" else f'{{"name": "{tmp_path / "adapter"}", "merge": {merge}}}'
        flags = ("teacher.config=null", f"teacher.name={teacher}", "stages.teacher=null", "stages.sft=null")
        flags += ("stages.distill.steps=3", f"teacher.adapter={adapter}")
        flags += () if merge == "true" else ("evaluation.sets=null",)
        done = run(tmp_path / merge, cache, *sets(*flags))
        assert done.returncode == 0, done.stderr
        entropy = json.loads((tmp_path / merge / "scores.json").read_text())["train"]["teacher"]["cross_entropy"]
        told[merge] = [entropy, *(step["loss"] for step in metrics(tmp_path / merge))]
    assert told["true"] == pytest.approx(told["false"], rel=1e-5)
    assert told["true"] != pytest.approx(told["none"], rel=1e-4)


def run_all(names: list[str], pair: str, out: Path) -> list[str]:
    """The recipes one after the other in this process group."""
    from kdzoo.recipe.load import load_recipe
    from kdzoo.run.recipe_run import run_recipe

    for name in names:
        sets = (*SHORTER, "student.lora.rank=4", "data.held_out=null")
        run_recipe(load_recipe(RECIPES / f"{name}.json", [RECIPES / "pairs" / f"{pair}.json"], sets), out / name)
    return names


@pytest.mark.sweep
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_method_trains_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "cache"))
    names = [path.stem for path in METHODS if path.parent == RECIPES]
    pair = "lab_llama_to_llama"
    assert on_ranks(ranks, tmp_path / "ranks", run_all, names, pair, tmp_path) == [names] * ranks
    for name in names:
        steps = metrics(tmp_path / name)
        assert len(steps) == 2
        assert all(value == value for step in steps for value in step.values()), f"{name}: not a number"
        assert steps[-1]["gradient_norm"] > 0
