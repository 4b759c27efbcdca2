"""A student that learns through adapters, and a teacher that has one: what the sharded engine computes, and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_zero_equals_torch import CONFIG, LOSSES, TOKENIZERS, V, W, parts, terms
from torch import Tensor

from kdzoo.lora import add_adapter, add_lora, save_adapter
from kdzoo.recipe.model import Lora
from kdzoo.testing.ranks import on_ranks
from kdzoo.testing.tiny import save_tiny_model

LORA = Lora(rank=3, alpha=6)
RATE, STEPS = 1e-2, 3


def adapted(registry: Any, model: Any) -> Any:
    return add_lora(model, registry.model_adapters["gpt2"], LORA, 5, "student.lora")


def save_teacher(folder: Path, family: str, vocabulary: int) -> None:
    """A teacher, and an adapter of it that says something."""
    from transformers import AutoModelForCausalLM

    from kdzoo.plugin.registry import load_plugins

    save_tiny_model(folder / "teacher", family, vocabulary, seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    model = add_lora(model, load_plugins().model_adapters[family], LORA, 5, "teacher.lora")
    torch.manual_seed(11)
    state = {name: torch.randn(p.shape) * 0.2 for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(folder / "teacher_adapter", folder / "teacher", "teacher", LORA, state)


def plain_torch(folder: Path, same: bool) -> tuple[list[tuple[float, dict[str, Tensor]]], dict[str, Tensor]]:
    """Losses and gradients of the steps, and the adapter's weights after them, without any engine."""
    from transformers import AutoModelForCausalLM

    from kdzoo.engine.frozen import model_info
    from kdzoo.plugin.registry import load_plugins
    from kdzoo.step.capture import capture
    from kdzoo.step.distiller import Aim, Distiller, teacher_sites
    from kdzoo.step.report import Report

    registry = load_plugins()
    student = adapted(registry, AutoModelForCausalLM.from_pretrained(folder / "student"))
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    of_student, of_teacher = registry.model_adapters["gpt2"], registry.model_adapters[teacher.config.model_type]
    teacher = add_adapter(teacher, of_teacher, folder / "teacher_adapter", "teacher").eval().requires_grad_(False)
    made = terms(model_info(student, of_student), model_info(teacher, of_teacher), registry, same)
    distiller = Distiller(student, of_student, of_student.head(student), made)
    trained = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        total = 0.0
        for batch in parts(4, same):
            assert batch.teacher is not None
            with torch.no_grad():
                sites = capture(teacher, of_teacher, batch.teacher, teacher_sites(made))
            weights = {name: slot["weight"] for name, slot in LOSSES.items()}
            loss = distiller(
                batch=batch, teacher=sites, teacher_head=of_teacher.head(teacher), aim=Aim(weights, Report())
            )
            loss.backward()
            total += loss.item()
        found.append((total, {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}))
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.grad is None for name, parameter in distiller.named_parameters() if name not in trained)
    after = {n.removeprefix("student."): p.detach() for n, p in trained.items() if n.startswith("student.")}
    return found, after


def engine(folder: Path, same: bool, checkpoints: Path) -> dict[str, Any]:
    """The same through ZeRO-3, stopped after the first step and continued in a new engine."""
    from kdzoo.engine.distributed import barrier, rank, world
    from kdzoo.engine.frozen import FrozenModel, model_info
    from kdzoo.engine.loading import load_model
    from kdzoo.engine.student import StudentEngine, build_distiller, whole_gradient
    from kdzoo.plugin.registry import load_plugins
    from kdzoo.recipe.model import LossSlot, Stage

    device = torch.device("cpu")
    registry = load_plugins()
    count = 6 // world()
    config = CONFIG | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    teacher = FrozenModel(
        folder / "teacher", registry.model_adapters, "fp32", config, device, adapter=folder / "teacher_adapter"
    )
    adapter = registry.model_adapters["gpt2"]
    stage = Stage(steps=STEPS, lr=RATE, weight_decay=0.0, schedule="constant", clip=0.0)
    losses = {name: LossSlot.model_validate(slot) for name, slot in LOSSES.items()}
    gradients: list[dict[str, Tensor]] = []

    def opened() -> StudentEngine:
        student = adapted(registry, load_model(folder / "student", "fp32", config, device))
        head = adapter.head(student)
        made = terms(model_info(student, adapter), teacher.info, registry, same)
        distiller = build_distiller(student, adapter, head, made)
        run = StudentEngine(distiller, teacher, teacher.head, stage, losses, STEPS, config, device)
        step = run.engine.step

        def keep_gradients_and_step() -> None:
            if run.engine.is_gradient_accumulation_boundary():
                named = {n: p for n, p in distiller.named_parameters() if p.requires_grad}
                gradients.append({n: g for n, p in named.items() if (g := whole_gradient(p)) is not None})
            step()

        run.engine.step = keep_gradients_and_step
        return run

    mine = parts(6, same)[rank() * count : (rank() + 1) * count]
    run = opened()
    sharded = all(p.ds_numel > 0 and p.shape == (0,) for p in run.distiller.student.parameters())
    losses_of_steps = [run.step(mine, 0)["loss"]]
    run.save_checkpoint(checkpoints, 1)
    run.close()
    barrier()
    run = opened()
    assert run.load_checkpoint(checkpoints, "step-1") == 1
    losses_of_steps += [run.step(mine, number)["loss"] for number in range(1, STEPS)]
    return {
        "losses": losses_of_steps,
        "gradients": gradients,
        "sharded": sharded,
        "teacher_sharded": all(p.ds_numel > 0 and p.shape == (0,) for p in teacher.model.parameters()),
        "trained": run.state("student.", trained_only=True),
    }


def engines(folder: Path, checkpoints: Path) -> dict[str, dict[str, Any]]:
    """With one tokenizer and with two: starting ranks takes longer than the steps."""
    return {name: engine(folder / name, same, checkpoints / name) for name, same in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, same in TOKENIZERS.items():
        save_tiny_model(folder / name / "student", "gpt2", V, seed=1)
        save_teacher(folder / name, "llama" if same else "mixtral", V if same else W)
    return folder


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.sweep), 2])
def results(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    work = tmp_path_factory.mktemp("ranks")
    return on_ranks(request.param, work, engines, models, work / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("tokenizers", TOKENIZERS)
def test_adapters_learn_as_in_plain_torch_also_when_continued(
    models: Path, results: list[dict[str, dict[str, Any]]], tokenizers: str
) -> None:
    expected, after = plain_torch(models / tokenizers, TOKENIZERS[tokenizers])
    for found in results:
        result = found[tokenizers]
        assert result["losses"] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert result["sharded"]
        assert result["teacher_sharded"]
        for (_, wanted), gradients in zip(expected, result["gradients"], strict=True):
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=2e-4, atol=2e-6, msg=name)
    trained = results[0][tokenizers]["trained"]
    assert trained.keys() == after.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value, after[name], rtol=1e-3, atol=1e-4, msg=name)
