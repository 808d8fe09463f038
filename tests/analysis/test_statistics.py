"""Intervals, tests and sample sizes: hand-worked cases, simulated coverage, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import (
    CannotEstimate,
    alpha_of_mean,
    attempts_needed,
    binomial_interval,
    bonferroni,
    exact_range,
    mean_interval,
    nearest_edge,
    seeds_needed,
    sign_flip_p,
    t_interval,
    varies,
)
from experiments.harness.claims import Region


def test_mean_interval_by_hand():
    # values 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half-width 4.302653 / √3 = 2.484138
    estimate = mean_interval([1.0, 2.0, 3.0], alpha=0.05)
    assert (estimate.value, estimate.sd, estimate.n) == (2.0, 1.0, 3)
    assert (estimate.low, estimate.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)


def test_a_smaller_alpha_widens_the_interval():
    # t(0.995, 2) = 9.924843, half-width 5.730111
    estimate = mean_interval([1.0, 2.0, 3.0], alpha=0.01)
    assert estimate.high - estimate.value == pytest.approx(5.730111, abs=1e-6)


def test_mean_interval_needs_two_seeds():
    with pytest.raises(CannotEstimate, match="at least 2 seeds, got 1; run more seeds"):
        mean_interval([0.3], alpha=0.05)
    with pytest.raises(CannotEstimate, match="at least 2 seeds, got 0"):
        mean_interval([], alpha=0.05)


@pytest.mark.parametrize(
    ("value", "advice"), [(0.1, "that the seed reaches the training"), (0.0, "that what the arms differ in reaches")]
)
def test_mean_interval_needs_variance(value, advice):
    with pytest.raises(CannotEstimate, match=f"all 3 seeds gave {value:g} up to rounding: no variance .* {advice}"):
        mean_interval([value] * 3, alpha=0.05)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1])
def test_mean_interval_refuses_an_alpha_outside_0_1(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got"):
        mean_interval([1.0, 2.0], alpha=alpha)


def _intervals(mean: float, alpha: float, n: int = 5, repeats: int = 2000) -> np.ndarray:
    samples = np.random.default_rng(20240229).normal(mean, 0.7, size=(repeats, n))
    estimates = [mean_interval(sample, alpha) for sample in samples]
    return np.array([(estimate.low, estimate.high) for estimate in estimates])


def _binomial_bounds(p: float, repeats: int = 2000) -> tuple[float, float]:
    low, high = stats.binom.interval(0.999, repeats, p)
    return float(low), float(high)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_simulated_coverage_is_nominal(alpha):
    low, high = _intervals(mean=0.3, alpha=alpha).T
    fewest, most = _binomial_bounds(1 - alpha)
    assert fewest <= np.count_nonzero((low <= 0.3) & (high >= 0.3)) <= most


def test_simulated_false_verdicts_at_the_edge_of_a_region():
    # True mean exactly on the edge of [0.3, ∞): either verdict is wrong with probability alpha / 2, together alpha.
    low, high = _intervals(mean=0.3, alpha=0.1).T
    confirmed, refuted = np.count_nonzero(low >= 0.3), np.count_nonzero(high < 0.3)
    assert confirmed + refuted <= _binomial_bounds(0.1)[1]
    for wrong in (confirmed, refuted):
        fewest, most = _binomial_bounds(0.05)
        assert fewest <= wrong <= most


def test_simulated_simultaneous_coverage_over_four_claims():
    # Four intervals at alpha / 4 each: all four cover with probability at least 1 - alpha.
    alpha, m = 0.1, 4
    samples = np.random.default_rng(7).normal(0.0, 1.0, size=(500, m, 5))
    share = bonferroni(alpha, m)
    covered = 0
    for sample in samples:
        estimates = [mean_interval(values, share) for values in sample]
        covered += all(estimate.low <= 0 <= estimate.high for estimate in estimates)
    assert covered >= stats.binom.ppf(0.0005, len(samples), 1 - alpha)


def test_exact_range_is_the_range_over_trials():
    estimate = exact_range([0.4, 0.6, 0.5])
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == pytest.approx((0.5, 0.4, 0.6, 3))
    assert estimate.sd is None


def test_exact_range_of_equal_values_is_that_value_exactly():
    estimate = exact_range([0.1, 0.1, 0.1])
    assert (estimate.low, estimate.value, estimate.high) == (0.1, 0.1, 0.1)


def test_exact_range_needs_a_trial():
    with pytest.raises(CannotEstimate, match="at least 1 trial, got 0"):
        exact_range([])


def test_sign_flip_by_hand():
    # All four differences positive: only the observed signs and their mirror image are as extreme, p = 2 / 2⁴.
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4], null=0.0) == pytest.approx(2 / 16)
    # Against 0.15 the differences are -0.05, 0.05, 0.15, 0.25, sum 0.4. Of 16 sign patterns the sums ≥ 0.4 are 0.5
    # (all plus), and 0.4 twice (either 0.05 negative): 3, and 3 in the other tail.
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4], null=0.15) == pytest.approx(6 / 16)


def test_sign_flip_is_symmetric_around_the_null():
    values = np.array([0.3, -0.1, 0.25, 0.4, 0.05])
    assert sign_flip_p(values, 0.0) == pytest.approx(sign_flip_p(-values, 0.0))
    assert sign_flip_p(values + 5, 5.0) == pytest.approx(sign_flip_p(values, 0.0))
    assert sign_flip_p([-1.0, 1.0], 0.0) == pytest.approx(1.0)


def test_sign_flip_is_repeatable_beyond_enumeration():
    values = np.random.default_rng(1).normal(0.4, 1.0, size=25)
    p = sign_flip_p(values, 0.0)
    assert p == sign_flip_p(values, 0.0)
    assert p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, abs=0.02)


def test_bonferroni():
    assert bonferroni(0.05, 10) == pytest.approx(0.005)
    assert bonferroni(0.05, 1) == 0.05
    with pytest.raises(ValueError, match="m must be at least 1 interval, got 0"):
        bonferroni(0.05, 0)


def test_a_mean_has_half_of_its_share():
    assert alpha_of_mean(0.05, 10) == pytest.approx(0.0025)


@pytest.mark.parametrize(
    ("region", "value", "edge"),
    [
        (Region(low=0.01), 5.0, 0.01),
        (Region(high=-1.0), 5.0, -1.0),
        (Region(-1.0, 2.0), 0.4, -1.0),
        (Region(-1.0, 2.0), 0.6, 2.0),
        (Region(), 0.6, None),
    ],
)
def test_nearest_edge(region, value, edge):
    assert nearest_edge(region, value) == edge


def test_seeds_needed_by_hand():
    # Mean 2, sd 1, edge 1: half-width t(0.975, n - 1) / √n must be below 1. n = 6: 2.5706 / 2.4495 = 1.049;
    # n = 7: 2.4469 / 2.6458 = 0.925. The same on either side of an edge.
    assert seeds_needed([1.0, 2.0, 3.0], Region(low=1.0), alpha=0.05) == 7
    assert seeds_needed([1.0, 2.0, 3.0], Region(high=1.0), alpha=0.05) == 7
    assert seeds_needed([1.0, 2.0, 3.0], Region(1.0, 100.0), alpha=0.05) == 7


def test_seeds_needed_has_a_limit():
    # Mean 2, sd 1: 200 seeds give 1.97196 / √200 = 0.13944.
    assert seeds_needed([1.0, 2.0, 3.0], Region(low=2 - 0.1395), alpha=0.05) == 200
    assert seeds_needed([1.0, 2.0, 3.0], Region(low=2 - 0.1394), alpha=0.05) is None
    assert seeds_needed([1.0, 2.0, 3.0], Region(low=2.0), alpha=0.05) is None
    assert seeds_needed([1.0, 2.0, 3.0], Region(), alpha=0.05) is None
    assert seeds_needed([-1e9, 1e9], Region(low=math.pi), alpha=0.05) is None


def test_seeds_needed_needs_a_spread():
    with pytest.raises(CannotEstimate, match="at least 2 seeds"):
        seeds_needed([1.0], Region(low=0.0), alpha=0.05)


def test_many_intervals_at_once_are_those_of_each():
    samples = np.random.default_rng(3).normal(size=(50, 4))
    low, high = t_interval(samples, 0.05)
    for i, sample in enumerate(samples):
        one = mean_interval(sample, 0.05)
        assert (low[i], high[i]) == (one.low, one.high)


def test_rounding_errors_are_no_variance():
    raw = np.array([1.9, 2.0, 2.1])
    gains = (raw - raw * 0.98) / raw
    assert len(set(gains)) > 1, "the case that matters: equal outcomes that differ in the last digits"
    assert not varies(gains)
    with pytest.raises(CannotEstimate, match="no variance"):
        mean_interval(gains, 0.05)
    assert not varies(np.array([0.0, 1e-16, -1e-16])), "no gain at all, but for rounding"
    assert varies(np.array([0.02, 0.02 + 1e-9]))
    assert varies(np.array([[0.0, 1.0], [5.0, 5.0]])).tolist() == [True, False]


def test_binomial_interval_by_hand():
    # 0 of 10: the upper limit solves (1 - p)¹⁰ = 0.025, p = 1 - 0.025^0.1; the lower one is 0. 10 of 10 is its mirror.
    none, all_ = binomial_interval(0, 10, 0.05), binomial_interval(10, 10, 0.05)
    assert (none.low, none.value, none.n, none.sd) == (0.0, 0.0, 10, None)
    assert none.high == pytest.approx(1 - 0.025**0.1)
    assert (all_.low, all_.high) == pytest.approx((0.025**0.1, 1.0))
    with pytest.raises(CannotEstimate, match="at least 1 attempt, got 0"):
        binomial_interval(0, 0, 0.05)


def test_attempts_needed_by_hand():
    # All succeed, edge 0.5: the lower limit 0.025^(1/n) exceeds 0.5 from n = 6 on (0.025^(1/5) = 0.478, 0.541).
    # None succeeds: the same from the other side.
    all_, none, half = (binomial_interval(successes, 2, 0.05) for successes in (2, 0, 1))
    assert attempts_needed(all_, Region(low=0.5), 0.05) == 6
    assert attempts_needed(none, Region(low=0.5), 0.05) == 6
    assert attempts_needed(half, Region(low=0.5), 0.05) is None
    assert attempts_needed(half, Region(), 0.05) is None


def test_attempts_needed_exceed_those_that_did_not_decide():
    # 10 of 20 against an edge of 0.2 at 0.05/13: undecided, though 10 of 19 (the rounding of 9.5) would decide.
    alpha, region = 0.05 / 13, Region(high=0.2)
    pilot, fewer = binomial_interval(10, 20, alpha), binomial_interval(10, 19, alpha)
    assert pilot.low < 0.2 < fewer.low
    needed = attempts_needed(pilot, region, alpha)
    assert needed is not None and needed > 20
    assert binomial_interval(round(needed / 2), needed, alpha).low > 0.2
