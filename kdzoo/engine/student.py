"""What trains: student and losses in one module, in a ZeRO engine with one optimizer group per kind of parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import get_scheduler

from kdzoo.api.batch import Batch
from kdzoo.api.head import Head
from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.engine.close import close_engine
from kdzoo.engine.config import zero_stage
from kdzoo.engine.deepspeed_private import gathered_state, whole_shape
from kdzoo.engine.distributed import gathered, summed, world
from kdzoo.engine.frozen import FrozenModel, gather
from kdzoo.recipe.model import LossSlot, Stage
from kdzoo.step.balance import Balance, How
from kdzoo.step.distiller import Aim, Distiller, teacher_sites
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Report
from kdzoo.step.weighing import WATCHED_OF_WEIGHTS, Facts, Weighed, refuse_invalid, weigh_step

TeacherSites = Mapping[str, Tensor]
"""Site -> what the teacher shows there."""


class StudentEngine:
    """One optimizer step at a time, over micro-batches and ranks, with denominators of the whole step."""

    def __init__(
        self,
        distiller: Distiller,
        teacher: FrozenModel | None,
        teacher_head: Head | None,
        stage: Stage,
        losses: Mapping[str, LossSlot],
        steps: int,
        config: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.distiller = distiller
        self.teacher = teacher
        self.teacher_head = teacher_head
        self.device = device
        self.accumulation = int(config["gradient_accumulation_steps"])
        self._losses = losses
        self._apart_every = stage.gradients_every
        self._steps = steps
        self._stage_3 = zero_stage(config) == 3
        # Without sharding and in float32 DeepSpeed keeps no gradient norm.
        self._plain = zero_stage(config) == 0 and not config.get("bf16", {}).get("enabled", False)
        self._sites = teacher_sites(distiller.terms)
        optimizer = torch.optim.AdamW(parameter_groups(distiller, stage, losses), lr=stage.lr, betas=stage.betas)
        name = "constant_with_warmup" if stage.schedule == "constant" else stage.schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=stage.warmup, num_training_steps=steps)
        self.engine, *_ = deepspeed.initialize(
            model=distiller, optimizer=optimizer, lr_scheduler=scheduler, config=config
        )
        if self._stage_3 and distiller.head is not None:
            for parameter in distiller.head.parameters:
                deepspeed.zero.register_external_parameter(distiller.vocabulary, parameter)
                deepspeed.zero.register_external_parameter(distiller.token_facts, parameter)

    def step(self, batches: Sequence[Batch], number: int) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches; the metrics of all ranks together.

        `batches` already hold the global counts. `number` counts the stage's optimizer steps from 0, for what moves.
        """
        batches = [batch.to(self.device) for batch in batches]
        sites, weighed = self._weigh(batches)
        self.engine.train()
        given = {name: weight_at(slot.weight, number) for name, slot in self._losses.items()}
        balance = self.distiller.balance
        weights = given if balance is None else balance.weights(given)
        report = Report()
        apart = self._apart_every is not None and number % self._apart_every == 0 and self.distiller.student is not None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        norm: float | None = None
        for n, (batch, mine) in enumerate(zip(batches, weighed, strict=True)):
            loss = self._loss(batch, sites[n], Aim(weights, report, mine, apart))
            sites[n] = None  # read for good
            total += loss.detach()
            # DeepSpeed divides by accumulation and averages over ranks; our losses are shares of a global mean.
            self.engine.backward(loss * (self.accumulation * world()))
            if apart:
                report.close_gradients(weights)
            if self._plain and self.engine.is_gradient_accumulation_boundary():
                norm = float(get_total_norm([p.grad for p in self.distiller.parameters() if p.grad is not None]))
            self.engine.step()
        if not self._plain:
            norm = self.engine.get_global_grad_norm()
        lr = self.engine.get_lr()[0]
        of_all_ranks, progress = merged(report, self.device), (number + 1) / self._steps
        found = of_all_ranks.values
        for term in self.distiller.terms:
            own = f"{term.name}/"
            of_weights = {f"{own}{name}" for name in WATCHED_OF_WEIGHTS}
            told = [name for name in (*report.terms, *report.watched) if name in found and name not in of_weights]
            names = [name for name in told if name.startswith(own)]
            own_terms = {name.removeprefix(own): found[name] for name in names}
            term.loss.after_step(own_terms, progress)
            if term.weights is not None:
                losses = {name: value for name, value in own_terms.items() if f"{own}{name}" in report.terms}
                term.weights.after_step(losses, progress)
        if balance is not None:
            found |= {f"{slot}/balanced_weight": weight for slot, weight in weights.items()}
            if apart:
                balance.measured(given, of_all_ranks.products)
        return {"loss": summed({"loss": total}, self.device)["loss"], **found, **of_all_ranks.norms} | {
            "gradient_norm": float(norm) if norm is not None else float("nan"),
            "lr": float(lr),
        }

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Terms and watched values over `batches`, which hold the global counts; nothing is trained."""
        self.engine.eval()
        weights = {name: weight_at(slot.weight, 0) for name, slot in self._losses.items()}
        report = Report()
        for batch in batches:
            self._loss(batch.to(self.device), None, Aim(weights, report))
        return merged(report, self.device).values

    def _weigh(self, batches: Sequence[Batch]) -> tuple[list[TeacherSites | None], list[dict[str, Weighed]]]:
        """What tokens weigh in this step, by micro-batch; and the teacher's sites, where they were needed for it."""
        sites: list[TeacherSites | None] = [None] * len(batches)
        weighed = [term for term in self.distiller.terms if term.weights is not None]
        facts: list[Facts] = [{} for _ in batches]
        if any(term.weight_needs.facts for term in weighed):
            self.engine.eval()
            if any(term.weight_needs.reads_teacher for term in weighed):
                sites = [self._teacher_sites(batch) for batch in batches]  # once: the step reads them again
            with torch.no_grad():
                facts = [
                    self.engine(batch=batch, teacher=seen or {}, teacher_head=self.teacher_head, aim=None)
                    for batch, seen in zip(batches, sites, strict=True)
                ]
        over_ranks = partial(summed, device=self.device)
        found = weigh_step(weighed, batches, facts, self._of_all_ranks, over_ranks)
        refuse_invalid(found, over_ranks)
        return sites, found

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        return torch.cat([part.to(self.device) for part in gathered(values.cpu())])

    def _teacher_sites(self, batch: Batch) -> TeacherSites:
        if self.teacher is None:
            return {}
        assert batch.teacher is not None
        return self.teacher.sites(batch.teacher, self._sites)

    def _loss(self, batch: Batch, sites: TeacherSites | None, aim: Aim) -> Tensor:
        seen = self._teacher_sites(batch) if sites is None else sites
        return self.engine(batch=batch, teacher=seen, teacher_head=self.teacher_head, aim=aim)

    def state(self, prefix: str, trained_only: bool = False) -> dict[str, Tensor]:
        """The weights under `prefix` (`student.`, `losses.<term>.`), whole, on rank 0's CPU.

        `trained_only` leaves out the frozen weights under an adapter.
        """
        whole = gathered_state(self.engine, trained_only) if self._stage_3 else self.distiller.state_dict()
        if trained_only:
            trained = {name for name, parameter in self.distiller.named_parameters() if parameter.requires_grad}
            whole = {name: value for name, value in whole.items() if name in trained}
        return {
            name.removeprefix(prefix): value.detach().cpu().contiguous()
            for name, value in whole.items()
            if name.startswith(prefix)
        }

    def save_checkpoint(self, folder: Path, step: int) -> None:
        """Everything that a continued run needs, sharded, under `folder/step-<n>`."""
        self.engine.save_checkpoint(str(folder), tag=f"step-{step}", client_state={"step": step})

    def load_checkpoint(self, folder: Path, tag: str) -> int:
        """Continue from a checkpoint; returns its step."""
        _, client = self.engine.load_checkpoint(str(folder), tag=tag)
        return int(client["step"])

    def close(self) -> None:
        close_engine(self.engine)


def build_distiller(
    student: nn.Module | None,
    model_adapter: ModelAdapter | None,
    head: Head | None,
    terms: Sequence[LossTerm],
    balance: How | None = None,
) -> Distiller:
    """The module that trains, whose pass gathers the frozen teacher's partitioned head when it needs it."""
    found = None if balance is None else Balance([term.name for term in terms], balance)
    return Distiller(student, model_adapter, head, terms, gather=gather, balance=found)


def parameter_groups(distiller: Distiller, stage: Stage, losses: Mapping[str, LossSlot]) -> list[dict[str, Any]]:
    """The student's parameters at the stage's rate, each loss term's at its own; vectors do not decay."""
    groups = []
    owners: list[tuple[float, Iterator[tuple[str, nn.Parameter]]]] = []
    if distiller.student is not None:
        owners.append((stage.lr, distiller.student.named_parameters()))
    owners += [(losses[name].lr or stage.lr, loss.named_parameters()) for name, loss in distiller.losses.items()]
    for lr, parameters in owners:
        trained = [p for _, p in parameters if p.requires_grad]
        for decayed in (True, False):
            members = [p for p in trained if (len(whole_shape(p)) >= 2) == decayed]
            if members:
                groups.append({"params": members, "lr": lr, "weight_decay": stage.weight_decay if decayed else 0.0})
    return groups


def weight_at(weight: Any, step: int) -> float:
    """A loss term's weight at an optimizer step."""
    if isinstance(weight, float | int):
        return float(weight)
    return weight.start + (weight.end - weight.start) * min(1.0, step / weight.steps)


class Merged(NamedTuple):
    """A report of all ranks and micro-batches together."""

    values: dict[str, float]
    """Terms and watched values."""
    products: dict[tuple[str, str], float]
    """Two slots -> the product of their gradients at the student's last state."""

    @property
    def norms(self) -> dict[str, float]:
        """`<slot>/gradient_at_state`"""
        squares = {one: product for (one, other), product in self.products.items() if one == other}
        return {f"{slot}/gradient_at_state": math.sqrt(square) for slot, square in squares.items()}


def merged(report: Report, device: torch.device) -> Merged:
    """Shares and products add up, watched values are total over count."""
    sums = {f"term {k}": v for k, v in report.terms.items()}
    sums |= {f"total {k}": total for k, (total, _) in report.watched.items()}
    sums |= {f"count {k}": count for k, (_, count) in report.watched.items()}
    sums |= {f"product {one} {other}": product for (one, other), product in report.products.items()}
    values = summed(sums, device)
    terms = {name: values[f"term {name}"] for name in report.terms}
    watched = {
        name: values[f"total {name}"] / values[f"count {name}"] for name in report.watched if values[f"count {name}"]
    }
    products = {(one, other): values[f"product {one} {other}"] for one, other in report.products}
    return Merged(terms | watched, products)


def whole_gradient(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient of the whole step, on every rank, between the last backward pass and the step."""
    gradient = safe_get_full_grad(parameter)
    return None if gradient is None else gradient.detach().clone()
