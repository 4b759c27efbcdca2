"""A loss on two ranks of ZeRO-3 with the real engine, against one process of plain torch."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdzoo.api.batch import Batch
from kdzoo.api.head import Head
from kdzoo.api.models import Role
from kdzoo.errors import KdzooError
from kdzoo.quiet import quiet
from kdzoo.testing.promises.rearrange import rearranged
from kdzoo.testing.promises.world import SLOT, Outcome, Subject, World
from kdzoo.testing.ranks import on_ranks

RANKS = 2
PARTS: tuple[list[int], ...] = ([0, 1], [2], [3], [])
"""Which sequences are in each micro-batch; the second rank ends on one without rows."""
SECONDS, SECONDS_EACH = 120.0, 30.0
"""How long ranks may take to start, and for each subject, until they are taken to wait for each other."""


@dataclass(frozen=True)
class _Task:
    """A subject that another process can make: its class by file and name, since a loose file is no module there."""

    file: str
    name: str
    params: dict[str, Any]
    artifacts: Mapping[str, Mapping[str, Tensor]]
    same_tokens: bool
    weights: tuple[str, str, dict[str, Any]] | None
    """File, name and parameters of what weighs tokens."""

    @classmethod
    def of(cls, subject: Subject, same_tokens: bool) -> _Task:
        for made in (subject.loss, subject.weights):
            if made is not None and "<locals>" in made.__qualname__:
                raise KdzooError(
                    f"the class '{made.__name__}' is made inside a function; ranks need it at a file's top"
                )
        weights = None
        if subject.weights is not None and subject.weights_params is not None:
            dumped = subject.weights_params.model_dump()
            weights = (inspect.getfile(subject.weights), subject.weights.__qualname__, dumped)
        params = subject.params.model_dump()
        return cls(
            inspect.getfile(subject.loss), subject.loss.__qualname__, params, subject.artifacts, same_tokens, weights
        )

    def world(self) -> World:
        subject = Subject.of(_loaded(self.file, self.name), self.params, self.artifacts)
        if self.weights is not None:
            file, name, params = self.weights
            weights = _loaded(file, name)
            subject = replace(subject, weights=weights, weights_params=weights.Params.model_validate(params))
        return World(subject, self.same_tokens)


def _loaded(file: str, name: str) -> Any:
    """The class of a file."""
    module_name = f"kdzoo_checked_{Path(file).stem}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(sys.modules[module_name], name)


def two_ranks(subjects: Sequence[tuple[Subject, bool]]) -> list[str]:
    """What is wrong with each (subject, has one tokenizer), or nothing; in one go, since processes start slowly."""
    import kdzoo.engine  # noqa: F401  # it chooses the accelerator before saving a model makes DeepSpeed look for one

    tasks = [_Task.of(subject, same) for subject, same in subjects]
    with tempfile.TemporaryDirectory() as place:
        for number, task in enumerate(tasks):
            world = task.world()
            with quiet():
                for model, name in ((world.student, "student"), (world.teacher, "teacher")):
                    deepcopy(model).float().save_pretrained(Path(place) / f"{number}" / name)  # type: ignore[operator]
        seconds = SECONDS + SECONDS_EACH * len(tasks)
        found = on_ranks(RANKS, Path(place) / "ranks", _train, Path(place), tasks, seconds=seconds)
    faults = []
    for number, task in enumerate(tasks):
        expected = _expected(task.world())
        differences = (expected.difference(_terms_of(expected, rank[number]), tolerance=2e-4) for rank in found)
        fault = next(filter(None, differences), "")
        faults.append(
            fault and f"two ranks of ZeRO-3 are not one process: {fault}; keep parameters in submodules that are called"
        )
    return faults


def _terms_of(expected: Outcome, found: Outcome) -> Outcome:
    """Without what is only watched."""
    return replace(found, terms={name: found.terms[name] for name in expected.terms})


def _expected(world: World) -> Outcome:
    """One process, all sequences at once."""
    return world.run([world.term()], world.batch())


def _micro_batches(world: World) -> list[Batch]:
    batch = world.batch()
    nothing = replace(world.batch(()), counts=batch.counts)
    return [rearranged(batch, part) if part else nothing for part in PARTS]


def _train(folder: Path, tasks: Sequence[_Task]) -> list[Outcome]:
    """One optimizer step per task on this rank's micro-batches."""
    return [_step(folder / f"{number}", task.world()) for number, task in enumerate(tasks)]


def _step(folder: Path, world: World) -> Outcome:
    from kdzoo.engine.close import release
    from kdzoo.engine.distributed import rank
    from kdzoo.engine.distributed import world as world_size
    from kdzoo.engine.frozen import FrozenModel, gather
    from kdzoo.engine.loading import load_model
    from kdzoo.engine.student import StudentEngine, build_distiller, whole_gradient
    from kdzoo.recipe.model import LossSlot, Stage
    from kdzoo.step.distiller import start_from_heads
    from kdzoo.testing.promises.world import registry

    device = torch.device("cpu")
    count = len(PARTS) // world_size()
    config = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    model_adapters = registry().model_adapters
    teacher = FrozenModel(folder / "teacher", model_adapters, "fp32", config, device)
    student, model_adapter = None, None
    term = world.term()
    term.loss.float()
    if world.has_student:
        student, model_adapter = load_model(folder / "student", "fp32", config, device), world.model_adapters[0]
    heads: dict[Role, Head] = {"teacher": teacher.head}
    if student is not None:
        heads["student"] = world.model_adapters[0].head(student)
    start_from_heads([term], heads, gather)
    distiller = build_distiller(student, model_adapter, heads.get("student"), [term])
    stage = Stage(steps=1, lr=1e-3, weight_decay=0.0, schedule="constant", clip=0.0, gradients_every=None)
    losses = {SLOT: LossSlot(use=world.subject.loss.name, weight=1.0)}
    engine = StudentEngine(distiller, teacher, teacher.head, stage, losses, 1, config, device)
    gradients: dict[str, Tensor | None] = {}
    take_step = engine.engine.step

    def keep_gradients_and_step() -> None:
        if engine.engine.is_gradient_accumulation_boundary():
            trained: dict[str, nn.Parameter] = {n: p for n, p in distiller.named_parameters() if p.requires_grad}
            gradients.update({name: whole_gradient(p) for name, p in trained.items()})
        take_step()

    engine.engine.step = keep_gradients_and_step
    metrics = engine.step(_micro_batches(world)[rank() * count : (rank() + 1) * count], 0)
    terms = {name: torch.tensor(value) for name, value in metrics.items() if name.startswith(f"{SLOT}/")}
    engine.close()
    teacher.close()
    release()
    return Outcome(torch.tensor(metrics["loss"]), terms, gradients)
