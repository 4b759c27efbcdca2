"""Each slot's gradient at the student's last state, watched in one backward pass of all slots together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from settings import (
    Crossed,
    D,
    GoldTokens,
    Losses,
    Outcome,
    Setting,
    TestLoss,
    Truncated,
    TruncatedTokens,
    Worst,
    distiller,
    make_paired_setting,
    make_setting,
)
from torch import Tensor

from kdzoo import Needs, NoParams, Step, Terms
from kdzoo.engine.student import merged
from kdzoo.step.report import Report
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL
from kdzoo_dskd import DSKD
from kdzoo_residual import Residual

LOW = 3


class Shrink(GoldTokens):
    """Reads the state outside of the vocabulary pass as well."""

    name = "shrink"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"hidden.last"}))

    def finish(self, step: Step) -> Terms:
        return Terms().add("both", step.values["gold.nll"] * step.student["hidden.last"].square().sum(-1))


class Idle(GoldTokens):
    """Nothing of it reaches the state."""

    name = "idle"

    def finish(self, step: Step) -> Terms:
        return Terms().add("nothing", step.values["gold.nll"].detach())


def make_losses(setting: Setting) -> Losses:
    torch.manual_seed(5)
    artifacts = {"projectors": {"teacher_to_low.weight": torch.randn(LOW, D)}}
    residual = {"width": LOW, "beta_gradient": True, "indicator": "soft"}
    losses: Losses = {
        "sft": (setting.make(CrossEntropy), 0.5),
        "residual": (setting.make(Residual, artifacts, width=LOW), 0.3),
        "no_head": (setting.make(Residual, artifacts, **residual, head_gradient=False), 0.25),
        "dskd": (setting.make(DSKD), 0.4),
        "crossed": (setting.make(Crossed), 0.9),
        "pairs": (setting.make(Truncated), 0.8),
        "pairs_by_token": (setting.make(TruncatedTokens), 1.1),
        "worst": (setting.make(Worst), 0.7),
        "shrink": (setting.make(Shrink), 0.1),
        "wrong_only": (setting.make(CrossEntropy, where="teacher_wrong"), 0.6),
        "idle": (setting.make(Idle), 1.0),
        "off": (setting.make(CrossEntropy), 0.0),
    }
    if not setting.batch.same_tokens:
        return {**losses, "attention": (setting.make(DSKD, alignment="attention"), 0.5)}
    return {**losses, "kl": (setting.make(ForwardKL, temperature=2.0), 0.5)}


def make(same_tokens: bool) -> Setting:
    return make_setting() if same_tokens else make_paired_setting()


def watched(
    setting: Setting, losses: Losses, report: Report, chunk_tokens: int | None = None, scale: float = 1.0
) -> Tensor:
    """One micro-batch forward and backward, as `Distiller.forward` and an engine that scales the loss do it."""
    inputs = setting.inputs(losses)
    inputs.apart, inputs.report = True, report
    loss = distiller(losses, chunk_tokens).score(inputs)
    report.listen_to_scale(loss)
    (loss * scale).backward()
    report.close_gradients(losses)
    return loss.detach()


def norms(report: Report) -> dict[str, float]:
    squares = {one: product for (one, other), product in report.products.items() if one == other}
    return {slot: square.sqrt().item() for slot, square in squares.items()}


def each_alone(setting: Setting, losses: Losses) -> dict[str, Tensor]:
    """The gradient at the state where a slot, with its weight, is all there is [N, S]."""
    zero = torch.zeros_like(setting.hidden)
    return {name: setting.run({name: slot}).gradients.get("hidden", zero) for name, slot in losses.items()}


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
@pytest.mark.parametrize("same_tokens", [True, False])
def test_it_is_the_norm_of_each_slots_own_gradient(same_tokens, chunk_tokens, scale):
    setting = make(same_tokens)
    losses = make_losses(setting)
    alone = each_alone(setting, losses)
    report = Report()
    watched(setting, losses, report, chunk_tokens, scale)
    expected = {name: gradient.norm().item() for name, gradient in alone.items()}
    assert norms(report) == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert all((expected[name] == 0) == (name in ("idle", "off")) for name in losses)


@pytest.mark.parametrize("names", [["sft"], ["residual"], ["dskd"], ["worst"], ["sft", "residual", "dskd"]])
@pytest.mark.parametrize("same_tokens", [True, False])
def test_it_does_not_depend_on_the_other_slots(same_tokens, names):
    setting = make(same_tokens)
    losses = make_losses(setting)
    every, some = Report(), Report()
    watched(setting, losses, every)
    watched(setting, {name: losses[name] for name in names}, some)
    assert norms(some).keys() == set(names)
    for name, norm in norms(some).items():
        assert norm == pytest.approx(norms(every)[name], rel=1e-9)


def test_parts_of_one_slot_are_added_before_the_norm_is_taken():
    setting = make(True)
    losses = {"twice": (setting.make(Shrink), 1.0)}
    gradient = each_alone(setting, losses)["twice"]
    nll = -setting.logits().log_softmax(-1).gather(1, setting.batch.student.labels[:, None])[:, 0]
    by_pass = torch.autograd.grad((nll * setting.hidden.detach().square().sum(-1)).sum(), setting.hidden)[0] / len(nll)
    assert abs((gradient - by_pass).norm() - gradient.norm()) > 1e-3  # both parts are there
    report = Report()
    watched(setting, losses, report)
    assert norms(report)["twice"] == pytest.approx(gradient.norm().item(), rel=1e-9)


class Everywhere(TestLoss):
    """Reads the state at every position."""

    name = "everywhere"

    @classmethod
    def needs(cls, params: NoParams, same_tokens: bool) -> Needs:
        return Needs(student=frozenset({"hidden.last@all"}))

    def finish(self, step: Step) -> Terms:
        return Terms().add("square", step.student["hidden.last@all"].square().sum())


def test_a_state_that_is_read_at_every_position_counts_where_its_tokens_are():
    setting = make(True)
    assert setting.batch.student is not None
    tokens = setting.batch.student.positions
    every = torch.randn(setting.batch.student.input_ids.numel(), setting.hidden.shape[1]).double().requires_grad_()
    losses: Losses = {"all": (setting.make(Everywhere), 0.7), "sft": (setting.make(CrossEntropy), 0.5)}
    inputs = replace(setting, hidden=every[tokens]).inputs(losses)
    inputs.student = {**inputs.student, "hidden.last@all": every}
    inputs.apart = True
    loss = distiller(losses).score(inputs)
    inputs.report.listen_to_scale(loss)
    loss.backward()
    inputs.report.close_gradients(losses)
    expected = 0.7 * 2 * every.detach()[tokens] / len(tokens)
    assert norms(inputs.report)["all"] == pytest.approx(expected.norm().item(), rel=1e-9)


@pytest.mark.parametrize("parts", [([0], [1], [2]), ([1], [0, 2])])
@pytest.mark.parametrize("same_tokens", [True, False])
def test_micro_batches_add_in_squares(same_tokens, parts):
    setting = make(same_tokens)
    losses = make_losses(setting)
    whole, report = Report(), Report()
    watched(setting, losses, whole)
    for sequences in parts:
        watched(setting.part(sequences), losses, report, scale=float(len(parts)))
    # Rows of two micro-batches are not the same tokens, so that squares add up to those of the whole.
    assert norms(report) == pytest.approx(norms(whole), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("chunk_tokens", [3, None])
@pytest.mark.parametrize("same_tokens", [True, False])
def test_asking_changes_neither_loss_nor_gradients(same_tokens, chunk_tokens):
    setting = make(same_tokens)
    losses = make_losses(setting)
    setting.forget(losses)
    loss, inputs = setting.score(losses, chunk_tokens)
    loss.backward()
    plain = Outcome(loss.detach(), setting.gradients(losses), inputs.report)
    assert not plain.report.products
    setting.forget(losses)
    report = Report()
    asked = Outcome(watched(setting, losses, report, chunk_tokens), setting.gradients(losses), report)
    assert torch.equal(asked.loss, plain.loss)
    assert asked.gradients.keys() == plain.gradients.keys()
    asked.assert_close(plain, 1e-14)  # the order in which autograd adds up is its own
    assert asked.terms.keys() == plain.terms.keys()
    assert all(torch.equal(asked.terms[name], plain.terms[name]) for name in plain.terms)


@pytest.mark.parametrize("same_tokens", [True, False])
def test_no_tokens_have_norms_of_zero(same_tokens):
    setting = make_setting(same_tokens, tokens=([0, 0], [0, 0] if same_tokens else [2, 3]))
    losses = {name: slot for name, slot in make_losses(setting).items() if name != "worst"}  # has no value of nothing
    report = Report()
    watched(setting, losses, report)
    assert norms(report) == dict.fromkeys(losses, 0.0)


def test_bfloat16_states_stay_near_float64():
    exact, coarse = (make_setting(dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    found = []
    for setting in (exact, coarse):
        losses = make_losses(setting)
        losses = {name: losses[name] for name in ("sft", "dskd", "worst", "kl")}
        report = Report()
        watched(setting, losses, report)
        found.append(norms(report))
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_what_is_logged_is_the_norm():
    setting = make(True)
    losses = make_losses(setting)
    report = Report()
    watched(setting, losses, report)
    logged = merged(report, torch.device("cpu"))
    for name, norm in norms(report).items():
        assert logged.norms[f"{name}/gradient_at_state"] == pytest.approx(norm)
    assert math.isfinite(sum({**logged.values, **logged.norms}.values()))
