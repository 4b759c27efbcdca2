"""Token weights: AdaKD for a given share, and SE-KD's most uncertain tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from golden_divergences import Weighing, compare
from golden_files import INDEPENDENT, Golden, NotUnderstood, Pair, configuration

from kdzoo_adakd import Adaptive
from kdzoo_divergences import ForwardKL, ReverseKL
from kdzoo_top_share import TopShare

DIVERGENCES = {"fkd": ForwardKL, "rkd": ReverseKL, "forward": ForwardKL, "reverse": ReverseKL}


def adakd(golden: Golden) -> Iterator[Pair]:
    tempering = {"temperature_base", "temperature_scale", "temperature_direction"}
    given = configuration(golden, known={"rule", "loss_fn", "selection_ratio", *tempering})
    if given["rule"] != "hellinger":
        raise NotUnderstood(f"rule '{given['rule']}': not here")
    params = {
        "temperature": given["temperature_base"],
        "temperature_scale": given["temperature_scale"],
        "direction": "direct" if given["temperature_direction"] else "inverse",
    }
    share = torch.tensor(given["selection_ratio"], dtype=torch.float64)
    weighing: Weighing = {"kd": (Adaptive, params, {"share": share})}
    yield from compare(golden, {"kd": (DIVERGENCES[given["loss_fn"]], {}, 1.0)}, weighing=weighing)


def se_kd(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"k_percent", "temperature", "kd_objective"})
    params = {"temperature": given["temperature"], "square_temperature": True}
    weighing: Weighing = {"kd": (TopShare, {"share": given["k_percent"] / 100}, {})}
    yield from compare(golden, {"kd": (DIVERGENCES[given["kd_objective"]], params, 1.0)}, weighing=weighing)


COVERED = {f"{INDEPENDENT}: adakd": adakd, f"{INDEPENDENT}: se_kd": se_kd}
