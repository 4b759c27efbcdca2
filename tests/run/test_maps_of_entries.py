"""Maps between two vocabularies, at the start of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from kdzoo import Needs, RecipeError
from kdzoo.run.losses import ResolvedLosses, check_entries


def losses(*needs: Needs) -> ResolvedLosses:
    terms = [
        SimpleNamespace(name=f"kd{i}", needs=need, entry=SimpleNamespace(use="mine")) for i, need in enumerate(needs)
    ]
    return ResolvedLosses(cast(Any, tuple(terms)))


def test_a_loss_whose_map_has_no_partner_is_refused_in_one_line():
    reads = Needs(entries=frozenset({"same_text", "nearest_in_student"}))
    maps: dict[Any, torch.Tensor] = {"same_text": torch.full((4,), -1), "nearest_in_student": torch.arange(4)}
    with pytest.raises(RecipeError) as error:
        check_entries(losses(Needs(), reads), maps)
    assert str(error.value) == (
        "losses.kd1: 'mine' maps the entries of one vocabulary to those of the other, but none of these two has a "
        "partner; take another loss, or another pair"
    )


def test_one_partner_is_enough():
    maps: dict[Any, torch.Tensor] = {"same_text": torch.tensor([-1, 0])}
    check_entries(losses(Needs(), Needs(entries=frozenset({"same_text"}))), maps)
