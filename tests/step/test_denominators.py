"""Denominators are data: however a step is split, loss and gradient are those of the whole."""

from __future__ import annotations

import pytest
import torch
from settings import (
    D,
    Losses,
    Setting,
    Truncated,
    Worst,
    make_paired_setting,
    make_setting,
)

from kdzoo.api.batch import Batch
from kdzoo_cross_entropy import CrossEntropy
from kdzoo_divergences import ForwardKL
from kdzoo_dskd import DSKD
from kdzoo_residual import Residual

LOW = 3


def artifacts() -> dict[str, dict[str, torch.Tensor]]:
    return {"projectors": {"teacher_to_low.weight": torch.randn(LOW, D, generator=torch.Generator().manual_seed(1))}}


MAKE = {
    "cross_entropy": lambda setting: setting.make(CrossEntropy),
    "forward_kl": lambda setting: setting.make(ForwardKL, temperature=2.0),
    "dskd": lambda setting: setting.make(DSKD),
    "dskd by attention": lambda setting: setting.make(DSKD, alignment="attention"),
    "residual": lambda setting: setting.make(Residual, artifacts(), width=LOW),
    "pairs": lambda setting: setting.make(Truncated),
    "sequences": lambda setting: setting.make(Worst),
}


@pytest.mark.parametrize("parts", [([0], [1], [2]), ([0, 1], [2]), ([1], [0, 2])])
@pytest.mark.parametrize(
    ("name", "same_tokens"),
    [(name, True) for name in MAKE] + [(name, False) for name in MAKE if name != "forward_kl"],
)
def test_micro_batches_add_up_to_the_whole(name, same_tokens, parts):
    setting = make_setting() if same_tokens else make_paired_setting()
    losses: Losses = {"sft": (setting.make(CrossEntropy), 0.5), "kd": (MAKE[name](setting), 0.5)}
    whole = setting.run(losses)
    setting.forget(losses)
    total = torch.zeros((), dtype=torch.float64)
    terms: dict[str, torch.Tensor] = {}
    for sequences in parts:
        loss, inputs = setting.part(sequences).score(losses)
        loss.backward()
        total += loss.detach()
        for term, value in inputs.report.terms.items():
            terms[term] = terms.get(term, 0) + value
    torch.testing.assert_close(total, whole.loss)
    assert terms.keys() == whole.terms.keys()
    for term, value in whole.terms.items():
        torch.testing.assert_close(terms[term], value)
    gradients = setting.gradients(losses)
    assert gradients.keys() == whole.gradients.keys()
    for leaf, gradient in whole.gradients.items():
        torch.testing.assert_close(gradients[leaf], gradient, msg=lambda m, leaf=leaf: f"{leaf}: {m}")


NONE, SOME = ([0, 0], [2, 3])


@pytest.mark.parametrize("name", ["dskd", "dskd by attention", "residual"])
@pytest.mark.parametrize(
    ("same_tokens", "tokens"),
    [
        (True, (NONE, NONE)),
        (False, (NONE, NONE)),
        (False, (SOME, NONE)),
        (False, (NONE, SOME)),
        (False, ([0, 3], [2, 0])),
    ],
)
def test_a_micro_batch_without_tokens_trains_nothing_and_reports_the_same_terms(name, same_tokens, tokens):
    full = make_setting(same_tokens)
    empty = make_setting(same_tokens, tokens)
    outcomes = {}
    for setting in (full, empty):
        torch.manual_seed(2)
        losses: Losses = {"kd": (MAKE[name](setting), 1.0)}
        outcomes[setting is full] = setting.run(losses)
    found, expected = outcomes[False], outcomes[True]
    assert found.terms.keys() == expected.terms.keys()
    assert found.report.watched.keys() == expected.report.watched.keys()
    assert found.gradients.keys() == expected.gradients.keys()
    assert found.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())
    if tokens == (NONE, NONE):
        assert found.loss == 0
        assert all((gradient == 0).all() for gradient in found.gradients.values())


def test_the_counts_of_a_micro_batch():
    setting: Setting = make_paired_setting()
    batch: Batch = setting.batch
    assert batch.local_counts() == {"tokens": 11, "teacher_tokens": 9, "pairs": 3, "spans": 6, "sequences": 3}
    assert setting.part([0, 1]).batch.local_counts() == {
        "tokens": 5,
        "teacher_tokens": 6,
        "pairs": 2,
        "spans": 4,
        "sequences": 2,
    }
    assert make_setting(tokens=([2, 0], [2, 0])).batch.local_counts()["sequences"] == 1
