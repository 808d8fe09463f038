"""Verdicts: the rule on the region, multiplicity, registration, and what a missing trial costs."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import get_args

import pytest

from analysis.evidence import is_default
from analysis.load import load_campaigns
from analysis.verdicts import MIN_SEEDS, NOT_MEASURED, judge_campaign
from experiments.harness.claims import (
    Claim,
    Estimand,
    Exact,
    ExactRatio,
    Interaction,
    Proportion,
    Rate,
    Region,
    RelativeReduction,
)
from experiments.harness.experiment import load_experiment
from experiments.harness.record import ManipulationCheck, write_record
from experiments.verdict_calibration import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
REDUCTION = RelativeReduction("eval_loss", treatment={"arm": "ema"}, control={"arm": "raw"})
RATIO = ExactRatio("trainable_params", "total_params")


def claim_of(region, estimand=REDUCTION, name="ema-lowers-loss", alpha=0.1):
    """At ``alpha`` 0.1 the interval of a single mean is the usual one of 95 %: half of alpha is held in reserve."""
    return Claim(name, "EMA снижает loss", "ema", "seed 003", estimand, region, alpha)


@pytest.fixture
def campaign(make_record, tmp_path):
    """Write one trial per seed, whose relative reductions are given, and load them as a campaign."""

    def build(reductions, claims=(), n_absent=0, scale="cpu", params=(50, 100), **of_seed):
        registered = {claim.id: claim.digest for claim in claims}
        records = []
        for seed, reduction in enumerate(reductions):
            observations = [
                {"value": 4.0, "arm": "raw", "track": "lm"},
                {"value": 4.0 * (1 - reduction), "arm": "ema", "track": "lm"},
                {"metric": "trainable_params", "value": params[0], "track": "count"},
                {"metric": "total_params", "value": params[1], "track": "count"},
            ]
            arguments = {"observations": observations, "claims": registered, **of_seed.get(f"seed_{seed}", {})}
            records.append(make_record(seed=seed, scale=scale, **arguments))
        plan = [record.trial_id for record in records] + [f"absent-{i}" for i in range(n_absent)]
        for record in records:
            write_record(tmp_path, record.model_copy(update={"plan": plan}))
        (loaded,), problems = load_campaigns(tmp_path)
        assert problems == []
        return loaded

    return build


# Reductions 0.1, 0.2, 0.3: mean 0.2, sd 0.1, 95 % half-width 0.248414, hence [-0.048414, 0.448414].
THREE = (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("region", "outcome", "reason"),
    [
        (Region(low=-0.05), "confirmed", "inside the region"),
        (Region(high=0.45), "confirmed", "inside the region"),
        (Region(-0.05, 0.45), "confirmed", "inside the region"),
        (Region(), "confirmed", "inside the region"),
        (Region(low=0.45), "refuted", "outside the region"),
        (Region(high=-0.05), "refuted", "outside the region"),
        (Region(low=-0.04), "insufficient", "crosses an edge"),
        (Region(low=0.44), "insufficient", "crosses an edge"),
        (Region(high=0.44), "insufficient", "crosses an edge"),
        (Region(0.1, 0.3), "insufficient", "crosses an edge"),
        (Region(-0.05, 0.44), "insufficient", "crosses an edge"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(campaign, region, outcome, reason):
    claim = claim_of(region)
    (verdict,) = judge_campaign([claim], campaign(THREE, [claim]))
    assert verdict.outcome == outcome
    assert reason in verdict.reason
    assert verdict.estimate == pytest.approx(0.2)
    assert verdict.interval == pytest.approx((-0.048414, 0.448414), abs=1e-6)
    assert (verdict.n_ok, verdict.n_planned) == (3, 3)
    assert verdict.scope == "smollm2-135m · moby_dick · CPU ×2 · cpu · seeds 0–2"
    assert verdict.simultaneous_alpha == 0.05
    assert verdict.registered


def test_the_scope_of_an_interaction_is_that_of_its_two_conditions(make_record, tmp_path):
    tracks = {"text": "smollm2-135m", "sentiment": "minilm-l6", "other": "tiny-random"}
    observations = [{"value": 4.0, "arm": "raw"}, {"value": 3.0, "arm": "ema"}]
    for track in tracks:
        settings = {name: {"model": model} for name, model in tracks.items()}
        factors = {"track": track}
        write_record(tmp_path, make_record(factors=factors, settings=settings, observations=observations, hardware={}))
    ((loaded,), _) = load_campaigns(tmp_path)
    claim = claim_of(Region(low=0.0), Interaction(REDUCTION, {"track": "text"}, {"track": "sentiment"}))
    (verdict,) = judge_campaign([claim], loaded)
    assert verdict.scope == "minilm-l6, smollm2-135m · cpu · seed 0"


def test_the_edges_of_a_region_belong_to_it(campaign):
    data = campaign(THREE)
    (first,) = judge_campaign([claim_of(Region())], data)
    low, high = first.interval
    assert judge_campaign([claim_of(Region(low, high))], data)[0].outcome == "confirmed"
    assert judge_campaign([claim_of(Region(math.nextafter(low, 1), high))], data)[0].outcome == "insufficient"
    assert judge_campaign([claim_of(Region(low, math.nextafter(high, 0)))], data)[0].outcome == "insufficient"
    assert judge_campaign([claim_of(Region(low=high))], data)[0].outcome == "insufficient"
    assert judge_campaign([claim_of(Region(high=low))], data)[0].outcome == "insufficient"


def test_an_undecided_claim_says_how_many_seeds_would_decide(campaign):
    # Mean 0.2, sd 0.1, edge 0.1: the case worked by hand in test_statistics, 7 seeds.
    (verdict,) = judge_campaign([claim_of(Region(low=0.1))], campaign(THREE))
    assert verdict.seeds_needed == 7
    assert "7 seeds would decide" in verdict.reason
    # Differences from the edge 0.0, 0.1, 0.2: the sum 0.3 needs both plus signs: 2 of 8 patterns, and 2 below.
    assert verdict.p_sign_flip == pytest.approx(4 / 8)


def test_an_undecidable_claim_says_so(campaign):
    (verdict,) = judge_campaign([claim_of(Region(low=0.2 + 1e-6))], campaign(THREE))
    assert verdict.seeds_needed is None
    assert "not decided by 200 seeds" in verdict.reason


def test_a_decided_claim_needs_no_more_seeds_and_tests_the_nearest_edge(campaign):
    data = campaign(THREE)
    (verdict,) = judge_campaign([claim_of(Region(-0.05, 9.0))], data)
    assert verdict.seeds_needed is None
    assert verdict.p_sign_flip == pytest.approx(2 / 8)
    (unbounded,) = judge_campaign([claim_of(Region())], data)
    assert unbounded.p_sign_flip is None


def test_intervals_are_simultaneous_over_the_claims_with_sampling_error(campaign):
    wide = claim_of(Region(low=-0.05))
    hopeless = claim_of(Region(), RelativeReduction("nonsense", {"arm": "ema"}, {"arm": "raw"}), "hopeless")
    exact = claim_of(Region(high=0.6), RATIO, "half-the-params")
    verdicts = judge_campaign([wide, hopeless, exact], campaign(THREE))
    # m = 2: the exact ratio takes no share, and the claim that cannot be estimated keeps its own.
    # t(1 - 0.0125, 2) = 6.205347, half-width 6.205347 · 0.1 / √3 = 0.358266.
    assert [verdict.simultaneous_alpha for verdict in verdicts] == [0.025, 0.025, None]
    assert verdicts[0].interval == pytest.approx((0.2 - 0.358266, 0.2 + 0.358266), abs=1e-6)
    assert verdicts[0].outcome == "insufficient"


def test_a_claim_that_cannot_be_estimated_leaves_the_others_alone(campaign):
    good = claim_of(Region(low=-1.0))
    bad = claim_of(Region(), RelativeReduction("eval_los", {"arm": "ema"}, {"arm": "raw"}), "bad")
    first, second = judge_campaign([bad, good], campaign(THREE))
    assert first.claim is bad
    assert first.outcome == "insufficient"
    assert "unknown metric 'eval_los'; did you mean eval_loss?" in first.reason
    assert (first.estimate, first.interval, first.p_sign_flip, first.seeds_needed) == (None, None, None, None)
    assert second.outcome == "confirmed"


@pytest.mark.parametrize(("reductions", "reason"), [((0.25,), "at least 2 seeds"), ((0.25, 0.25), "all 2 seeds gave")])
def test_an_interval_that_does_not_exist_is_insufficient(campaign, reductions, reason):
    (verdict,) = judge_campaign([claim_of(Region(low=0.1))], campaign(reductions))
    assert verdict.outcome == "insufficient"
    assert reason in verdict.reason
    assert verdict.interval is None


@pytest.mark.parametrize(
    ("region", "outcome"),
    [
        (Region(0.5, 0.5), "confirmed"),
        (Region(high=0.49), "refuted"),
    ],
)
def test_an_exact_ratio_has_no_sampling_error(campaign, region, outcome):
    (verdict,) = judge_campaign([claim_of(region, RATIO)], campaign((0.1,)))
    assert verdict.outcome == outcome
    assert (verdict.estimate, verdict.interval) == (0.5, (0.5, 0.5))
    assert (verdict.simultaneous_alpha, verdict.p_sign_flip, verdict.seeds_needed) == (None, None, None)


def test_an_exact_ratio_over_an_edge_is_insufficient(campaign, make_record):
    rows = [{"metric": "trainable_params", "value": 70}, {"metric": "total_params", "value": 100}]
    data = campaign((0.1, 0.2), seed_1={"observations": rows})
    (verdict,) = judge_campaign([claim_of(Region(high=0.6), RATIO)], data)
    assert verdict.outcome == "insufficient"
    assert verdict.interval == pytest.approx((0.5, 0.7))
    assert verdict.reason == "the interval crosses an edge of the region"


def test_a_claim_all_of_whose_trials_failed_is_not_silent(make_record, tmp_path):
    """Else a campaign of a lower scale would speak for it."""
    where = [{"value": 4.0, "arm": "raw"}, {"value": 3.0, "arm": "ema"}]
    records = [make_record(seed=seed, factors={"track": "main"}, observations=where) for seed in range(3)]
    records += [make_record(seed=seed, factors={"track": "length"}, status="diverged") for seed in range(3)]
    for record in records:
        write_record(tmp_path, record.model_copy(update={"plan": [each.trial_id for each in records]}))
    (data,), _ = load_campaigns(tmp_path)
    of_length = dataclasses.replace(REDUCTION, where={"track": "length"})
    (verdict,) = judge_campaign([claim_of(Region(low=0.0), of_length)], data)
    assert verdict.outcome == "insufficient"
    assert verdict.reason.endswith("; no trial of this claim succeeded")


def test_deleting_a_claim_narrows_no_interval(campaign):
    kept, deleted = claim_of(Region(low=-0.1)), claim_of(Region(low=-0.1), name="another")
    data = campaign(THREE, [kept, deleted])
    both, alone = judge_campaign([kept, deleted], data)[0], judge_campaign([kept], data)[0]
    assert both.interval == alone.interval


def test_a_track_that_was_not_run_is_not_measured(campaign):
    gpu_only = dataclasses.replace(REDUCTION, where={"track": "gpu-only"})
    first, second = judge_campaign(
        [claim_of(Region(low=-1.0), gpu_only, "gpu-only"), claim_of(Region(low=-1.0))], campaign(THREE)
    )
    assert (first.outcome, first.reason) == ("insufficient", NOT_MEASURED)
    assert second.outcome == "confirmed"


def test_a_missing_trial_is_at_most_insufficient(campaign):
    claims = [claim_of(Region(low=-1.0)), claim_of(Region(high=0.6), RATIO, "half-the-params")]
    for verdict in judge_campaign(claims, campaign(THREE, claims, n_absent=2)):
        assert verdict.outcome == "insufficient"
        assert verdict.reason.startswith("2 of 5 planned trials are missing or failed: no record 2; the interval lies")
        assert verdict.estimate is not None
        assert verdict.interval is not None
        assert (verdict.n_ok, verdict.n_planned) == (3, 5)
        assert verdict.registered


@pytest.mark.parametrize("status", ["diverged", "oom", "crashed", "cancelled"])
def test_a_failed_trial_is_at_most_insufficient(campaign, status):
    (verdict,) = judge_campaign([claim_of(Region(low=-1.0))], campaign((*THREE, 0.9), seed_3={"status": status}))
    assert verdict.outcome == "insufficient"
    assert f"1 of 4 planned trials are missing or failed: {status} 1" in verdict.reason
    assert verdict.estimate == pytest.approx(0.2)
    assert (verdict.n_ok, verdict.n_planned) == (3, 4)


def test_a_failed_trial_cannot_refute_either(campaign):
    (verdict,) = judge_campaign([claim_of(Region(low=0.9))], campaign((*THREE, 0.9), seed_3={"status": "oom"}))
    assert verdict.outcome == "insufficient"


def test_a_failed_manipulation_check_is_at_most_insufficient(campaign):
    failed = ManipulationCheck(name="ema differs", expected="True", observed="False", passed=False)
    data = campaign((*THREE, 0.9), n_absent=1, seed_3={"checks": [failed]})
    (verdict,) = judge_campaign([claim_of(Region(low=-1.0))], data)
    assert verdict.outcome == "insufficient"
    assert "2 of 5 planned trials are missing or failed: manipulation check failed 1, no record 1" in verdict.reason


def test_a_campaign_in_which_everything_failed(campaign):
    (verdict,) = judge_campaign([claim_of(Region(low=-1.0))], campaign((0.1,), seed_0={"status": "crashed"}))
    assert verdict.outcome == "insufficient"
    assert verdict.reason == "1 of 1 planned trials are missing or failed: crashed 1; no trial yielded observations"
    assert (verdict.estimate, verdict.interval, verdict.n_ok) == (None, None, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"region": Region(low=-0.9)},
        {"alpha": 0.2},
        {"estimand": RelativeReduction("eval_loss", {"arm": "ema"}, {"arm": "raw"}, {"track": "lm"})},
    ],
)
def test_a_claim_edited_after_its_data_is_not_registered(campaign, change):
    claim = claim_of(Region(low=-1.0))
    data = campaign(THREE, [claim])
    assert judge_campaign([claim], data)[0].registered
    assert not judge_campaign([dataclasses.replace(claim, **change)], data)[0].registered


def test_one_record_without_the_claim_unregisters_it(campaign):
    claim = claim_of(Region(low=-1.0))
    (verdict,) = judge_campaign([claim], campaign(THREE, [claim], seed_2={"claims": {}}))
    assert not verdict.registered
    assert verdict.outcome == "confirmed"


def test_a_failed_record_counts_for_registration(campaign):
    claim = claim_of(Region(low=-1.0))
    stale = {"status": "oom", "claims": {claim.id: "0" * 16}}
    assert not judge_campaign([claim], campaign(THREE, [claim], seed_2=stale))[0].registered


@pytest.mark.parametrize("dirty", [True, None])
def test_a_trial_of_code_that_may_not_be_committed_unregisters_the_claim(campaign, dirty):
    claim = claim_of(Region(low=-1.0))
    data = campaign(THREE, [claim])
    first, *others = data.records
    changed = dataclasses.replace(data, records=(first.model_copy(update={"git_dirty": dirty}), *others))
    (verdict,) = judge_campaign([claim], changed)
    assert not verdict.registered and verdict.outcome == "confirmed"


def test_smoke_is_not_evidence(campaign):
    with pytest.raises(ValueError, match=r"smoke is not evidence, got campaign .* of ema_ablation at scale 'smoke'"):
        judge_campaign([claim_of(Region())], campaign(THREE, scale="smoke"))


def test_a_diverged_value_in_an_ok_record_is_not_averaged(campaign):
    rows = [{"value": 4.0, "arm": "raw"}, {"value": math.nan, "arm": "ema"}]
    (verdict,) = judge_campaign([claim_of(Region(low=-1.0))], campaign(THREE, seed_2={"observations": rows}))
    assert verdict.outcome == "insufficient"
    assert "values must be finite, got nan for treatment {arm=ema} (seed 2, step 100)" in verdict.reason


def test_the_least_number_of_seeds_is_what_the_committed_calibration_asks_for():
    """The fewest n from which on no rate of false verdicts is refuted, under normal and discrete outcomes."""
    experiment = load_experiment("verdict_calibration")
    campaigns, _ = load_campaigns(ROOT / "results", experiment.name)
    (campaign,) = [c for c in campaigns if is_default(experiment, c) and c.scale == "cpu"]
    outcome = {v.claim.id: v.outcome for v in judge_campaign(experiment.claims, campaign)}
    means = set(get_args(Estimand)) - {Exact, ExactRatio, Rate, Proportion}
    for estimand in sorted(kind.__name__ for kind in means):
        words = re.sub(r"(?<!^)(?=[A-Z])", "-", {"LogLogSlope": "Slope"}.get(estimand, estimand)).lower()
        refuted = [
            n
            for n in (3, 5, 10, 20)
            if any(
                outcome[f"false-verdicts-{words}-{kind}-{n}-of-{family}"] == "refuted"
                for kind in ("gaussian", "discrete")
                for family in FAMILIES
            )
        ]
        allowed = [n for n in (3, 5, 10, 20) if n > max(refuted, default=0)]
        assert min(allowed, default=None) == MIN_SEEDS, estimand


def test_seeds_that_the_design_gives_to_one_arm_alone_are_no_pairs(tmp_path, make_record):
    """Two tasks of unequal numbers of seeds are compared within the seeds that both have."""
    claim = Claim(
        "of-both-tasks",
        "x",
        "ema",
        "seed 000",
        RelativeReduction("eval_loss", {"task": "b"}, {"task": "a"}),
        Region(low=0.0),
    )
    values = {"a": [2.0, 2.1, 2.2], "b": [1.0, 1.1, 1.15, 9.0, 9.0]}
    records = [
        make_record(seed=seed, factors={"task": task}, observations=[{"value": value}], claims={claim.id: claim.digest})
        for task, losses in values.items()
        for seed, value in enumerate(losses)
    ]
    for record in records:
        write_record(tmp_path, record)
    ((campaign,), _) = load_campaigns(tmp_path)
    (verdict,) = judge_campaign([claim], campaign)
    assert verdict.n == 3
    assert verdict.estimate == pytest.approx((1 / 2 + 1 / 2.1 + 1.05 / 2.2) / 3)
    assert verdict.outcome == "confirmed"
