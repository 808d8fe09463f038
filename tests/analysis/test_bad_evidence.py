"""Bad input of the engine: each is named with rule, value and fix, and the other claims are still judged."""

from __future__ import annotations

import math

import pytest

from analysis import verdicts
from analysis.load import load_campaigns
from analysis.verdicts import judge_campaign
from experiments.harness.claims import Claim, LogLogSlope, Proportion, Rate, Region, RelativeReduction
from experiments.harness.record import write_record

LOSS = RelativeReduction("eval_loss", {"arm": "ema"}, {"arm": "raw"})
GOOD = RelativeReduction("other_loss", {"arm": "ema"}, {"arm": "raw"})
STEPS = [round(10 ** (3 + i / 5)) for i in range(11)]


def claim_of(estimand, region=None, name="under-test"):
    return Claim(name, "Так говорят", "ema", "seed 003", estimand, region or Region(low=-1.0))


def arms(ema, raw, metric="eval_loss", **conditions):
    return [{"metric": metric, "arm": a, "value": v, **conditions} for a, v in (("ema", ema), ("raw", raw))]


def good(seed):
    return arms(1.9 - 0.01 * seed, 2.0, "other_loss")


@pytest.fixture
def judge(make_record, tmp_path):
    """Judge one claim, and a sound one beside it, on trials whose observations are given seed by seed."""

    def run(claim, *of_seed, alone=False):
        records = [
            make_record(seed=seed, observations=[*rows, *([] if alone else good(seed))])
            for seed, rows in enumerate(of_seed)
        ]
        for record in records:
            write_record(tmp_path, record)
        (campaign,), problems = load_campaigns(tmp_path)
        assert problems == []
        verdict, *beside = judge_campaign([claim] if alone else [claim, claim_of(GOOD, name="sound")], campaign)
        assert alone or beside[0].outcome == "confirmed", beside[0].reason
        return verdict

    return run


def test_a_record_without_a_condition_that_the_estimand_needs(judge):
    unmarked = [{k: v for k, v in row.items() if k != "arm"} for row in arms(1.5, 2.0)]
    verdict = judge(claim_of(LOSS), arms(1.9, 2.0), arms(1.8, 2.0), arms(1.85, 2.0), unmarked)
    assert verdict.outcome == "insufficient" and verdict.interval is None
    assert "every trial that a claim is about must record what it needs (arm), but trial" in verdict.reason
    assert "(seed 3) has no row that matches; correct the experiment" in verdict.reason


def test_a_condition_that_no_record_has(judge):
    split = RelativeReduction("eval_loss", {"arm": "ema"}, {"arm": "raw"}, {"splt": "test"})
    verdict = judge(claim_of(split), *[arms(1.9, 2.0, split="test")] * 3)
    assert verdict.outcome == "insufficient"
    assert "unknown column 'splt'; did you mean split" in verdict.reason


def test_one_seed_only(make_record, tmp_path):
    write_record(tmp_path, make_record(observations=arms(1.9, 2.0)))
    (verdict,) = judge_campaign([claim_of(LOSS)], load_campaigns(tmp_path)[0][0])
    assert verdict.outcome == "insufficient"
    assert verdict.reason == "an interval needs at least 2 seeds, got 1; run more seeds"


def test_arms_with_different_seeds(judge):
    verdict = judge(claim_of(LOSS), arms(1.9, 2.0), arms(1.8, 2.0), arms(1.7, 2.0)[:1])
    assert verdict.outcome == "insufficient"
    assert "paired within seed, but control {arm=raw} lacks seed 2; run what is missing" in verdict.reason


def test_zero_variance(judge):
    verdict = judge(claim_of(LOSS), arms(1.9, 2.0), arms(1.9, 2.0), arms(1.9, 2.0))
    assert verdict.outcome == "insufficient"
    assert "all 3 seeds gave 0.05 up to rounding: no variance" in verdict.reason
    assert "check that the seed reaches the training" in verdict.reason


def test_zero_variance_behind_rounding_errors_decides_nothing(judge):
    verdict = judge(claim_of(LOSS), *[arms(raw * 0.98, raw) for raw in (1.9, 2.0, 2.1)])
    assert verdict.outcome == "insufficient" and "no variance" in verdict.reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite(judge, value):
    verdict = judge(claim_of(LOSS), arms(1.9, 2.0), arms(value, 2.0), arms(1.7, 2.0))
    assert verdict.outcome == "insufficient"
    assert f"values must be finite, got {value} for treatment {{arm=ema}} (seed 1, step 100)" in verdict.reason
    assert "must be recorded as diverged" in verdict.reason


def test_constant_observations_in_a_slope_fit(judge):
    slope = LogLogSlope("error", {"arm": "mean"}, min_forgetting=None)
    falling = [{"metric": "error", "arm": "mean", "step": s, "value": 3 / s} for s in STEPS]
    constant = [{**row, "value": 0.25} for row in falling]
    verdict = judge(claim_of(slope, Region(-1.1, -0.9)), falling, constant, falling)
    assert verdict.outcome == "insufficient"
    assert "values that vary over the steps, got exactly 0.25 at all 6 steps of a decade" in verdict.reason
    assert "in seed 1; check that the metric is measured anew at each step" in verdict.reason


def test_of_two_claims_with_one_id_neither_is_judged_and_the_others_are(make_record, tmp_path):
    for seed in range(3):
        write_record(tmp_path, make_record(seed=seed, observations=[*arms(1.9 - 0.01 * seed, 2.0), *good(seed)]))
    (campaign,), _ = load_campaigns(tmp_path)
    claims = [claim_of(LOSS), claim_of(LOSS, Region(low=0.5)), claim_of(GOOD, name="sound")]
    *twins, sound = judge_campaign(claims, campaign)
    for twin in twins:
        assert (twin.outcome, twin.interval) == ("insufficient", None)
        assert twin.reason == "a claim id must be unique, but under-test is taken by 2 claims; rename all but one"
    assert sound.outcome == "confirmed"


@pytest.mark.parametrize(("region", "needed"), [(None, 4), (Region(low=0.05), 9)], ids=["decided", "undecided"])
def test_few_seeds_for_the_estimand(judge, monkeypatch, region, needed):
    """Mean 0.1, sd 0.05, edge 0.05: n seeds decide if t(0.9875, n − 1) < √n; 2.841 > 2.828 at 8, 2.752 < 3 at 9."""
    monkeypatch.setattr(verdicts, "MIN_SEEDS", 4)
    rows = [arms(1.9, 2.0), arms(1.8, 2.0), arms(1.7, 2.0)]
    verdict = judge(claim_of(LOSS, region), *rows, alone=True)
    assert verdict.outcome == "insufficient" and verdict.interval is not None
    assert "a mean of 3 seeds is not judged" in verdict.reason
    assert "(verdict_calibration): it needs at least 4; run 1 more" in verdict.reason
    assert verdict.seeds_needed == needed


def detections(*values):
    return [[{"metric": "detected", "value": float(value)}] for value in values]


def test_a_rate_is_judged_by_its_exact_interval(judge):
    verdict = judge(claim_of(Rate("detected"), Region(low=0.5)), *detections(*[1] * 8), alone=True)
    # All of 8: the lower limit is 0.025^(1/8) = 0.631.
    assert (verdict.outcome, verdict.estimate) == ("confirmed", 1.0)
    assert verdict.interval == pytest.approx((0.025 ** (1 / 8), 1.0))
    assert (verdict.p_sign_flip, verdict.simultaneous_alpha) == (None, 0.05)


def test_an_undecided_rate_says_how_many_trials_would_decide(judge):
    verdict = judge(claim_of(Rate("detected"), Region(low=0.5)), *detections(1, 1, 1), alone=True)
    assert (verdict.outcome, verdict.seeds_needed) == ("insufficient", 6)
    assert "6 trials would decide at the observed rate" in verdict.reason


def test_a_proportion_is_judged_by_its_attempts(judge):
    rows = [{"metric": "hits", "value": 30}, {"metric": "tries", "value": 1000}]
    verdict = judge(claim_of(Proportion("hits", "tries"), Region(high=0.05)), rows, alone=True)
    assert verdict.outcome == "confirmed" and verdict.estimate == 0.03


def test_an_undecided_proportion_asks_for_no_number_of_trials(judge):
    """Its attempts are no trials, so that none can be told."""
    rows = [{"metric": "hits", "value": 1}, {"metric": "tries", "value": 2}]
    verdict = judge(claim_of(Proportion("hits", "tries"), Region(low=0.4)), rows, alone=True)
    assert (verdict.outcome, verdict.seeds_needed) == ("insufficient", None)
    assert "would decide" not in verdict.reason


@pytest.mark.parametrize(("margin", "outcome"), [(0.01, "confirmed"), (0.001, "insufficient")])
def test_an_equivalence_needs_the_interval_inside_both_edges(judge, margin, outcome):
    rows = [arms(2.0 * (1 - g), 2.0) for g in (0.001, 0.0, -0.001, 0.002)]
    assert judge(claim_of(LOSS, Region(-margin, margin)), *rows, alone=True).outcome == outcome
