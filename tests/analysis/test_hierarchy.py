"""Seeds and items apart: a table worked by hand, simulated coverage, and the outcomes in records."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.hierarchy import seeds_and_items, two_way
from analysis.load import load_campaigns
from analysis.rows import CannotEstimate
from analysis.statistics import mean_interval
from experiments.harness.claims import RelativeReduction
from experiments.harness.record import ExampleOutcome, write_record

REDUCTION = RelativeReduction("eval_loss", {"arm": "ema"}, {"arm": "raw"}, {"split": "test"})


def test_an_additive_table_by_hand():
    # Seeds add -1, 1; items add -2, 0, 2: nothing is left. MS_seeds = 3 · 2 / 1 = 6, MS_items = 2 · 8 / 2 = 8.
    result = two_way(np.add.outer([-1.0, 1.0], [-2.0, 0.0, 2.0]) + 5, alpha=0.05)
    assert result.over_seeds.value == pytest.approx(5.0)
    # √(6 / 6) · t(0.975, 1) = 12.7062; √(8 / 6) · t(0.975, 2) = 1.154701 · 4.302653
    assert result.over_seeds.high - 5 == pytest.approx(12.706205, abs=1e-5)
    assert result.over_items.high - 5 == pytest.approx(4.968275, abs=1e-5)
    # Both: mean square 14, df 14² / (6² / 1 + 8² / 2) = 196 / 68; √(14 / 6) · t(0.975, 2.882)
    assert (result.sd_seeds, result.sd_items, result.sd_rest) == pytest.approx((2**0.5, 2.0, 0.0), abs=1e-9)
    assert result.over_both.high - 5 == pytest.approx((14 / 6) ** 0.5 * stats.t.ppf(0.975, 196 / 68))


def test_a_table_with_an_interaction_by_hand():
    # As above with ±1 in the corners, whose rows and columns sum to 0: MS_rest = 4 / 2 = 2, MS_seeds and MS_items stay.
    table = np.add.outer([-1.0, 1.0], [-2.0, 0.0, 2.0]) + np.outer([1.0, -1.0], [1.0, 0.0, -1.0])
    result = two_way(table, alpha=0.05)
    # (6 - 2) / 3 items, (8 - 2) / 2 seeds; both: 6 + 8 - 2 = 12, df 12² / (6² / 1 + 8² / 2 + 2² / 2) = 144 / 70
    assert (result.sd_seeds, result.sd_items, result.sd_rest) == pytest.approx(((4 / 3) ** 0.5, 3**0.5, 2**0.5))
    assert result.over_both.high == pytest.approx((12 / 6) ** 0.5 * stats.t.ppf(0.975, 144 / 70))


def test_the_interval_over_seeds_is_the_paired_one():
    table = np.random.default_rng(0).normal(size=(4, 9))
    alone, both = mean_interval(table.mean(axis=1), 0.05), two_way(table, 0.05)
    assert (both.over_seeds.low, both.over_seeds.high) == pytest.approx((alone.low, alone.high))
    assert both.over_seeds.sd == pytest.approx(alone.sd)


@pytest.mark.parametrize(("of_seeds", "of_items"), [(1.0, 1.0), (0.2, 2.0), (1.0, 0.0)])
def test_the_interval_over_both_covers_the_mean_of_all_seeds_and_items(of_seeds, of_items):
    rng, covered, repeats = np.random.default_rng(1), 0, 1000
    for _ in range(repeats):
        effects = np.add.outer(of_seeds * rng.normal(size=5), of_items * rng.normal(size=12))
        interval = two_way(effects + rng.normal(size=(5, 12)), 0.05).over_both
        covered += interval.low <= 0 <= interval.high
    assert covered / repeats >= 0.93


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.ones((1, 5)), r"at least 2 seeds and 2 items, got shape \(1, 5\)"),
        (np.ones((3, 4)), "no variance"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), "must be finite"),
    ],
)
def test_a_table_without_two_sources_is_refused(table, message):
    with pytest.raises(CannotEstimate, match=message):
        two_way(table, 0.05)


@pytest.fixture
def campaign(make_record, tmp_path):
    """Three seeds with four documents of unequal length; ``shift`` falsifies the corpus loss."""

    def build(shift=0.0, drop=False, unit="nats/token"):
        rng, tokens = np.random.default_rng(2), np.array([100, 50, 200, 10])
        weights = tokens / tokens.sum() if unit == "nats/token" else np.full(4, 0.25)
        records = []
        for seed in range(3):
            losses = {"raw": rng.normal(3.0, 0.5, 4)}
            losses["ema"] = losses["raw"] * (0.98 + 0.01 * rng.normal(size=4))
            observations = [
                {"arm": arm, "split": "test", "unit": unit, "value": float(v @ weights) + shift * (arm == "ema")}
                for arm, v in losses.items()
            ]
            examples = [
                ExampleOutcome(example=f"doc {i}", arm=arm, metric="eval_loss", value=v[i], tokens=int(tokens[i]))
                for arm, v in losses.items()
                for i in range(4)
                if not (drop and seed == 2 and i == 3)
            ]
            records.append(make_record(seed=seed, observations=observations, examples=examples))
        for record in records:
            write_record(tmp_path, record)
        return load_campaigns(tmp_path)[0][0]

    return build


@pytest.mark.parametrize("unit", ["nats/token", "nats/example"])
def test_items_add_up_to_the_reduction_of_each_seed(campaign, unit):
    from analysis.estimands import per_seed_values

    data = campaign(unit=unit)
    alone = mean_interval(per_seed_values(REDUCTION, data.observations), 0.05)
    result = seeds_and_items(REDUCTION, data, 0.05)
    assert (result.over_seeds.low, result.over_seeds.high) == pytest.approx((alone.low, alone.high))
    assert (result.over_seeds.n, result.over_items.n) == (3, 4)


def test_items_of_another_evaluation_are_refused(campaign):
    with pytest.raises(CannotEstimate, match="must add up to the reduction of each seed"):
        seeds_and_items(REDUCTION, campaign(shift=0.1), 0.05)


def test_items_missing_in_a_seed_are_refused(campaign):
    with pytest.raises(CannotEstimate, match="every seed needs the same items"):
        seeds_and_items(REDUCTION, campaign(drop=True), 0.05)
