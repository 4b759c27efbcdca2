"""One step in plain torch: batch -> student view -> vocabulary pass -> terms -> loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kdzoo.api.batch import Batch
from kdzoo.api.head import HEAD_WEIGHT, Head
from kdzoo.api.model_adapter import ModelAdapter
from kdzoo.api.models import Role
from kdzoo.step.balance import Balance
from kdzoo.step.capture import capture
from kdzoo.step.chunks import CHUNK_BYTES
from kdzoo.step.inputs import PassInputs
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Report, Sums, weighted_sum
from kdzoo.step.vocabulary_pass import Gather, VocabularyPass, already_whole
from kdzoo.step.weighing import Facts, TokenFacts, Weighed, weighed_sums


@dataclass(frozen=True)
class Aim:
    """What the loss of a micro-batch is made with."""

    weights: Mapping[str, float]
    """Loss term -> weight at this optimizer step."""
    report: Report
    """Filled with terms and watched values; with `apart`, and once the loss has gone backward, also with each term's
    gradient at the student's last state."""
    weighed: Mapping[str, Weighed] = field(default_factory=dict)
    """Loss term -> what its tokens weigh, where they do not all count as much."""
    apart: bool = False


class Distiller(nn.Module):
    """A student with the losses that train it; or losses alone, where only the teacher runs.

    The teacher is no part of it: its sites and its head are handed in, from an engine of its own.
    """

    def __init__(
        self,
        student: nn.Module | None,
        adapter: ModelAdapter | None,
        head: Head | None,
        terms: Sequence[LossTerm],
        gather: Gather = already_whole,
        chunk_bytes: int = CHUNK_BYTES,
        balance: Balance | None = None,
    ) -> None:
        """`head`: the student's, found outside of any forward pass: reading a partitioned parameter inside one would
        gather it there."""
        super().__init__()
        self.student = student
        self.losses = _BySlot({term.name: term.loss for term in terms})
        self.token_weights = _BySlot({term.name: term.weights for term in terms if term.weights is not None})
        self.vocabulary = VocabularyPass(terms, gather, chunk_bytes)
        self.token_facts = TokenFacts(terms, gather, chunk_bytes)
        self.terms = tuple(terms)
        self.adapter = adapter
        self.head = head
        self.balance = balance

    def forward(
        self, *, batch: Batch, teacher: Mapping[str, Tensor], teacher_head: Head | None, aim: Aim | None
    ) -> Tensor | Facts:
        """The loss of one micro-batch, divided by the global counts, so that micro-batches and ranks add up.

        Without an `aim`: what token weights read of both models, by term. (One module, one `forward`: an engine that
        partitions parameters follows no other method.)
        """
        heads: dict[Role, Head] = {} if teacher_head is None else {"teacher": teacher_head}
        if self.head is not None:
            heads["student"] = self.head
        if aim is None:
            student = self._sites(batch, {"hidden.last"})["hidden.last"] if self.token_facts.reads_student else None
            return self.token_facts(batch=batch, student=student, teacher=teacher, heads=heads)
        report = aim.report
        sites = {} if self.student is None else self._sites(batch, student_sites(self.terms))
        for site, value in teacher.items():  # what fusions watch
            fused, _, name = site.removeprefix("fused.").partition("/")
            if name:
                report.watch(f"fuse.{fused}/{name}", value)
        loss = self.score(PassInputs(batch, sites, teacher, heads, aim.weights, report, aim.weighed, aim.apart))
        if aim.apart:
            report.listen_to_scale(loss)
        return loss

    def _sites(self, batch: Batch, wanted: Iterable[str]) -> dict[str, Tensor]:
        assert self.student is not None and batch.student is not None and self.adapter is not None
        return capture(self.student, self.adapter, batch.student, wanted)

    def score(self, inputs: PassInputs) -> Tensor:
        """From the sites of both models to the loss."""
        hidden = inputs.student["hidden.last"] if inputs.student else inputs.teacher["hidden.last"]
        loss, *values = self.vocabulary(hidden, inputs=inputs)
        of_tokens: dict[str, dict[str, Tensor]] = {term.name: {} for term in self.terms}
        for (name, value_name), value in zip(inputs.value_names, values, strict=True):
            of_tokens[name][value_name] = value
        parts = [loss]
        for term in self.terms:
            step = inputs.with_views(term)
            step.values = of_tokens[term.name]
            found, counts = term.loss.finish(step), inputs.counts(term.name)
            sums: Sums = found.sums
            if term.name in inputs.weighed:
                weighed = inputs.weighed[term.name]
                sums = weighed_sums(term.name, found, weighed.of_term)
                inputs.report.watch(f"{term.name}/token_weight", weighed.weights.values)
                if weighed.weights.temperatures is not None:
                    inputs.report.watch(f"{term.name}/token_temperature", weighed.weights.temperatures)
            inputs.report.take(term.name, sums, {**step.watched.watched, **found.watched}, counts)
            part = weighted_sum(sums, inputs.weights[term.name], counts)
            if part is not None:
                parts.append(part)
        return torch.stack(parts).sum() if len(parts) > 1 else loss


class _BySlot(nn.ModuleDict):
    """Losses under the names of their slots, which may be those of a module's own methods (`forward`, say)."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        assert module is not None
        self._modules[name] = module


def teacher_sites(terms: Sequence[LossTerm]) -> frozenset[str]:
    """Everything that the losses want of the teacher; its last state is always there, for its head."""
    return frozenset({"hidden.last"}).union(*(term.teacher_sites for term in terms))


def student_sites(terms: Sequence[LossTerm]) -> frozenset[str]:
    """Everything that the losses want of the student's forward pass."""
    return frozenset({"hidden.last"}).union(*(term.needs.student for term in terms)) - {HEAD_WEIGHT}


def statistics_of(terms: Sequence[LossTerm]) -> frozenset[Role]:
    """The models whose sites some loss takes statistics of."""
    return frozenset[Role]().union(*(term.loss.statistics_of for term in terms))


@torch.no_grad()
def statistics(
    terms: Sequence[LossTerm], batch: Batch, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """(term, name) -> what the losses that ask for statistics sum up over this batch, in float64.

    `student`: its sites, or nothing where no loss asks for them.
    """
    inputs = PassInputs(batch, student, teacher, {}, {}, Report())
    return {
        (term.name, name): value.double()
        for term in terms
        if term.loss.statistics_of
        for name, value in term.loss.statistics(inputs.step(term)).items()
    }


def start_from_statistics(terms: Sequence[LossTerm], sums: Mapping[tuple[str, str], Tensor]) -> None:
    """Hand each loss that asks for statistics its sums over all batches and ranks."""
    for term in terms:
        if term.loss.statistics_of:
            own = {name: value.cpu() for (owner, name), value in sums.items() if owner == term.name}
            term.loss.start_from_statistics(own)


@torch.no_grad()
def start_from_heads(terms: Sequence[LossTerm], heads: Mapping[Role, Head], gather: Gather = already_whole) -> None:
    """Show each loss the whole heads that it declares. Every rank comes here with the same terms."""
    for term in terms:
        declared = {"student": term.needs.student, "teacher": term.needs.teacher}
        shown = {name: head for name, head in heads.items() if HEAD_WEIGHT in declared[name]}
        if shown:
            with gather([head.weight for head in shown.values()]):
                term.loss.start_from_heads({name: head.rows.detach() for name, head in shown.items()})
