from __future__ import annotations

import pytest

from kdzoo.errors import RecipeError
from kdzoo.run.losses import valid_params
from kdzoo_alm import Alm
from kdzoo_amid import AMiD
from kdzoo_taid import TAID


@pytest.mark.parametrize(
    ("loss", "given", "line"),
    [
        (
            AMiD,
            {"teacher_weight": 1.0},
            "losses.kd.params: with teacher_weight 1.0 the mixture is the teacher itself; take another weight or side",
        ),
        (
            TAID,
            {"t_start": 0.9, "t_end": 0.5},
            "losses.kd.params: t_start 0.9 is above t_end 0.5, but t never falls; take a larger t_end",
        ),
        (
            Alm,
            {"order": 1.0},
            "losses.kd.params.order: the limit 1 is a KL divergence; take 'reverse_binary_kl' or 'binary_ce'",
        ),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused_in_one_line(loss, given, line):
    with pytest.raises(RecipeError) as refused:
        valid_params("losses.kd", loss, given)
    assert str(refused.value) == line
