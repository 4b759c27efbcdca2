"""Token weights in the engine that trains: weights of 1 change no bit, a row of weight 0 is not there, ranks add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdzoo import Loss, TokenWeights
from kdzoo.testing.ranks import on_ranks
from kdzoo.testing.tiny import save_tiny_model, tiny_batch

V = 61
LENGTHS = [(4, 9, 9), (6, 2, 2), (3, 14, 14), (5, 3, 3)]
ONES, TWICE, WITHOUT = (1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0), (1.0, 0.0, 1.0, 1.0)
Metrics = Mapping[str, float]


def train(
    folder: Path, parts: int, weights: tuple[str, dict[str, Any]] | None, rows: tuple[float, ...]
) -> list[Metrics]:
    """Three steps over these sequences in so many micro-batches, and what was logged; rows weigh what is said."""
    from kdzoo.engine.close import release
    from kdzoo.engine.distributed import rank, world
    from kdzoo.engine.frozen import FrozenModel
    from kdzoo.engine.loading import load_model
    from kdzoo.engine.student import StudentEngine, build_distiller
    from kdzoo.recipe.model import LossSlot, Stage
    from kdzoo.step.loss_term import LossTerm
    from kdzoo.testing.promises.rearrange import rearranged
    from kdzoo.testing.promises.world import Subject, World, registry

    count = parts // world()
    whole = tiny_batch(LENGTHS, V, V, True)
    if not all(rows) and weights is None:
        whole = rearranged(whole, [b for b, weight in enumerate(rows) if weight])
        whole = replace(whole, counts=whole.local_counts())
    else:
        whole = replace(whole, columns={"weight": torch.tensor(rows)[whole.student.sample]})
    sequences = list(range(whole.student.sequences))
    every = [rearranged(whole, sequences[part::parts]) for part in range(parts)]
    config: dict[str, Any] = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    device, known = torch.device("cpu"), registry()
    stage = Stage(steps=3, lr=1e-3, weight_decay=0.0, schedule="constant", gradients_every=2)
    teacher = FrozenModel(folder / "teacher", known.model_adapters, "fp32", config, device)
    student, adapter = load_model(folder / "student", "fp32", config, device), known.model_adapters["gpt2"]
    terms = []
    for name in ("cross_entropy", "forward_kl"):
        loss = known.of(Loss)[name]
        made = loss(loss.Params(), World(Subject.of(loss), True).pair, {})
        weighing = None
        if weights is not None:
            kind = known.of(TokenWeights)[weights[0]]
            weighing = kind(kind.Params.model_validate(weights[1]))
        terms.append(LossTerm.of(name, made, weights=weighing))
    distiller = build_distiller(student, adapter, adapter.head(student), terms)
    losses = {term.name: LossSlot(use=term.name, weight=0.5) for term in terms}
    engine = StudentEngine(distiller, teacher, teacher.head, stage, losses, 3, config, device)
    mine = every[rank() * count : (rank() + 1) * count]
    found = [dict(engine.step(mine, number)) for number in range(3)]
    engine.close()
    teacher.close()
    release()
    unweighed = ("token_weight", "token_temperature", "token_accuracy")  # what is watched counts every token
    return [{name: value for name, value in step.items() if not name.endswith(unweighed)} for step in found]


def several(folder: Path, tried: list[tuple[Any, ...]]) -> list[list[Metrics]]:
    return [train(folder, *each) for each in tried]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student", "gpt2", V, seed=1)
    save_tiny_model(folder / "teacher", "llama", V)
    return folder


COLUMN, ADAPTIVE = ("column", {}), ("adaptive", {"warmup": 0.0, "decay": 0.0, "tolerance": 1e-4})
ENTROPY, STEP = ("entropy", {"of": "gap"}), ("top_share", {"among": "step", "share": 0.5})
OFF = ("adaptive", {"change": 0.0, "temperature_scale": 0.0})
"""Every token counts 1, and nothing is tempered; but both models are asked."""


@pytest.mark.slow
def test_weights_of_1_change_no_bit_and_of_0_take_a_row_away(models: Path, tmp_path: Path) -> None:
    tried = [(1, None, ONES), (1, COLUMN, ONES), (1, COLUMN, TWICE), (2, None, ONES), (2, COLUMN, ONES), (1, OFF, ONES)]
    tried += [(1, None, WITHOUT), (1, COLUMN, WITHOUT), (2, COLUMN, WITHOUT)]
    ((plain, ones, twice, parts, ones_parts, off, without, zero, zero_parts),) = on_ranks(
        1, tmp_path, several, models, tried
    )
    assert plain == ones and parts == ones_parts
    for found, expected in ((off, plain), (twice, plain), (parts, plain), (zero, without), (zero_parts, without)):
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=2e-4)
    assert without != plain


@pytest.mark.slow
def test_weights_are_the_same_however_ranks_and_accumulation_split_the_step(models: Path, tmp_path: Path) -> None:
    kinds = [COLUMN, ENTROPY, STEP, ADAPTIVE]
    rows = (1.0, 0.0, 0.5, 2.0)
    (alone,) = on_ranks(1, tmp_path / "one", several, models, [(1, kind, rows) for kind in kinds])
    for found in on_ranks(2, tmp_path / "two", several, models, [(4, kind, rows) for kind in kinds]):
        for kind, split, whole in zip(kinds, found, alone, strict=True):
            for one, other in zip(split, whole, strict=True):
                assert one == pytest.approx(other, rel=1e-3), kind
