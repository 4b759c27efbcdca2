"""What the teacher finds likeliest, and in which order: KDFlow's functions, and the ranking of NMT-KD."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from golden_divergences import compare
from golden_files import INDEPENDENT, Golden, NotUnderstood, Pair, configuration

from kdzoo_ranking import Ranking, Top1CE

OF_OTHERS = {"skew_lambda", "jsd_beta", "adaptive_kl_alpha", "reduction"}
"""What KDFlow passes to every function, and these do not read."""


def top1_ce(golden: Golden) -> Iterator[Pair]:
    given = configuration(golden, known={"temperature", "hr_topk", "hrl_topk", *OF_OTHERS})
    if given.get("reduction", "none") != "none":
        raise NotUnderstood(f"reduction '{given['reduction']}': is over prompts and padding, too")
    yield from compare(golden, {"kd": (Top1CE, {"temperature": given.get("temperature", 1.0)}, 1.0)})


def kdflow(golden: Golden) -> Iterator[Pair]:
    """It reads neither a temperature nor `hrl_topk`."""
    given = configuration(golden, known={"temperature", "hr_topk", "hrl_topk", *OF_OTHERS})
    if given.get("reduction", "none") != "none":
        raise NotUnderstood(f"reduction '{given['reduction']}': is over prompts and padding, too")
    params = {"preset": "kdflow@3a7a21a", "k": given.get("hr_topk", 5)}
    yield from compare(golden, {"kd": (Ranking, params, 1.0)})


def nmt_kd(golden: Golden) -> Iterator[Pair]:
    params = {"preset": "nmt-kd@e01c09c", "k": configuration(golden, known={"topk"}).get("topk", 10)}
    yield from compare(golden, {"kd": (Ranking, params, 1.0)})


COVERED: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    **{f"{source}: compute_top1_ce": top1_ce for source in ("songmzhang/KDFlow", INDEPENDENT)},
    **{f"{source}: compute_hierarchical_ranking_loss": kdflow for source in ("songmzhang/KDFlow", INDEPENDENT)},
    f"{INDEPENDENT}: compute_advanced_kd_loss": nmt_kd,
}
