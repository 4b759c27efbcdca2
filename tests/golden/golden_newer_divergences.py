"""ToDi, TAID, AMiD and CSD: references of the authors' functions, which `make_newer_divergences.py` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from golden_divergences import compare
from golden_files import INDEPENDENT, Golden, Pair, configuration

from kdzoo import ModelInfo, ModelPair
from kdzoo_amid import AMiD
from kdzoo_csd import CSD
from kdzoo_f_divergences import FDivergence
from kdzoo_taid import TAID
from kdzoo_todi import ToDi


def todi(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"kd_temperature", "teacher_temperature", "use_tea_temp"})
    params = {"temperature": given["kd_temperature"]}
    if given.get("use_tea_temp"):
        params["teacher_temperature"] = given["teacher_temperature"]
    yield from compare(golden, {"kd": (ToDi, params, 1.0)})


def taid_loss(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"t"})
    yield from compare(golden, {"kd": (TAID, {"preset": "taid@a062892", "t_start": given["t"]}, 1.0)})


def taid_update(golden: Golden) -> Iterator[Pair]:
    """Where progress is the authors' `global_step / num_train_steps`, t is theirs."""
    given = configuration(golden, known={"t_start", "t_end", "alpha", "beta", "disable_adaptive"})
    adaptive = not given.pop("disable_adaptive")
    params = TAID.Params.model_validate({**given, "adaptive": adaptive})
    side, found = ModelInfo(1, 1, 1, "recorded"), []
    loss = TAID(params, ModelPair(side, side, True, None), {}).double()
    loss.t.fill_(params.t_start)  # which was rounded to float32
    for step, value in enumerate(golden["losses"]):
        loss.after_step({"taid": float(value)}, step / len(golden["losses"]))
        found.append(loss.t.clone())
    yield Pair(("t",), torch.stack(found), golden.tensor("t"))


SIDES = {
    "pr": ("teacher", "forward_kl"),
    "rp": ("teacher", "reverse_kl"),
    "qr": ("student", "forward_kl"),
    "rq": ("student", "reverse_kl"),
}


def amid(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"amid_div_name", "amid_div_order", "amid_alpha", "amid_lam"})
    side, divergence = SIDES[given["amid_div_order"]]
    params: dict[str, Any] = {"alpha": given["amid_alpha"], "teacher_weight": given["amid_lam"], "side": side}
    params["divergence"] = divergence
    if given["amid_div_name"] == "ab":
        powers = {"divergence_alpha": 0.2, "divergence_beta": 0.7}
        if divergence == "reverse_kl":
            powers = {"divergence_alpha": 0.7, "divergence_beta": 0.2}
        params |= {"divergence": "alpha_beta", **powers}
    yield from compare(golden, {"kd": (AMiD, params, 1.0)})


HALF = 0.5
"""The authors' gradient is half of that of the formula."""


def csd(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"temp"})
    yield from compare(golden, {"kd": (CSD, {"temperature": given["temp"]}, HALF)})


LETTERS = {"U": "uniform", "S": "student", "T": "teacher"}


def csd_weighting(golden: Golden) -> Iterator[Pair]:
    first, second = (LETTERS[letter] for letter in configuration(golden, known={"type"})["type"])
    yield from compare(golden, {"kd": (CSD, {"first_weight": first, "second_weight": second}, HALF)})


def csd_mix(golden: Golden) -> Iterator[Pair]:
    share = configuration(golden, known={"alpha"})["alpha"]
    params = {"first_weight": "mixture", "second_weight": "mixture", "teacher_share": share}
    yield from compare(golden, {"kd": (CSD, params, HALF)})


def jeffrey(golden: Golden) -> Iterator[Pair]:
    configuration(golden, known=set())
    yield from compare(golden, {"kd": (FDivergence, {"generator": "jeffreys"}, 1.0)})


COVERED = {
    f"{INDEPENDENT}: compute_ToDi": todi,
    f"{INDEPENDENT}: TAID.compute_loss": taid_loss,
    f"{INDEPENDENT}: TAID.update_t": taid_update,
    f"{INDEPENDENT}: amid": amid,
    f"{INDEPENDENT}: csd": csd,
    f"{INDEPENDENT}: jeffrey": jeffrey,
    f"{INDEPENDENT}: csd_weighting_function": csd_weighting,
    f"{INDEPENDENT}: CSD_TS_mix.forward": csd_mix,
}
