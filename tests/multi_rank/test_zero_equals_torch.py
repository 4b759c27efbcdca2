"""The sharded engine computes what plain torch computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdzoo import Loss, ModelPair
from kdzoo.testing.ranks import on_ranks
from kdzoo.testing.tiny import save_tiny_model, tiny_batch, tiny_model

V, W, LOW = 61, 53, 8
LENGTHS = [(4, 9, 7), (6, 1, 2), (3, 14, 11), (5, 3, 6)]
"""Tokens are very unequally many, so that ranks are."""
CONFIG: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
LOSSES = {
    "sft": {"use": "cross_entropy", "weight": 0.5},
    "dskd": {"use": "dskd", "weight": 0.5},
    "residual": {"use": "residual", "weight": 0.5},
}


def terms(student: Any, teacher: Any, registry: Any, same: bool) -> list[Any]:
    from kdzoo.step.loss_term import LossTerm

    torch.manual_seed(7)
    artifacts = {"projectors": {"teacher_to_low.weight": torch.randn(LOW, 48) * 0.3}}
    pair = ModelPair(student, teacher, same)
    losses = {name: registry.of(Loss)[slot["use"]] for name, slot in LOSSES.items()}
    return [LossTerm.of(name, loss(loss.Params(), pair, artifacts)) for name, loss in losses.items()]


def parts(count: int, same: bool) -> list[Any]:
    """The batch cut into one micro-batch per sequence, plus empty ones up to `count`, with the counts of the whole."""
    cut = [tiny_batch([length], V, V if same else W, same, seed=i) for i, length in enumerate(LENGTHS)]
    cut += [tiny_batch([], V, V if same else W, same) for _ in range(count - len(cut))]
    counts = {per: sum(batch.counts[per] for batch in cut) for per in cut[0].counts}
    return [replace(batch, counts=counts) for batch in cut]


def plain_torch(folder: Path, same: bool, steps: int) -> list[tuple[float, dict[str, Tensor]]]:
    """Losses and gradients of `steps` AdamW steps on the micro-batches, without any engine."""
    from transformers import AutoModelForCausalLM

    from kdzoo.engine.frozen import model_info
    from kdzoo.plugin.registry import load_plugins
    from kdzoo.step.capture import capture
    from kdzoo.step.distiller import Aim, Distiller, teacher_sites
    from kdzoo.step.report import Report

    registry = load_plugins()
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval().requires_grad_(False)
    of_student, of_teacher = registry.model_adapters["gpt2"], registry.model_adapters[teacher.config.model_type]
    made = terms(model_info(student, of_student), model_info(teacher, of_teacher), registry, same)
    distiller = Distiller(student, of_student, of_student.head(student), made)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2, weight_decay=0.0)
    found = []
    for _ in range(steps):
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
        gradients = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
        found.append((total, gradients))
        optimizer.step()
        optimizer.zero_grad()
    return found


def engine(folder: Path, same: bool, steps: int) -> dict[str, Any]:
    """The same through ZeRO-3, each rank with its share of the micro-batches (the last ones may be empty)."""
    from deepspeed.utils import safe_get_full_grad

    from kdzoo.engine.distributed import rank, world
    from kdzoo.engine.frozen import FrozenModel, model_info
    from kdzoo.engine.loading import load_model
    from kdzoo.engine.student import StudentEngine, build_distiller
    from kdzoo.plugin.registry import load_plugins
    from kdzoo.recipe.model import LossSlot, Stage

    device = torch.device("cpu")
    registry = load_plugins()
    count = 6 // world()  # two of six micro-batches are empty: with two ranks, one rank ends on them
    config = CONFIG | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    teacher = FrozenModel(folder / "teacher", registry.model_adapters, "fp32", config, device)
    student = load_model(folder / "student", "fp32", config, device)
    adapter = registry.model_adapters["gpt2"]
    made = terms(model_info(student, adapter), teacher.info, registry, same)
    stage = Stage(steps=steps, lr=1e-2, weight_decay=0.0, schedule="constant", clip=0.0)
    losses = {name: LossSlot.model_validate(slot) for name, slot in LOSSES.items()}
    distiller = build_distiller(student, adapter, adapter.head(student), made)
    run = StudentEngine(distiller, teacher, teacher.head, stage, losses, steps, config, device)
    gradients: list[dict[str, Tensor]] = []
    step = run.engine.step

    def keep_gradients_and_step() -> None:
        if run.engine.is_gradient_accumulation_boundary():
            named = {n: p for n, p in distiller.named_parameters() if p.requires_grad}
            gradients.append({n: safe_get_full_grad(p).clone() for n, p in named.items()})
        step()

    run.engine.step = keep_gradients_and_step
    mine = parts(6, same)[rank() * count : (rank() + 1) * count]
    metrics = [run.step(mine, number) for number in range(steps)]
    shapes = {tuple(p.shape) for p in teacher.model.parameters()}
    return {
        "losses": [m["loss"] for m in metrics],
        "gradients": gradients,
        "teacher_shapes": shapes,
        "teacher_sharded": all(p.ds_numel > 0 for p in teacher.model.parameters()),
        "state": run.state("student."),
    }


TOKENIZERS = {"one tokenizer": True, "two tokenizers": False}


def engines(folder: Path, steps: int) -> dict[str, dict[str, Any]]:
    """With one tokenizer and with two: starting ranks takes longer than the steps."""
    return {name: engine(folder / name, same, steps) for name, same in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, same in TOKENIZERS.items():
        save_tiny_model(folder / name / "student", "gpt2", V, seed=1)
        save_tiny_model(folder / name / "teacher", "llama" if same else "mixtral", V if same else W, seed=2)
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def results(request: pytest.FixtureRequest, models: Path) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(request.param, models / f"ranks{request.param}", engines, models, 3)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizers", TOKENIZERS)
def test_losses_and_gradients_of_dskd_and_residual_equal_plain_torch_on_one_and_two_ranks(
    models: Path, results: list[dict[str, dict[str, Any]]], tokenizers: str
) -> None:
    expected = plain_torch(models / tokenizers, TOKENIZERS[tokenizers], steps=3)
    for found in results:
        result = found[tokenizers]
        assert result["losses"] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert result["teacher_shapes"] == {(0,)}, "a parameter of the teacher stays gathered between uses"
        assert result["teacher_sharded"]
        for step, ((_, wanted), gradients) in enumerate(zip(expected, result["gradients"], strict=True)):
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                if step == 0:
                    torch.testing.assert_close(gradient, wanted[name], rtol=2e-4, atol=2e-6, msg=name)
                # Adam's first step is the sign of a gradient, also of an entry that is nothing but rounding.
                off = (gradient - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-6)
                assert off < 1e-3, f"{name}, step {step}: {off:.1e} of its norm"
    names = {name for name, _ in tiny_model("gpt2", V).named_parameters()}
    assert names <= results[0][tokenizers]["state"].keys()
