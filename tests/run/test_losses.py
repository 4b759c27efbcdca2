from __future__ import annotations

from types import SimpleNamespace
from typing import cast, get_args

import pytest
import torch

from kdzoo.api.entries import EntryMap
from kdzoo.api.models import ModelInfo, ModelPair, Vocabulary
from kdzoo.api.token_weights import TokenNeeds
from kdzoo.errors import RecipeError
from kdzoo.recipe.model import LossSlot, Plugged
from kdzoo.run.context import RunContext
from kdzoo.run.losses import ResolvedLoss, ResolvedLosses, ResolvedWeights, build_losses, valid_params
from kdzoo_adakd import Adaptive
from kdzoo_alm import Alm
from kdzoo_amid import AMiD
from kdzoo_dskd_v2 import DSKDv2
from kdzoo_hidden import Hidden
from kdzoo_min_ed import MinED
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", [MinED, DSKDv2, TAID, Hidden])
def test_losses_are_built_where_their_stage_runs(loss, precision):
    """ZeRO-3 moves the parameters of what it partitions, and no buffer."""
    model = ModelInfo(16, 11, 2, "test", known_vocabulary=Vocabulary(["a"] * 11, frozenset(), 0))
    partners = torch.arange(11)
    pair = ModelPair(model, model, True, partners, dict.fromkeys(get_args(EntryMap), partners))
    params = loss.Params(distance="relative_mse", projector="always") if loss is Hidden else loss.Params()
    needs = loss.needs_of(params, pair)
    slot = LossSlot(use=loss.name, weights="moving")
    weights = ResolvedWeights("moving", Plugged(use="adaptive"), Adaptive, Adaptive.Params(), TokenNeeds())
    term = ResolvedLoss("kd", slot, loss, params, needs, False, "hidden.last", "hidden.last", weights)
    stage = SimpleNamespace(device=torch.device("meta"), recipe=SimpleNamespace(precision=precision))
    (built,) = build_losses(cast(RunContext, stage), ResolvedLosses((term,)), pair, {}, seed=0)
    state = [*built.loss.parameters(), *built.loss.buffers(), *built.weights.parameters(), *built.weights.buffers()]
    assert {tensor.device.type for tensor in state} == {"meta"}
