"""What one micro-batch brings to the vocabulary pass, and what each loss sees of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from kdzoo.api.batch import Batch, Reduction
from kdzoo.api.head import HEAD_WEIGHT, Head
from kdzoo.api.models import Role
from kdzoo.api.step import Step
from kdzoo.api.view import View
from kdzoo.step.loss_term import LossTerm
from kdzoo.step.report import Report
from kdzoo.step.weighing import Weighed


@dataclass
class PassInputs:
    """Everything one micro-batch brings to the pass, and what the pass leaves for the losses to finish."""

    batch: Batch
    student: Mapping[str, Tensor]
    """Sites of the student."""
    teacher: Mapping[str, Tensor]
    """Sites of the teacher, without gradient."""
    heads: Mapping[Role, Head]
    """"student" and "teacher", as far as the batch has them."""
    weights: Mapping[str, float]
    """Loss term -> weight at this optimizer step."""
    report: Report
    weighed: Mapping[str, Weighed] = field(default_factory=dict)
    """Loss term -> what its tokens weigh, where they do not all count as much."""
    apart: bool = False
    """Whether each term's gradient at the student's last state is kept apart, in the report."""
    steps: dict[str, Step] = field(default_factory=dict)
    """Loss term -> what it sees. Filled by the pass."""
    value_names: list[tuple[str, str]] = field(default_factory=list)
    """(term, name) of every per-token tensor that the pass returns after the loss. Filled by the pass."""

    def views(self, term: LossTerm, heads: bool = False) -> tuple[View, View]:
        """The term's views; where one model is absent, its view holds no site. `heads`: whether they are whole."""
        student, teacher = self.batch.student, self.batch.teacher
        ours = self.student
        if self.apart and ours:
            heard = {"hidden.last": None, "hidden.last@all": None if student is None else student.positions}
            listen = self.report.listen
            ours = {**ours, **{site: listen(term.name, ours[site], heard[site]) for site in heard.keys() & ours.keys()}}
        read = term.needs.teacher - {HEAD_WEIGHT}
        theirs = {site: self.teacher[term.stands_for(site)] for site in read} if self.teacher else {}
        if heads:
            whole = {name: {HEAD_WEIGHT: head.rows.detach()} for name, head in self.heads.items()}
            ours, theirs = {**ours, **whole.get("student", {})}, {**theirs, **whole.get("teacher", {})}
        scored = self.batch.scored
        return (
            View(scored if student is None else student, ours, term.name, term.needs.student),
            View(scored if teacher is None else teacher, theirs, term.name, term.needs.teacher),
        )

    def counts(self, term: str) -> Mapping[Reduction, float]:
        """What the term's sums are divided by."""
        return self.weighed[term].counts if term in self.weighed else self.batch.counts

    def step(self, term: LossTerm) -> Step:
        """What the term sees before anything is known."""
        return Step(self.batch, *self.views(term))

    def with_views(self, term: LossTerm, heads: bool = False) -> Step:
        """The term's step with fresh views; what it watches is kept with the step itself."""
        student, teacher = self.views(term, heads)
        return replace(self.steps[term.name], student=student, teacher=teacher)
