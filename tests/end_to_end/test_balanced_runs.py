"""Weights that follow gradients, in a run: what they promise, and that no split changes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import TINY, Run, run, run_on_two_ranks, sets

pytestmark = pytest.mark.slow

EVERY = 4
COMMON = ("evaluation.sets=null", "stages.distill.steps=9", f"stages.distill.gradients_every={EVERY}")
SETTINGS = {how: (*COMMON, f"stages.distill.balance={how}") for how in ("gradient", "pcgrad")}
SLOTS = ("sft", "dskd", "residual")


@pytest.fixture(scope="module")
def alone(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDZOO_CACHE", str(warm))
        folder = tmp_path_factory.mktemp("alone")
        return {how: run(folder / how, *sets(*settings)) for how, settings in SETTINGS.items()}


def weights(step: dict[str, float]) -> list[float]:
    return [step[f"{slot}/balanced_weight"] for slot in SLOTS]


def test_gradients_are_in_proportion_to_the_weights_once_they_are_measured(alone: dict[str, Run]) -> None:
    steps = alone["gradient"].lines()
    given = weights(steps[0])
    assert sum(weights(steps[-1])) == pytest.approx(sum(given))
    assert weights(steps[1]) == weights(steps[EVERY]) != given, "they are kept from measurement to measurement"
    measured = steps[0]
    norms = [measured[f"{slot}/gradient_at_state"] / weight for slot, weight in zip(SLOTS, given, strict=True)]
    balanced = [weight * norm / share for weight, norm, share in zip(weights(steps[1]), norms, given, strict=True)]
    assert balanced == pytest.approx([balanced[0]] * len(SLOTS), rel=1e-5)


def test_what_points_against_each_other_is_weighed_more_and_nothing_less(alone: dict[str, Run]) -> None:
    steps = alone["pcgrad"].lines()
    assert all(now >= given - 1e-9 for now, given in zip(weights(steps[-1]), weights(steps[0]), strict=True))


def test_two_ranks_and_accumulation_balance_alike(
    alone: dict[str, Run], warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDZOO_CACHE", str(warm))
    commands = {tmp_path / how: [str(TINY), *sets(*settings)] for how, settings in SETTINGS.items()}
    split = run(tmp_path / "split", *sets(*SETTINGS["gradient"], "stages.distill.micro_batch=2"))
    found = [*run_on_two_ranks(tmp_path, commands).items(), ("gradient", split)]
    for how, other in found:
        for ours, theirs in zip(alone[how].lines(), other.lines(), strict=True):
            assert weights(theirs) == pytest.approx(weights(ours), rel=1e-3)
