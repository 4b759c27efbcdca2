"""Runs whose student learns through adapters: what they leave says what they scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running import Run, run, run_on_two_ranks, sets
from test_every_recipe import METHODS, command, trained
from transformers import AutoModelForCausalLM

from kdzoo.lora import add_lora, save_adapter
from kdzoo.models.source import resolve_model
from kdzoo.plugin.registry import load_plugins
from kdzoo.recipe.model import Lora, ModelSource

pytestmark = pytest.mark.slow

LORA = ("student.lora.rank=4", "student.lora.alpha=16")
LORA += ("teacher.lora.rank=8", "teacher.lora.alpha=64", "stages.teacher.lr=0.01", "stages.teacher.steps=20")
"""Few weights and few steps: a teacher that knows nothing is refused."""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for these tests, with one teacher in it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("KDZOO_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> dict[str, Run]:
    """Two runs that differ in what they leave."""
    folder = tmp_path_factory.mktemp("runs")
    found = {
        export: run(folder / export, *sets(*LORA, f"student.lora.export={export}")) for export in ("merged", "adapter")
    }
    assert not any("arning" in done.screen for done in found.values())
    return found


def test_a_run_trains_the_adapters_alone_and_its_export_scores_the_same_either_way(runs: dict[str, Run]) -> None:
    losses = [step["loss"] for step in runs["merged"].lines()]
    assert losses[-1] < losses[0]
    assert losses == pytest.approx([step["loss"] for step in runs["adapter"].lines()], rel=1e-6)
    merged, adapter = (runs[name].read("scores.json") for name in ("merged", "adapter"))
    for rows in ("seen", "held out"):
        for model in ("student", "student, data alone"):
            ours, theirs = merged[rows][model], adapter[rows][model]
            assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-5)
            assert ours["rouge_l"] == theirs["rouge_l"]
        assert merged[rows]["student"]["cross_entropy"] != merged[rows]["student, data alone"]["cross_entropy"]
    merged_answers, adapter_answers = (
        runs[name].lines("predictions/seen.student.greedy.jsonl") for name in ("merged", "adapter")
    )
    assert merged_answers == adapter_answers


def test_the_exports_load_as_their_libraries_say_and_as_a_model_of_a_recipe(runs: dict[str, Run]) -> None:
    from peft import AutoPeftModelForCausalLM

    from kdzoo.quiet import quiet

    merged_folder, adapter_folder = (runs[name].folder / "student" for name in ("merged", "adapter"))
    files = {path.name for path in adapter_folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not {"config.json", "model.safetensors"} & files
    with quiet():
        merged = AutoModelForCausalLM.from_pretrained(merged_folder).eval()
        beside = AutoPeftModelForCausalLM.from_pretrained(adapter_folder).eval()
    source = ModelSource(name=str(adapter_folder))
    again = resolve_model(
        source, "student", teacher_folder=None, model_adapters=load_plugins().model_adapters, address="student"
    )
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = merged(ids).logits
        torch.testing.assert_close(beside(ids).logits, expected, rtol=1e-5, atol=1e-5)
        reopened = AutoModelForCausalLM.from_pretrained(again.folder).eval()
        torch.testing.assert_close(reopened(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_card_says_what_was_trained_and_how_to_load_it(runs: dict[str, Run]) -> None:
    merged, adapter = ((runs[name].folder / "student" / "README.md").read_text() for name in ("merged", "adapter"))
    line = "- Trained: LoRA, rank 4, alpha 16, dropout 0, on all linear modules; "
    assert line + "merged into the weights\n" in merged
    assert line + "this folder holds nothing else\n" in adapter
    assert "AutoPeftModelForCausalLM.from_pretrained" in adapter
    assert "AutoModelForCausalLM.from_pretrained" in merged


def test_a_teacher_scores_the_same_with_its_adapter_merged_or_beside(
    tmp_path: Path, runs: dict[str, Run], own_cache: Path
) -> None:
    teacher = next(own_cache.glob("teacher/*/config.json")).parent
    model = add_lora(
        AutoModelForCausalLM.from_pretrained(teacher),
        load_plugins().model_adapters["mixtral"],
        Lora(rank=2),
        3,
        "teacher",
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
        done = run(tmp_path / merge, *sets(*flags))
        entropy = done.read("scores.json")["train"]["teacher"]["cross_entropy"]
        told[merge] = [entropy, *(step["loss"] for step in done.lines())]
    assert told["true"] == pytest.approx(told["false"], rel=1e-5)
    assert told["true"] != pytest.approx(told["none"], rel=1e-4)


def assert_learned(done: Run) -> None:
    steps = done.lines()
    assert len(steps) == 2
    assert all(value == value for step in steps for value in step.values()), "not a number"
    assert steps[-1]["gradient_norm"] > 0


WITH_LORA = sets("student.lora.rank=4", "data.held_out=null")


@pytest.mark.sweep
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_adapters(tmp_path: Path, name: str) -> None:
    assert_learned(trained(tmp_path / "run", name, "lab_llama_to_llama", *WITH_LORA))


@pytest.mark.sweep
def test_every_method_trains_adapters_on_two_ranks(tmp_path: Path) -> None:
    commands = {tmp_path / name: [*command(name, "lab_llama_to_llama"), *WITH_LORA] for name in METHODS}
    for done in run_on_two_ranks(tmp_path / "ranks", commands).values():
        assert_learned(done)
