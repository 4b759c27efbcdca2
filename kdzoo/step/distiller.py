"""One step in plain torch: batch -> student view -> vocabulary pass -> terms -> loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdzoo.plugin.contracts import Anatomy
from kdzoo.step.batch import Batch
from kdzoo.step.capture import capture
from kdzoo.step.head import HEAD_WEIGHT, Head
from kdzoo.step.report import Report, weighted_sum
from kdzoo.step.vocabulary import CHUNK_BYTES, Call, Gather, Slot, VocabularyPass, already_whole


class Distiller(nn.Module):
    """A student with the losses that train it; or losses alone, where only the teacher runs.

    The teacher is no part of it: its sites and its head are handed in, from an engine of its own.
    """

    def __init__(
        self,
        student: nn.Module | None,
        anatomy: Anatomy | None,
        slots: Sequence[Slot],
        gather: Gather = already_whole,
        chunk_bytes: int = CHUNK_BYTES,
        entries: int | None = None,
    ) -> None:
        """`entries`: how much of both heads counts, where one tokenizer has heads that are padded differently."""
        super().__init__()
        self.student = student
        self.losses = _BySlot({slot.name: slot.loss for slot in slots})
        self.vocabulary = VocabularyPass(slots, gather, chunk_bytes)
        self.slots = tuple(slots)
        self.anatomy = anatomy
        # Found once, outside of any forward pass: reading a partitioned parameter inside one would gather it there.
        self.head = None if student is None or anatomy is None else replace(anatomy.head(student), entries=entries)
        self.entries = entries

    def forward(
        self,
        *,
        batch: Batch,
        teacher: Mapping[str, Tensor],
        teacher_head: Head | None,
        weights: Mapping[str, float],
        report: Report,
        apart: bool = False,
    ) -> Tensor:
        """The loss of one micro-batch, divided by the global counts, so that micro-batches and ranks add up.

        `report` is filled with terms and watched values; with `apart`, and once the loss has gone backward, also with
        each slot's gradient at the student's last state.
        """
        heads = {} if teacher_head is None else {"teacher": replace(teacher_head, entries=self.entries)}
        sites: dict[str, Tensor] = {}
        if self.student is not None:
            assert batch.student is not None and self.anatomy is not None and self.head is not None
            wanted = {"hidden.last"}.union(*(slot.needs.student for slot in self.slots)) - {HEAD_WEIGHT}
            sites = capture(self.student, self.anatomy, batch.student, wanted)
            heads["student"] = self.head
        for site, value in teacher.items():  # what fusions watch
            fused, _, name = site.removeprefix("fused.").partition("/")
            if name:
                report.watch(f"fuse.{fused}/{name}", value)
        loss = self.score(Call(batch, sites, teacher, heads, weights, report, apart))
        if apart:
            report.listen_to_scale(loss)
        return loss

    def score(self, call: Call) -> Tensor:
        """From the sites of both models to the loss."""
        hidden = call.student["hidden.last"] if call.student else call.teacher["hidden.last"]
        loss, *values = self.vocabulary(hidden, call=call)
        rows: dict[str, dict[str, Tensor]] = {slot.name: {} for slot in self.slots}
        for (name, row_name), value in zip(call.row_names, values, strict=True):
            rows[name][row_name] = value
        parts = [loss]
        for slot in self.slots:
            facts = call.facts.get(slot.name, {})
            terms = slot.loss.combine(call.batch, *call.views(slot), facts, rows[slot.name])
            call.report.take(slot.name, terms, call.batch.counts)
            part = weighted_sum(terms, call.weights[slot.name], call.batch.counts)
            if part is not None:
                parts.append(part)
        return torch.stack(parts).sum() if len(parts) > 1 else loss


class _BySlot(nn.ModuleDict):
    """Losses under the names of their slots, which may be those of a module's own methods (`forward`, say)."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        assert module is not None
        self._modules[name] = module


def teacher_sites(slots: Sequence[Slot]) -> frozenset[str]:
    """Everything that the losses want of the teacher; its last state is always there, for its head."""
    return frozenset({"hidden.last"}).union(*(slot.teacher_sites for slot in slots))


def survey(slots: Sequence[Slot], batch: Batch, teacher: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """(slot, name) -> what the losses that survey sum up over this batch, in float64."""
    call = Call(batch, {}, teacher, {}, {}, Report())
    return {
        (slot.name, name): value.double()
        for slot in slots
        if slot.needs.survey
        for name, value in slot.loss.survey(batch, call.views(slot)[1]).items()
    }


@torch.no_grad()
def set_up(slots: Sequence[Slot], heads: Mapping[str, Head], gather: Gather = already_whole) -> None:
    """Show each loss the whole heads that it declares. Every rank comes here with the same slots."""
    for slot in slots:
        declared = {"student": slot.needs.student, "teacher": slot.needs.teacher}
        shown = {name: head for name, head in heads.items() if HEAD_WEIGHT in declared[name]}
        if shown:
            with gather([head.weight for head in shown.values()]):
                slot.loss.setup({name: head.rows.detach() for name, head in shown.items()})


def prepare(slots: Sequence[Slot], sums: Mapping[tuple[str, str], Tensor]) -> None:
    """Hand each loss that surveys its sums over all batches and ranks."""
    for slot in slots:
        if slot.needs.survey:
            slot.loss.prepare({name: value.cpu() for (owner, name), value in sums.items() if owner == slot.name})
