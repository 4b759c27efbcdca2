"""Views, packed and padded tokens, and what is computed over the tokens of one sequence."""

from __future__ import annotations

import pytest
import torch
from settings import make_side

from kdzoo import KdzooError, View, ops

TOKENS = [3, 0, 1, 4]


@pytest.fixture
def side():
    torch.manual_seed(0)
    return make_side(TOKENS, 9)


def view(side, *declared: str) -> View:
    sites = {"hidden.last": torch.randn(len(side), 5), "embed.input": torch.randn(len(side), 5)}
    return View(side, sites, "dskd", frozenset(declared))


def test_a_declared_site_is_read(side):
    seen = view(side, "hidden.last")
    assert seen["hidden.last"].shape == (len(side), 5)
    assert seen.read == {"hidden.last"}
    assert len(seen) == len(side)
    assert seen.labels is side.labels and seen.sample is side.sample


def test_an_undeclared_site_is_refused(side):
    with pytest.raises(KdzooError) as caught:
        view(side, "hidden.last")["embed.input"]
    assert str(caught.value) == (
        "dskd: reads the site 'embed.input' that its needs do not declare; declared: hidden.last"
    )


def test_a_misspelt_site_is_refused_with_advice(side):
    with pytest.raises(KdzooError) as caught:
        view(side, "hidden.last", "embed.input")["hidden.lst"]
    assert str(caught.value) == (
        "dskd: reads the site 'hidden.lst' that its needs do not declare, did you mean 'hidden.last'?; "
        "declared: embed.input, hidden.last"
    )


def test_nothing_declared_is_said(side):
    with pytest.raises(KdzooError, match=r"declared: nothing$"):
        view(side)["hidden.last"]


def test_padded_tokens(side):
    padded, mask = view(side, "hidden.last").padded("hidden.last")
    assert padded.shape == (4, 4, 5)
    assert mask.tolist() == [[i < n for i in range(4)] for n in TOKENS]
    assert (padded[~mask] == 0).all()


def test_padding_and_back_is_the_identity_and_so_is_its_gradient(side):
    values = torch.randn(len(side), 5, 2, requires_grad=True)
    padded, mask = ops.pad_tokens(values, side)
    back = ops.unpad_tokens(padded, side)
    assert torch.equal(back, values)
    assert torch.equal(padded[mask], values)
    (gradient,) = torch.autograd.grad(back.square().sum(), values)
    assert torch.equal(gradient, 2 * values)


@pytest.mark.parametrize("tokens", [[0], [0, 0, 0]])
def test_no_tokens_are_padded_to_nothing(tokens):
    side = make_side(tokens, 9)
    padded, mask = ops.pad_tokens(torch.zeros(0, 5), side)
    assert padded.shape == (len(tokens), 0, 5) and mask.shape == (len(tokens), 0)
    assert ops.unpad_tokens(padded, side).shape == (0, 5)


def test_the_mean_of_each_sequence(side):
    values = torch.randn(len(side), dtype=torch.float64)
    keep = torch.tensor([True, False, True, False, True, True, True, False])
    mean, kept = ops.sequence_mean(values, side), ops.sequence_mean(values, side, keep)
    for b in side.sample.unique():
        tokens = side.sample == b
        assert torch.allclose(mean[tokens], values[tokens].mean())
        expected = values[tokens & keep].mean() if (tokens & keep).any() else torch.tensor(0.0)
        assert torch.allclose(kept[tokens], expected.double())


def test_values_outside_the_mask_do_not_matter(side):
    values = torch.ones(len(side), requires_grad=True)
    spoilt = torch.where(torch.arange(len(side)) == 0, torch.inf, values)
    keep = torch.arange(len(side)) > 0
    mean = ops.sequence_mean(spoilt, side, keep)
    assert (mean == 1).all()
    assert torch.autograd.grad(mean.sum(), values)[0].isfinite().all()


def test_one_standard_deviation_for_all_entries_of_a_sequence(side):
    values = 3 * torch.randn(len(side), 5, dtype=torch.float64) + 7
    std = ops.sequence_std(values, side)
    assert std.shape == (len(side), 1)
    for b in side.sample.unique():
        tokens = side.sample == b
        assert torch.allclose(std[tokens], values[tokens].std())


def test_means_and_deviations_of_no_tokens():
    side = make_side([0, 0], 9)
    assert ops.sequence_mean(torch.zeros(0), side).shape == (0,)
    assert ops.sequence_std(torch.zeros(0, 5), side).shape == (0, 1)
