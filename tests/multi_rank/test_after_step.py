"""What a loss moves once per optimizer step is the same however the step was split, and is in the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdzoo import Logits, Loss, Terms, ops, visit
from kdzoo.testing.ranks import on_ranks
from kdzoo.testing.tiny import save_tiny_model, tiny_batch

V = 61
LENGTHS = [(4, 9, 9), (6, 1, 1), (3, 14, 14), (5, 3, 3)]


class Moving(Loss):
    """Cross-entropy over its own moving mean."""

    name = "moving"
    paper = "none"
    formula = "none"

    def build(self, student, teacher, artifacts):
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("progress", torch.zeros(()))

    @visit
    def tokens(self, student: Logits) -> Terms:
        nll = ops.cross_entropy(student.logprobs(), student.labels)
        return Terms().add("nll", nll).watch("own_mean", nll, len(nll))

    def after_step(self, terms, progress):
        assert terms.keys() == {"nll", "own_mean"}
        assert terms["nll"] == pytest.approx(terms["own_mean"], rel=1e-5)
        self.mean.mul_(0.9).add_(0.1 * terms["nll"])
        self.steps.add_(1)
        self.progress.fill_(progress)


def train(folder: Path, parts: int) -> dict[str, tuple[float, float, float]]:
    """Two steps, a checkpoint, another step; then back to the checkpoint in a new engine."""
    from kdzoo.engine.distributed import rank, world
    from kdzoo.engine.loading import load_model
    from kdzoo.engine.student import StudentEngine, build_distiller
    from kdzoo.recipe.model import LossSlot, Stage
    from kdzoo.step.loss_term import LossTerm
    from kdzoo.testing.promises.rearrange import rearranged
    from kdzoo.testing.promises.world import registry

    count = parts // world()
    both = tiny_batch(LENGTHS, V, V, True)
    whole = replace(both, teacher=None, pairs=both.pairs[:0])
    size = len(LENGTHS) // parts
    every = [rearranged(whole, range(i, i + size)) for i in range(0, len(LENGTHS), size)]
    config: dict[str, Any] = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    device, adapter = torch.device("cpu"), registry().model_adapters["gpt2"]
    stage = Stage(steps=3, lr=1e-3, weight_decay=0.0, schedule="constant", clip=0.0, gradients_every=1)

    def engine() -> StudentEngine:
        student = load_model(folder / "student", "fp32", config, device)
        term = LossTerm.of("own", made())
        distiller = build_distiller(student, adapter, adapter.head(student), [term])
        losses = {"own": LossSlot(use="moving", weight=1.0)}
        return StudentEngine(distiller, None, None, stage, losses, 3, config, device)

    def moved(run: StudentEngine) -> tuple[float, float, float]:
        loss = run.distiller.terms[0].loss
        return float(loss.mean), float(loss.steps), float(loss.progress)

    mine = every[rank() * count : (rank() + 1) * count]
    first = engine()
    for number in range(2):
        first.step(mine, number)
    place = folder / f"checkpoints-{world()}-{parts}"
    first.save_checkpoint(place, 2)
    kept = moved(first)
    first.step(mine, 2)
    after = moved(first)
    first.close()
    again = engine()
    assert again.load_checkpoint(place, "step-2") == 2
    loaded = moved(again)
    again.step(mine, 2)
    continued = moved(again)
    again.close()
    return {"kept": kept, "after": after, "loaded": loaded, "continued": continued}


def made() -> Moving:
    from kdzoo.api.models import AbsentModel, ModelInfo, ModelPair

    return Moving(Moving.Params(), ModelPair(ModelInfo(32, V, 2, "gpt2"), AbsentModel("teacher"), True), {})


@pytest.mark.slow
def test_a_moving_buffer_is_the_same_on_any_split_and_continues_from_a_checkpoint(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "student", "gpt2", V, seed=1)
    splits = [(1, 1), (1, 4), (2, 4)]
    found = [result for r, parts in splits for result in on_ranks(r, tmp_path / f"{r}-{parts}", train, tmp_path, parts)]
    for result in found:
        assert result["after"][1] == 3.0
        assert (result["kept"][2], result["after"][2]) == (pytest.approx(2 / 3), 1.0)
        assert result["after"][0] == pytest.approx(found[0]["after"][0], rel=1e-6)
        assert result["loaded"] == result["kept"]
        assert result["continued"] == pytest.approx(result["after"], rel=1e-6)
