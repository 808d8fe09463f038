"""Inference over seeds: one value per seed → interval, sign-flip test, number of seeds that would decide.

Serves every section of THEORY.md. The unit of replication is the training seed; ``analysis.estimands`` has already
reduced each seed to one value. Intervals therefore cover the variation between training seeds, on the one evaluation
set that was used; they say nothing about other models, data or hardware. ``analysis.hierarchy`` takes test items into
account, ``analysis.planning`` the power of a design.

Intervals of one experiment hold simultaneously by Bonferroni's inequality. Holm's step-down procedure rejects more
hypotheses at the same error rate, but by an order of p-values: it has no intervals, and a verdict is where an interval
lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from analysis.estimands import CannotEstimate, per_seed_values, select
from experiments.harness.claims import Region

__all__ = [
    "CannotEstimate",
    "Estimate",
    "alpha_of_mean",
    "attempts_needed",
    "binomial_interval",
    "bonferroni",
    "exact_range",
    "mean_interval",
    "nearest_edge",
    "per_seed_values",
    "seeds_needed",
    "select",
    "sign_flip_p",
    "t_interval",
    "varies",
]

MAX_SEEDS = 200
MAX_EXACT_SIGN_FLIPS = 20
RESERVE = 2
"""A t-interval has this part of the alpha that is promised: the rest is for outcomes that are not normal."""
ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` replicates and its interval."""

    value: float
    low: float
    high: float
    n: int
    sd: float | None
    """Sample standard deviation over seeds; None for a quantity without sampling error and for a probability."""


def mean_interval(values: npt.ArrayLike, alpha: float) -> Estimate:
    """The mean over seeds and its two-sided ``1 − alpha`` Student-t interval.

    Estimates the expected value over training seeds. Within-seed pairs have already been reduced to one value, so
    this is the paired-t interval. Assumes that the seeds are independent and the values about normal; what becomes of
    its level where they are not is measured by ``verdict_calibration``. ``sign_flip_p`` stands beside it without that
    assumption.

    Raises:
        CannotEstimate: with fewer than two values, or with values that are all equal.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        raise CannotEstimate(f"an interval needs at least 2 seeds, got {sample.size}; run more seeds")
    if not varies(sample):
        advice = "use a finer measurement, or check that the seed reaches the training"
        if abs(sample[0]) <= ROUNDING:
            advice = "check that what the arms differ in reaches the training; an exact value is judged with Exact"
        raise CannotEstimate(
            f"all {sample.size} seeds gave {sample[0]:g} up to rounding: no variance to estimate an interval from; "
            f"{advice}"
        )
    low, high = t_interval(sample, alpha)
    return Estimate(float(sample.mean()), float(low), float(high), sample.size, float(sample.std(ddof=1)))


def varies(samples: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether values along the last axis differ by more than rounding errors, from which no interval follows.

    Estimands are dimensionless and of losses in double precision: equal outcomes of different magnitude give values
    that differ in their last digits, and an interval as wide as these would decide anything.
    """
    largest = np.abs(samples).max(axis=-1)
    return np.asarray(np.ptp(samples, axis=-1) > ROUNDING * np.maximum(1.0, largest))


def t_interval(
    samples: npt.NDArray[np.float64], alpha: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Bounds of the two-sided ``1 − alpha`` Student-t interval of the mean along the last axis, shape (…, n) → (…)."""
    interval = stats.ttest_1samp(samples, popmean=0.0, axis=-1).confidence_interval(confidence_level=1 - alpha)
    return np.asarray(interval.low), np.asarray(interval.high)


def binomial_interval(successes: int, attempts: int, alpha: float) -> Estimate:
    """The share of successes and its exact two-sided ``1 − alpha`` interval (Clopper & Pearson 1934).

    Assumes independent attempts with one probability of success. It covers at least ``1 − alpha`` at any number of
    attempts, and more where they are few.

    Raises:
        CannotEstimate: without an attempt.
    """
    if attempts < 1:
        raise CannotEstimate(f"a probability needs at least 1 attempt, got {attempts}; run the trials that count it")
    interval = stats.binomtest(successes, attempts).proportion_ci(confidence_level=1 - alpha, method="exact")
    return Estimate(successes / attempts, float(interval.low), float(interval.high), attempts, sd=None)


def attempts_needed(pilot: Estimate, region: Region, alpha: float) -> int | None:
    """The smallest number of attempts (at most 200) that would decide at an observed share of successes.

    As ``seeds_needed``, it takes the observed share for the true one. A share of fewer attempts is rounded to whole
    successes and may seem to decide, so it counts only above the attempts of the pilot.

    Args:
        pilot: the share of successes so far, which decides nothing yet.
        region: where the claim is true.
        alpha: error rate of the two-sided interval.

    Returns:
        The total number of attempts, those already made included; None if 200 do not suffice.
    """
    share = pilot.value
    edge = nearest_edge(region, share)
    if edge is None:
        return None
    for attempts in range(pilot.n + 1, MAX_SEEDS + 1):
        interval = binomial_interval(round(share * attempts), attempts, alpha)
        if interval.high < edge or interval.low > edge:
            return attempts
    return None


def exact_range(values: npt.ArrayLike) -> Estimate:
    """The mean and the range over all trials of a quantity without sampling error; it has no confidence level.

    Raises:
        CannotEstimate: if there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise CannotEstimate("a range needs at least 1 trial, got 0; run the trials that record both metrics")
    low, high = float(sample.min()), float(sample.max())
    middle = low if low == high else float(sample.mean())
    return Estimate(middle, low, high, sample.size, sd=None)


def sign_flip_p(values: npt.ArrayLike, null: float) -> float:
    """Two-sided sign-flip (permutation) test that the mean over seeds equals ``null``.

    Assumes that the seeds are independent and, under the null hypothesis, symmetric around ``null``; not normality.
    Exact by enumeration up to 20 seeds, by 99 999 seeded resamples beyond. The smallest possible p of n seeds is
    ``2 / 2**n``: with 5 seeds 0.0625, whatever the effect. Not adjusted for multiplicity.
    """
    differences = np.asarray(values, dtype=np.float64) - null
    exact = differences.size <= MAX_EXACT_SIGN_FLIPS
    result = stats.permutation_test(
        (differences,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**MAX_EXACT_SIGN_FLIPS if exact else 99_999,
        batch=2**14,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def bonferroni(alpha: float, m: int) -> float:
    """The alpha of each of ``m`` intervals that hold simultaneously with error rate at most ``alpha``.

    Assumes nothing about the dependence between them.
    """
    if m < 1:
        raise ValueError(f"m must be at least 1 interval, got {m}")
    return alpha / m


def alpha_of_mean(alpha: float, m: int) -> float:
    """The alpha of each of ``m`` t-intervals, so that at most ``alpha`` of all verdicts together are false.

    Deviations from normality weigh the more, the farther out in the tail an interval ends: at ``alpha / m`` a whole
    ``alpha / m`` of false verdicts is reached by slightly skewed outcomes, and half of it keeps the promise
    (``verdict_calibration``). The exact interval of a probability needs no such reserve.
    """
    return bonferroni(alpha, m) / RESERVE


def nearest_edge(region: Region, value: float) -> float | None:
    """The finite edge of a region closest to a value, or None if both are infinite."""
    edges = [edge for edge in (region.low, region.high) if math.isfinite(edge)]
    return min(edges, key=lambda edge: abs(edge - value), default=None)


def seeds_needed(values: npt.ArrayLike, region: Region, alpha: float) -> int | None:
    """The smallest number of seeds (at most 200) whose t-interval would lie clear of the region's nearest edge.

    Takes the observed mean and standard deviation for the true ones, as a pilot study does: the interval of the real
    run decides with a probability of only about one half at this n, and the figure itself is uncertain.

    Returns:
        The total number of seeds, those already run included; None if 200 do not suffice.

    Raises:
        CannotEstimate: with fewer than two values, or with values that are all equal.
    """
    pilot = mean_interval(values, alpha)
    edge = nearest_edge(region, pilot.value)
    if edge is None:
        return None
    sd = np.std(np.asarray(values, dtype=np.float64), ddof=1)
    n = np.arange(2, MAX_SEEDS + 1)
    half_widths = stats.t.ppf(1 - alpha / 2, n - 1) * sd / np.sqrt(n)
    enough = n[half_widths < abs(pilot.value - edge)]
    return int(enough[0]) if enough.size else None
