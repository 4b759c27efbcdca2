"""The small parts of the contract: terms, parameters with presets, and a model that is not there."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from pydantic import ValidationError

from kdzoo import KdzooError, ModelInfo, Params, Terms
from kdzoo.api.models import AbsentModel, ModelPair

# Terms.


def test_terms_are_values_that_the_core_sums_or_sums():
    terms = Terms().add("tokens", torch.tensor([1.0, 2.0])).add("pairs", torch.tensor(4.0), per="pairs")
    assert terms.sums == {"tokens": (torch.tensor(3.0), "tokens"), "pairs": (torch.tensor(4.0), "pairs")}
    assert Terms().add("grid", torch.ones(2, 3)).sums["grid"][0] == 6
    assert Terms().add("none", torch.zeros(0)).sums["none"][0] == 0


def test_the_sum_of_values_carries_their_gradient():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(Terms().add("x", values).sums["x"][0], values)
    assert gradient.tolist() == [1, 1]


def test_a_term_is_added_once():
    with pytest.raises(AssertionError, match=r"^term 'x' was added twice$"):
        Terms().add("x", torch.zeros(1)).add("x", torch.zeros(1))


def test_watched_values_are_sums_and_counts_without_gradient():
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    terms = Terms().watch("mean", values, 2).watch("share", torch.tensor([True, False]), torch.tensor([True, True]))
    assert terms.watched["mean"] == (torch.tensor(4.0), torch.tensor(2.0))
    assert not terms.watched["mean"][0].requires_grad
    assert [int(number) for number in terms.watched["share"]] == [1, 2]


# Presets.


class Released(Params):
    presets = {"v1": {"scale": 2.0, "norm": "l2"}, "v2": {"scale": 3.0}}  # noqa: RUF012

    preset: Literal["v1", "v2"] | None = None
    scale: float = 1.0
    norm: Literal["none", "l2"] = "none"


def test_a_preset_gives_its_parameters():
    assert Released(preset="v1") == Released(preset="v1", scale=2.0, norm="l2")
    assert (Released(preset="v2").scale, Released(preset="v2").norm) == (3.0, "none")
    assert Released().scale == 1.0


def test_what_is_said_beside_a_preset_goes_before_it():
    assert Released.model_validate({"preset": "v1", "scale": 5.0}).scale == 5.0


@pytest.mark.parametrize("preset", ["v3", 1, None, ["v1"], {}])
def test_what_is_no_preset_is_left_to_the_schema(preset):
    if preset is None:
        assert Released(preset=preset).scale == 1.0
    else:
        with pytest.raises(ValidationError, match="preset"):
            Released.model_validate({"preset": preset})


@pytest.mark.parametrize("given", [{"scael": 1.0}, [], "v1"])
def test_parameters_are_strict(given):
    with pytest.raises(ValidationError):
        Released.model_validate(given)


# A model that is not there.


def test_a_size_of_an_absent_model_is_one_clear_line():
    absent = AbsentModel("student")
    for size in ("width", "vocab_size", "layers", "model_type", "vocabulary"):
        with pytest.raises(KdzooError, match=r"^a loss reads the student's '\w+' in a stage that has no student; use"):
            getattr(absent, size)


def test_a_map_of_entries_that_is_not_declared_is_one_clear_line():
    info = ModelInfo(4, 3, 1, "test")
    pair = ModelPair(info, info, True, None, {"same_text": torch.arange(3)})
    assert pair.entries("same_text").tolist() == [0, 1, 2]
    message = r"^a loss reads the map of entries 'nearest_in_student'; name it under 'entries' in its 'needs'$"
    with pytest.raises(KdzooError, match=message):
        pair.entries("nearest_in_student")


def test_a_vocabulary_that_is_not_declared_is_one_clear_line():
    with pytest.raises(
        KdzooError, match=r"^a loss reads what a vocabulary says; say 'vocabularies=True' in its 'needs'"
    ):
        ModelInfo(4, 3, 1, "test").vocabulary  # noqa: B018
