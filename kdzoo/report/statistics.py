"""What a difference between two methods is worth: intervals, a test, and what a design could have seen.

Differences are paired. Of set k there is an array [seeds, prompts]: the method's Rouge-L minus its baseline's on the
same prompt with the same training seed, each the mean over decoding seeds. The estimate is the mean over seeds of the
mean over sets of the mean over prompts. `docs/report.md` has the reasons and how often each interval covers the truth.

Arrays may have more dimensions in front, for many experiments at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests

Floats = NDArray[np.float64]

LEVEL = 0.05
"""Two-sided: intervals are of 95 %."""

POWER = 0.8

RESAMPLES = 9999

RESAMPLED_AT_ONCE = 20_000_000
"""Values that the bootstrap holds in memory."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A method minus its baseline."""

    estimate: float
    seeds: int
    within: Interval | None
    """Of these trained students, over prompts; none where a set has one prompt."""
    over: Interval | None
    """Over training seeds and prompts; none with one training seed."""
    p: float | None
    """The level at which `over` just reaches zero."""
    detectable: float | None
    """The smallest true difference that would be found in four of five such comparisons, before any correction."""


def difference(sets: Sequence[Floats]) -> Difference:
    """All that is known of one difference; `sets` are arrays [seeds, prompts]."""
    seeds = sets[0].shape[0]
    estimate = float(np.mean([each.mean() for each in sets]))
    if min(each.shape[1] for each in sets) < 2:
        return Difference(estimate, seeds, None, None, None, None)
    low, high = within(sets)
    inside = Interval(float(low), float(high))
    if seeds < 2:
        return Difference(estimate, seeds, inside, None, None, None)
    spread = spread_of(sets)
    half = float(spread.half_width(LEVEL))
    over = Interval(estimate - half, estimate + half)
    return Difference(estimate, seeds, inside, over, p_value(spread), detectable(spread))


# These students, other prompts


def within(sets: Sequence[Floats], resamples: int = RESAMPLES) -> tuple[Floats, Floats]:
    """The paired bootstrap: prompts are drawn anew within each set, the same for all seeds. Always the same draws."""
    by_prompt = [each.mean(axis=-2) for each in sets]
    if all(np.ptp(each) == 0 for each in by_prompt):
        constant = _mean_of_sets(*by_prompt)
        return constant, constant
    found = stats.bootstrap(
        by_prompt,
        _mean_of_sets,
        n_resamples=resamples,
        batch=max(1, RESAMPLED_AT_ONCE // max(each.size for each in by_prompt)),
        vectorized=True,
        axis=-1,
        confidence_level=1 - LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return found.confidence_interval.low, found.confidence_interval.high


def _mean_of_sets(*sets: Floats, axis: int = -1) -> Floats:
    return np.mean([each.mean(axis=axis) for each in sets], axis=0)


# Other students, other prompts


@dataclass(frozen=True)
class Spread:
    """The variance of an estimate, in the parts of a crossed design: seeds by prompts."""

    estimate: Floats
    seeds: Floats
    """Between the seeds' own estimates: effects of seeds, and what no effect explains."""
    prompts: Floats
    """Between prompts, averaged over seeds: effects of prompts, and what no effect explains."""
    rest: Floats
    """What neither seeds nor prompts explain; in both of the others."""
    seeds_df: int
    prompts_df: Floats

    @property
    def prompts_alone(self) -> Floats:
        return np.maximum(self.prompts - self.rest, 0.0)

    @property
    def variance(self) -> Floats:
        return np.maximum(self.seeds + self.prompts_alone, self.prompts)

    def half_width(self, level: float) -> Floats:
        """Each part with the quantile of its own degrees of freedom (Howe 1974; Graybill and Wang 1980).

        Two degrees of freedom are too few for Satterthwaite's: where the seeds happen to agree, it forgets that three
        of them say little. Never narrower than the interval of prompts alone.
        """
        seeds, prompts = stats.t.isf(level / 2, self.seeds_df), stats.t.isf(level / 2, self.prompts_df)
        both = np.sqrt(seeds**2 * self.seeds + prompts**2 * self.prompts_alone)
        return np.maximum(both, prompts * np.sqrt(self.prompts))


def spread_of(sets: Sequence[Floats]) -> Spread:
    """Two seeds and two prompts at least. Seeds are the same over sets, prompts are not."""
    count, seeds = len(sets), sets[0].shape[-2]
    of_seeds = np.mean([each.mean(axis=-1) for each in sets], axis=0)
    prompts, rest, squares = [], [], []
    for each in sets:
        number = each.shape[-1]
        own = each.mean(axis=-2).var(axis=-1, ddof=1) / number / count**2
        unexplained = (
            each
            - each.mean(axis=-1, keepdims=True)
            - each.mean(axis=-2, keepdims=True)
            + each.mean(axis=(-2, -1), keepdims=True)
        )
        error = np.square(unexplained).sum(axis=(-2, -1)) / ((seeds - 1) * (number - 1))
        prompts.append(own)
        squares.append(own**2 / (number - 1))
        rest.append(error / (seeds * number) / count**2)
    all_prompts, all_squares = np.sum(prompts, axis=0), np.sum(squares, axis=0)
    most = float(sum(each.shape[-1] - 1 for each in sets))
    with np.errstate(invalid="ignore", divide="ignore"):
        prompts_df = np.where(all_squares > 0, all_prompts**2 / all_squares, most)
    return Spread(
        estimate=of_seeds.mean(axis=-1),
        seeds=of_seeds.var(axis=-1, ddof=1) / seeds,
        prompts=all_prompts,
        rest=np.sum(rest, axis=0),
        seeds_df=seeds - 1,
        prompts_df=prompts_df,
    )


SMALLEST_P = 1e-12


def p_value(spread: Spread) -> float:
    """The level at which the interval of one experiment just reaches zero."""
    size = abs(float(spread.estimate))

    def beyond(log_level: float) -> float:
        return float(spread.half_width(float(np.exp(log_level)))) - size

    if size == 0.0:
        return 1.0
    if beyond(np.log(SMALLEST_P)) <= 0:
        return SMALLEST_P
    return float(np.exp(brentq(beyond, np.log(SMALLEST_P), 0.0)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for all of one family."""
    return [float(p) for p in multipletests(p_values, alpha=LEVEL, method="holm")[1]] if p_values else []


MANY = 1e6
"""Degrees of freedom at which Student's t is the normal distribution."""


def detectable(spread: Spread) -> float:
    """The t test whose critical value is that of the interval, asked for its power."""
    error = float(np.sqrt(spread.variance))
    if error == 0.0:
        return 0.0
    critical = float(spread.half_width(LEVEL)) / error

    def beyond(log_df: float) -> float:
        return float(stats.t.isf(LEVEL / 2, np.exp(log_df))) - critical

    few, many = np.log(spread.seeds_df), np.log(MANY)
    df = float(np.exp(brentq(beyond, few, many))) if beyond(few) > 0 > beyond(many) else spread.seeds_df
    return standard_errors_found(df) * error


def standard_errors_found(df: float) -> float:
    """How many standard errors a true difference must have, that a t test finds it with `POWER`.

    On its own side of zero: the other one's share is nothing here, and not a number at some points. The search stays
    near the answer for the same reason.
    """
    critical = float(stats.t.isf(LEVEL / 2, df))
    least, most = critical, 1.5 * critical + 1.0
    return float(brentq(lambda size: float(stats.nct.sf(critical, df, size)) - POWER, least, most))


# Of numbers, one per training seed


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's t over seeds; none for a single one."""
    if len(values) < 2:
        return None
    half = float(stats.t.isf(LEVEL / 2, len(values) - 1)) * float(stats.sem(values))
    mean = float(np.mean(values))
    return Interval(mean - half, mean + half)


def deviation(values: Sequence[float] | NDArray[Any]) -> float | None:
    """The standard deviation of a sample; none for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
