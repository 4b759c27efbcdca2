"""Releases of authors' code, by name: parameters that golden files are reproduced with."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from kdzoo import Loss
from kdzoo.plugin.json_schema import json_schema
from kdzoo_abkd import ABKD
from kdzoo_alm import Alm
from kdzoo_divergences import JS, AdaptiveKL, ForwardKL, SkewForwardKL, TotalVariation
from kdzoo_dskd import DSKD
from kdzoo_dskd_v2 import DSKDv2
from kdzoo_multilevel_ot import MultiLevelOT
from kdzoo_uld import ULD

LOSSES = (ABKD, Alm, ForwardKL, JS, SkewForwardKL, AdaptiveKL, TotalVariation, DSKD, DSKDv2, MultiLevelOT, ULD)
EVERY = pytest.mark.parametrize(
    ("loss", "name"), [(loss, name) for loss in LOSSES for name in loss.Params.presets], ids=str
)


@EVERY
def test_a_preset_is_its_parameters_spelt_out(loss, name):
    spelt = loss.Params.presets[name]
    assert loss.Params(preset=name).model_dump() == loss.Params(**spelt).model_dump() | {"preset": name}
    assert loss.Params(preset=name) != loss.Params(preset=None)


@EVERY
def test_what_is_said_beside_a_preset_goes_before_it(loss, name):
    fields = loss.Params.model_fields
    for key in loss.Params.presets[name]:
        assert (
            getattr(loss.Params.model_validate({key: fields[key].default, "preset": name}), key) == fields[key].default
        )


@EVERY
def test_parameters_that_were_resolved_once_stay_as_they_are(loss, name):
    resolved = loss.Params(preset=name)
    assert loss.Params.model_validate(resolved.model_dump()) == resolved


@pytest.mark.parametrize("loss", LOSSES)
def test_the_field_names_the_presets_and_its_text_says_what_they_set(loss: type[Loss]):
    named = {name for branch in get_args(loss.Params.model_fields["preset"].annotation) for name in get_args(branch)}
    assert named == loss.Params.presets.keys()
    text = json_schema(loss.Params)["properties"]["preset"]["description"]
    for name, chosen in loss.Params.presets.items():
        assert f'"{name}": ' in text
        assert all(f"{key} " in text for key in chosen)


def test_a_text_says_values_as_a_recipe_has_them():
    text = json_schema(ULD.Params)["properties"]["preset"]["description"]
    assert text.endswith('"trl@f2cd577, bayesian": align "text".')
    assert '"llm-recipes@ab6e798": skip_teacher_eos false. "dskd@077337a": mean "rows", ' in text


@pytest.mark.parametrize("preset", ["2018cx@0000000", "", ["2018cx@712cfb4"], 3])
def test_an_unknown_preset_is_refused(preset):
    with pytest.raises(ValidationError, match="Input should be '2018cx@712cfb4', '2018cx@d8d298f' or '2018cx@77e32ae'"):
        MultiLevelOT.Params.model_validate({"preset": preset})


def test_what_a_preset_couples_is_declared():
    for release in MultiLevelOT.Params.presets:
        assert MultiLevelOT.needs(MultiLevelOT.Params(preset=release), same_tokens=False).batch_coupled
    assert DSKD.needs(DSKD.Params(preset="dskd@077337a"), same_tokens=False).batch_coupled
