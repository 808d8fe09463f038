"""The calibration asks the very engine, of worlds whose truth is known, and notices an engine that lies."""

from __future__ import annotations

import numpy as np
import pytest

from analysis import verdicts
from analysis.load import Campaign
from experiments import verdict_calibration as calibration
from experiments.harness.claims import Claim, Proportion, Rate, Region, is_exact
from experiments.harness.experiment import UserError, load_experiments
from experiments.harness.record import Observation, TrialRecord, TrialSpec
from experiments.worlds.outcomes import OUTCOMES, WORLDS, simulate

TINY = calibration.Settings(simulations=400, population=20_000)


class Context:
    """A runner that never stops a trial."""

    def report(self, step, total, **figures):
        pass

    def should_stop(self):
        return False


def measure(estimand, outcomes, settings=TINY):
    (spec,) = (
        spec
        for spec in calibration.trials(settings, "smoke")
        if spec.factors == {"estimand": estimand, "outcomes": outcomes}
    )
    return calibration.run_trial(spec, Context())


def read(measurements, metric, n_seeds, side="worse", position="edge", family=1):
    (value,) = (
        o.value
        for o in measurements.observations
        if (o.metric, o.n_seeds, o.side, o.position, o.family) == (metric, n_seeds, side, position, family)
    )
    return value


def campaign_of(rows, simulation):
    """One simulated experiment as the records that the engine reads."""
    records = []
    for seed in range(rows[0].values.shape[1]):
        spec = TrialSpec(experiment="simulated", version=1, scale="cpu", seed=seed, factors={}, settings={})
        observations = [
            Observation(metric=r.metric, unit="1", value=r.values[simulation, seed], step=r.step, **r.conditions)
            for r in rows
        ]
        records.append(
            TrialRecord(
                trial_id=spec.trial_id, spec=spec, plan=[spec.trial_id], claims={}, status="ok",
                observations=observations, git_commit=None, git_dirty=None, packages={}, hardware={},
                started="2026-01-01T00:00:00+00:00", finished="2026-01-01T00:00:00+00:00",
            )
        )  # fmt: skip
    planned = frozenset(record.trial_id for record in records)
    return Campaign("simulated", 1, "cpu", records[0].spec.campaign_id, tuple(records), planned)


@pytest.mark.parametrize("outcomes", OUTCOMES)
@pytest.mark.parametrize("estimand", WORLDS)
def test_the_verdicts_are_those_of_judge_campaign(estimand, outcomes):
    world, n_simulations = WORLDS[estimand], 3
    places = [("low", "edge"), ("high", "inside"), ("low", "outside")]
    seen = set()
    for n_seeds in (4, 12):
        rows = simulate(world, outcomes, np.random.default_rng([n_seeds, 7]), (n_simulations, n_seeds))
        values = calibration.seed_values(world, rows)
        low, high = calibration.intervals(world, values, family=len(places))
        regions = [calibration.region_of(estimand, values.mean(), values.std(), *place) for place in places]
        claims = [
            Claim(f"claim-{i}", "…", "engine", "…", world.estimand, region, calibration.ALPHA)
            for i, region in enumerate(regions)
        ]
        for i in range(n_simulations):
            judged = verdicts.judge_campaign(claims, campaign_of(rows, i))
            for region, verdict in zip(regions, judged, strict=True):
                confirmed, refuted = verdicts.decided(low[i], high[i], region)
                expected = "confirmed" if confirmed else "refuted" if refuted else "insufficient"
                assert verdict.outcome == expected, verdict.reason
                if verdict.interval is None:
                    assert np.isnan(low[i]), verdict.reason
                else:
                    assert verdict.interval == pytest.approx((low[i], high[i]), rel=1e-9, abs=1e-12)
                seen.add(expected)
    assert len(seen) >= 2 or isinstance(world.estimand, Rate)


@pytest.mark.parametrize("outcomes", OUTCOMES)
def test_noise_is_standardised(outcomes):
    noise = OUTCOMES[outcomes](np.random.default_rng(0), (1_000_000, 1))
    assert noise.mean() == pytest.approx(0.0, abs=0.005)
    assert noise.std() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("outcomes", OUTCOMES)
@pytest.mark.parametrize(
    ("estimand", "truth", "sd"),
    [("relative_reduction", 0.02, 0.01), ("interaction", 0.015, np.hypot(0.01, 0.003)), ("ratio", 0.5, 0.05)],
)
def test_the_truth_is_that_of_the_closed_form(estimand, outcomes, truth, sd):
    rng = np.random.default_rng(1)
    found, spread = calibration._truth(WORLDS[estimand], outcomes, 200_000, rng, Context())
    assert found == pytest.approx(truth, abs=5 * sd / np.sqrt(200_000))
    assert spread == pytest.approx(sd, rel=0.05)


def test_a_normal_mean_errs_as_often_as_its_interval_promises():
    measured = measure("relative_reduction", "gaussian", calibration.Settings(simulations=4_000, population=200_000))
    for n_seeds in calibration.SEEDS:
        assert 0.004 < read(measured, "false_verdicts", n_seeds) / 4_000 < 0.022  # 0.0125 ± 5 standard errors
        assert read(measured, "false_verdicts", n_seeds, family=40) <= 10  # 1.25 expected
    assert read(measured, "confirmed", 20, "low", "inside") > read(measured, "confirmed", 5, "low", "inside")
    assert read(measured, "refuted", 20, "high", "outside") > 0.9 * 4_000
    assert read(measured, "interval_width", 20) == pytest.approx(2 * 2.433 / np.sqrt(20), rel=0.03)
    assert all(check.passed for check in measured.checks)


def test_an_engine_that_lies_is_noticed(monkeypatch):
    from analysis import statistics

    honest = statistics.t_interval
    monkeypatch.setattr(statistics, "t_interval", lambda samples, alpha: honest(samples, 12 * alpha))
    measured = measure("relative_reduction", "gaussian")
    assert read(measured, "false_verdicts", 10) / TINY.simulations > 0.1


def test_a_trial_is_repeated_bit_for_bit():
    first, second = (measure("slope", "skewed", TINY) for _ in range(2))
    assert first.observations == second.observations


def test_a_region_has_the_truth_where_it_is_said_to_be():
    assert calibration.region_of("ratio", 2.0, 0.5, "low", "edge") == Region(low=2.0)
    assert calibration.region_of("ratio", 2.0, 0.5, "low", "inside") == Region(low=1.5)
    assert calibration.region_of("ratio", 2.0, 0.5, "high", "outside") == Region(high=1.5)
    assert calibration.region_of("equivalence", 2.0, 0.5, "high", "inside") == Region(0.5, 2.5)
    assert calibration.region_of("rate", 0.2, 0.4, "low", "inside") == Region(low=0.1)


def test_every_cell_has_a_claim_that_finds_its_counts():
    measured = measure("rate", "discrete")
    cells = {(o.n_seeds, o.family, o.side, o.position) for o in measured.observations}
    for claim in calibration.EXPERIMENT.claims:
        where = claim.estimand.where
        assert isinstance(claim.estimand, Proportion) and claim.region == Region(high=0.05 / where["family"])
        assert (where["n_seeds"], where["family"], where["side"], where["position"]) in cells
    cases = len(WORLDS) * len(OUTCOMES) * len(calibration.SEEDS) * len(calibration.FAMILIES)
    assert len(calibration.EXPERIMENT.claims) == cases
    assert set(calibration.ESTIMAND_WORDS) == set(WORLDS) and set(calibration.OUTCOME_WORDS) == set(OUTCOMES)


def test_no_experiment_has_more_claims_of_means_than_the_calibration_covers():
    for experiment in load_experiments():
        means = [c for c in experiment.claims if not is_exact(c.estimand) and not isinstance(c.estimand, Proportion)]
        assert len(means) <= max(calibration.FAMILIES), experiment.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"simulations": 0}, "simulations must be at least 1, got 0"),
        ({"population": 10}, "at least 1000 seeds, got 10"),
    ],
)
def test_settings_that_measure_nothing(options, message):
    with pytest.raises(UserError, match=message):
        calibration.Settings(**options)
