"""Hidden states of chosen blocks, compared directly: FitNets, TinyBERT's and DistilBERT's hidden loss, and linear CKA.

h is the student's state after a block, t the teacher's after the block that belongs to it, D the teacher's width. With
two tokenizers a token is a span that covers the same text, and its state the mean over the tokens of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdzoo import Loss, Needs, RecipeError, Register, Step, Terms, hookimpl, ops


class Hidden(Loss):
    """Each state of the student, through a projector where widths differ, becomes the teacher's at the same token."""

    name = "hidden"
    paper = "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, arxiv.org/abs/1412.6550"
    formula = "L = sum over pairs of blocks 1/N sum_i d(W h_i + b, t_i), d mean square, cosine, or 1 - CKA per sequence"
    deviations = (
        "`general_distill.py` of TinyBERT (huawei-noah/Pretrained-Language-Model @ 1bb9b3e) compares every position of "
        "the padded batch, all blocks and the embedding through one projector; here it is the tokens of responses, "
        "chosen blocks, and a projector for each pair.",
        "CKA (Kornblith et al., ICML 2019, arxiv.org/abs/1905.00414) is of all examples, and as a loss (Dasgupta and "
        "Cohn, ICLR 2025, openreview.net/forum?id=IcVSKhVpKu) of a batch's tokens; here it is of one sequence's, so "
        "that neighbours do not count. Of fewer tokens it is nearer to 1.",
    )

    class Params(ops.BlockParams):
        distance: Literal["mse", "relative_mse", "cosine", "cka"] = "mse"
        """"mse": the mean of squares over the D features. "relative_mse": divided by the teacher's mean square in that
        block over training rows, so that blocks and teachers count alike. "cosine": 1 - cos. "cka": 1 - linear CKA of
        each sequence, for any two widths; 0 where a sequence has a single token."""
        projector: Literal["auto", "always", "none"] = "auto"
        """A trained Linear from the student's width to the teacher's, one for each pair of blocks. "auto": where widths
        differ, but for "cka"."""
        start: Literal["random", "least_squares"] = "random"
        """How a projector begins. "least_squares": the best for the untrained student's states on training rows."""

        def projects(self, student: int, teacher: int) -> bool:
            differ = student != teacher and self.distance != "cka"
            return self.projector == "always" or (self.projector == "auto" and differ)

    @classmethod
    def needs(cls, params, same_tokens):
        states = frozenset({"hidden.<block>"})
        return Needs(states, states, aligned=not same_tokens)

    @classmethod
    def needs_of(cls, params, pair):
        mine, its = pair.student.width, pair.teacher.width
        if mine != its and params.projector == "none" and params.distance != "cka":
            raise RecipeError(f"projector: states are {mine} and {its} wide; take 'auto', or the distance 'cka'")
        sites = (frozenset(f"hidden.{block}" for block in side) for side in zip(*params.blocks(pair), strict=True))
        return Needs(*sites, aligned=not pair.same_tokens)

    def build(self, student, teacher, artifacts):
        self.blocks = self.params.blocks(self.pair)
        self.projected = self.params.projects(student.width, teacher.width)
        make = nn.Linear if self.projected else nn.Identity
        self.projectors = nn.ModuleList(make(student.width, teacher.width) for _ in self.blocks)
        if self.params.distance == "relative_mse":
            self.register_buffer("mean_square", torch.ones(len(self.blocks)))

    def states(self, step: Step, pair: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's x, the teacher's states [n, D], and the sequence of each [n], -1 for none."""
        student, teacher = step.student.side, step.teacher.side
        x, y = ops.widened(x), ops.widened(step.teacher[f"hidden.{self.blocks[pair][1]}"])
        return (x, y, student.sample) if self.pair.same_tokens else ops.by_text(student, teacher, x, y)

    @property
    def statistics_of(self):
        if self.projected and self.params.start == "least_squares":
            return frozenset({"student", "teacher"})
        return frozenset({"teacher"} if self.params.distance == "relative_mse" else ())

    def statistics(self, step: Step):
        sums = {}
        for n, (mine, its) in enumerate(self.blocks):
            square = ops.widened(step.teacher[f"hidden.{its}"]).square().mean(-1)
            sums |= {f"{n}.square": square.sum(), f"{n}.count": torch.ones_like(square).sum()}
            if "student" in self.statistics_of:
                x, y, sample = self.states(step, n, step.student[f"hidden.{mine}"])
                gram, cross = ops.regression_sums(x[sample >= 0], y[sample >= 0])
                sums |= {f"{n}.gram": gram, f"{n}.cross": cross}
        return sums

    def start_from_statistics(self, sums):
        for n, projector in enumerate(self.projectors):
            if self.params.distance == "relative_mse":
                self.mean_square[n] = sums[f"{n}.square"] / sums[f"{n}.count"].clamp_min(1)
            if "student" in self.statistics_of:
                weight, bias = ops.best_linear(sums[f"{n}.gram"], sums[f"{n}.cross"])
                projector.load_state_dict({"weight": weight, "bias": bias})

    def finish(self, step: Step) -> Terms:
        terms, per = Terms(), "tokens" if self.pair.same_tokens else "spans"
        for n, (mine, its) in enumerate(self.blocks):
            x, y, sample = self.states(step, n, self.projectors[n](step.student[f"hidden.{mine}"]))
            if self.params.distance == "cka":
                value, there = ops.linear_cka(x, y, sample, step.teacher.side.sequences)
                terms.add(f"{mine}_to_{its}", torch.where(there, 1 - value, 0), per="sequences")
            else:
                terms.add(f"{mine}_to_{its}", torch.where(sample >= 0, self.distance(n, x, y), 0), per)
        return terms

    def distance(self, pair: int, x: Tensor, y: Tensor) -> Tensor:
        """Of states [n, D], per token [n]."""
        if self.params.distance == "cosine":
            return 1 - nn.functional.cosine_similarity(x, y, dim=-1)
        error = (x - y).square().mean(-1)
        return error / self.mean_square[pair] if self.params.distance == "relative_mse" else error


@hookimpl
def register_plugins(register: Register) -> None:
    register(Hidden)
