"""Intervals cover the truth as often as they say; the test errs as often as it says. Small examples by hand.

A share of `count` simulations has the standard error sqrt(share (1 - share) / count): tolerances are four of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from kdzoo.report.statistics import (
    LEVEL,
    Interval,
    Spread,
    detectable,
    deviation,
    difference,
    holm,
    mean_interval,
    p_value,
    spread_of,
    standard_errors_found,
    within,
)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class World:
    """How differences come about: normal effects of seeds (over all sets, and in each), of prompts, and noise."""

    seeds: int
    sizes: tuple[int, ...]
    seed_effect: float = 0.0
    seed_in_set: float = 0.0
    prompt_effect: float = 12.0
    noise: float = 12.0
    skewed: bool = False
    """Most prompts show no difference, and most of the others one of the same sign."""

    def draw(self, count: int, rng: np.random.Generator, effect: float = 0.0) -> list[np.ndarray]:
        own = rng.normal(effect, self.seed_effect, (count, self.seeds, 1))
        return [
            own
            + rng.normal(0, self.seed_in_set, (count, self.seeds, 1))
            + self._of_prompts(self.prompt_effect, (count, 1, size), rng)
            + self._of_prompts(self.noise, (count, self.seeds, size), rng)
            for size in self.sizes
        ]

    def _of_prompts(self, scale: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        if not self.skewed:
            return rng.normal(0, scale, shape)
        sign = np.where(rng.random(shape) < 0.75, 1.0, -1.0)
        values = (rng.random(shape) < 0.3) * sign * rng.exponential(scale * 1.3, shape)
        return values - 0.3 * 0.5 * scale * 1.3


WORLDS = {
    "3 seeds, no seed effect": World(3, (60, 60, 60)),
    "3 seeds, moderate": World(3, (60, 60, 60), 1.0, 1.0),
    "3 seeds, dominating": World(3, (60, 60, 60), 6.0, 2.0),
    "3 seeds, only noise": World(3, (80, 25), 0.0, 0.0, prompt_effect=0.0),
    "3 seeds, prompts shared": World(3, (80, 25), 1.0, 0.0, prompt_effect=18.0, noise=4.0),
    "3 seeds, skewed": World(3, (80, 25, 50), 1.0, 1.0, skewed=True),
    "3 seeds, skewed, dominating": World(3, (60, 60), 6.0, 2.0, skewed=True),
    "5 seeds, no seed effect": World(5, (60, 60, 60)),
    "5 seeds, moderate": World(5, (80, 25), 1.0, 1.0),
    "5 seeds, dominating": World(5, (60, 60, 60), 6.0, 2.0),
    "5 seeds, skewed": World(5, (80, 25, 50), 1.0, 1.0, skewed=True),
}
each_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())


def tolerance(share: float, count: int) -> float:
    return 4 * sqrt(share * (1 - share) / count)


def covered(world: World, count: int, seed: int = 1) -> float:
    spread = spread_of(world.draw(count, np.random.default_rng(seed), effect=2.0))
    return float(np.mean(np.abs(spread.estimate - 2.0) <= spread.half_width(LEVEL)))


def covered_within(world: World, count: int, resamples: int) -> float:
    """The truth here is the drawn students' own: their seeds' effects, and the mean over all prompts."""
    rng = np.random.default_rng(2)
    fixed = rng.normal(0, world.seed_effect, (count, world.seeds, 1))
    prompts = World(world.seeds, world.sizes, 0, 0, world.prompt_effect, world.noise, world.skewed)
    low, high = within([fixed + each for each in prompts.draw(count, rng)], resamples)
    truth = fixed.mean(axis=(1, 2))
    return float(np.mean((low <= truth) & (truth <= high)))


@each_world
def test_the_interval_over_seeds_and_prompts_covers_the_truth(world):
    assert covered(world, 800) >= 0.95 - 0.01 - tolerance(0.95, 800)


@each_world
def test_the_interval_of_these_students_covers_their_truth(world):
    assert abs(covered_within(world, 300, 400) - 0.95) <= 0.02 + tolerance(0.95, 300)


@pytest.mark.slow
@each_world
def test_both_intervals_cover_the_truth_in_many_simulations(world):
    assert 0.95 - 0.01 - tolerance(0.95, 20_000) <= covered(world, 20_000) <= 0.995
    assert abs(covered_within(world, 2000, 1000) - 0.95) <= 0.015 + tolerance(0.95, 2000)


@pytest.mark.parametrize("name", ["3 seeds, dominating", "3 seeds, moderate", "5 seeds, no seed effect"])
def test_the_test_errs_in_one_of_twenty_at_most(name):
    count = 600
    worlds = WORLDS[name].draw(count, np.random.default_rng(3))
    found = [p_value(spread_of([each[i] for each in worlds])) < LEVEL for i in range(count)]
    assert np.mean(found) <= LEVEL + tolerance(LEVEL, count)


METHODS = 6


def err_in_a_family(world: World, count: int) -> float:
    """Methods that are worth their baseline, which they all share: half of every variance is its own.

    Holm rejects something where the smallest p is under 5 % of the number of methods.
    """
    parts = ("seed_effect", "seed_in_set", "prompt_effect", "noise")
    half = replace(world, **{part: getattr(world, part) / sqrt(2) for part in parts})
    baseline, *methods = (half.draw(count, np.random.default_rng(seed)) for seed in range(METHODS + 1))
    spreads = [spread_of([own - base for own, base in zip(each, baseline, strict=True)]) for each in methods]
    wrong = [np.abs(spread.estimate) > spread.half_width(LEVEL / METHODS) for spread in spreads]
    return float(np.mean(np.any(wrong, axis=0)))


@each_world
def test_holm_errs_in_one_of_twenty_families_at_most(world):
    assert err_in_a_family(world, 400) <= LEVEL + tolerance(LEVEL, 400)


@pytest.mark.slow
@each_world
def test_holm_errs_in_one_of_twenty_families_in_many_simulations(world):
    assert err_in_a_family(world, 5000) <= LEVEL + tolerance(LEVEL, 5000)


def power_at_what_is_detectable(world: World, count: int) -> float:
    """The share that finds a difference of the size that the design says, in the root mean square of what it says."""
    rng = np.random.default_rng(5)
    before = world.draw(150, rng)
    said = np.sqrt(np.mean([detectable(spread_of([each[i] for each in before])) ** 2 for i in range(150)]))
    spread = spread_of(world.draw(count, rng, effect=float(said)))
    return float(np.mean(np.abs(spread.estimate) > spread.half_width(LEVEL)))


@each_world
def test_a_detectable_difference_is_found_in_four_of_five_or_more(world):
    """In more where the interval is wider than it must be. What 150 designs say is itself uncertain by 3 to 4 %."""
    assert 0.8 - 0.05 - tolerance(0.8, 800) <= power_at_what_is_detectable(world, 800) <= 0.97


# By hand


def test_a_small_example_by_hand():
    sets = [np.array([[1.0, 3.0], [3.0, 5.0]]), np.array([[0.0, 0.0, 3.0], [2.0, 2.0, 5.0]])]
    spread = spread_of(sets)
    assert spread.estimate == pytest.approx((2 + 4 + 1 + 3) / 4)
    assert spread.seeds == pytest.approx(2.0 / 2)  # the seeds' means are 1.5 and 3.5: variance 2, of two
    # Over seeds: 2, 4 (variance 2) and 1, 1, 4 (variance 3); by prompts, and a quarter as each set is half of the mean.
    assert spread.prompts == pytest.approx((2 / 2 + 3 / 3) / 4)
    assert spread.rest == pytest.approx(0.0)  # every seed moves every prompt alike
    seeds, prompts = stats.t.ppf(0.975, 1), stats.t.ppf(0.975, 0.5**2 / (0.25**2 / 1 + 0.25**2 / 2))
    assert spread.half_width(LEVEL) == pytest.approx(sqrt(seeds**2 * 1.0 + prompts**2 * 0.5))


def test_without_effects_of_prompts_it_is_the_t_test_of_the_seeds():
    spread = Spread(np.float64(2.0), np.float64(0.25), np.float64(0.0), np.float64(0.0), 2, np.float64(100.0))
    assert p_value(spread) == pytest.approx(2 * stats.t.sf(2.0 / 0.5, 2))
    assert spread.half_width(LEVEL) == pytest.approx(stats.t.isf(0.025, 2) * 0.5)


def test_without_effects_of_seeds_it_is_the_t_test_of_the_prompts():
    spread = Spread(np.float64(1.0), np.float64(0.0), np.float64(0.25), np.float64(0.0), 2, np.float64(100.0))
    assert p_value(spread) == pytest.approx(2 * stats.t.sf(1.0 / 0.5, 100))
    # The textbook's: (t_0.975 + t_0.8) standard errors, nearly.
    assert detectable(spread) == pytest.approx((1.984 + 0.845) * 0.5, rel=0.01)


def test_p_is_the_level_at_which_the_interval_reaches_zero():
    sets = WORLDS["3 seeds, moderate"].draw(1, np.random.default_rng(6), effect=3.0)
    spread = spread_of([each[0] for each in sets])
    assert spread.half_width(p_value(spread)) == pytest.approx(abs(spread.estimate))


def test_the_interval_over_seeds_is_never_narrower_than_that_of_prompts():
    sets = WORLDS["3 seeds, only noise"].draw(200, np.random.default_rng(7))
    spread = spread_of(sets)
    assert (spread.half_width(LEVEL) >= stats.t.isf(0.025, spread.prompts_df) * np.sqrt(spread.prompts)).all()


def test_the_same_differences_give_the_same_numbers():
    sets = [each[0] for each in WORLDS["3 seeds, skewed"].draw(1, np.random.default_rng(8))]
    assert difference(sets) == difference([each.copy() for each in sets])


def test_one_training_seed_has_no_interval_over_seeds():
    found = difference([np.array([[1.0, 2.0, 3.0]])])
    assert (found.over, found.p, found.detectable) == (None, None, None)
    assert found.within is not None and found.within.low < 2.0 < found.within.high


def test_one_prompt_has_no_interval_at_all():
    found = difference([np.array([[1.0], [2.0]])])
    assert found.estimate == 1.5
    assert found.within is None and found.over is None


def test_two_methods_with_the_same_answers_do_not_differ():
    found = difference([np.zeros((3, 20)), np.zeros((3, 10))])
    assert found.within == found.over == Interval(0.0, 0.0)
    assert (found.p, found.detectable) == (1.0, 0.0)


def test_a_difference_without_any_spread_is_certain():
    found = difference([np.ones((3, 20))])
    assert found.over == Interval(1.0, 1.0)
    assert found.p is not None and found.p < 1e-9


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_interval_of_a_mean_over_seeds_by_hand():
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 * 1.0 / sqrt(3)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)
    assert mean_interval([1.0]) is None
    assert deviation([1.0, 3.0]) == pytest.approx(sqrt(2))
    assert deviation([1.0]) is None


@pytest.mark.parametrize("df", [1.0, 2.0, 4.0, 30.0, 1e5])
def test_the_detectable_difference_is_found_as_often_as_it_says(df):
    """By simulation of the t test itself, down to one degree of freedom, where two training seeds leave us."""
    size, generator = standard_errors_found(df), np.random.default_rng(5)
    drawn = (generator.standard_normal(40_000) + size) / np.sqrt(generator.chisquare(df, 40_000) / df)
    assert np.mean(np.abs(drawn) > stats.t.isf(LEVEL / 2, df)) == pytest.approx(0.8, abs=0.008)
