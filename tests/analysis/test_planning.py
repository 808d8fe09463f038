"""Power of a design: simulated, by its inverse functions, and from the records of a pilot."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.load import load_campaigns
from analysis.planning import detectable_distance, plans, power, seeds_for_power, summary
from analysis.statistics import t_interval
from experiments.harness.claims import Claim, ExactRatio, Region, RelativeReduction
from tests.analysis.fake_ema import EXPERIMENT, plan, write_campaign


@pytest.mark.parametrize(("distance", "n", "alpha"), [(1.5, 5, 0.05), (0.6, 20, 0.01)])
def test_power_is_what_simulation_says(distance, n, alpha):
    low, _ = t_interval(np.random.default_rng(0).normal(distance, 1.0, size=(20_000, n)), alpha)
    fewest, most = stats.binom.interval(0.999, len(low), power(distance, 1.0, n, alpha))
    assert fewest <= np.count_nonzero(low > 0) <= most


def test_power_at_the_edge_is_half_of_alpha():
    assert power(0.0, 3.0, 7, 0.05) == pytest.approx(0.025)


@pytest.mark.parametrize("n", [2, 3, 5, 200])
@pytest.mark.parametrize("alpha", [0.05, 0.0003])
def test_the_detectable_distance_has_the_wanted_power(n, alpha):
    assert power(detectable_distance(0.1, n, alpha), 0.1, n, alpha) == pytest.approx(0.8, abs=1e-6)


def test_seeds_for_power_are_the_fewest():
    n = seeds_for_power(1.0, 1.0, 0.05)
    assert n == 10  # the textbook case: d = 1, two-sided 0.05, power 0.8
    assert power(1.0, 1.0, n, 0.05) >= 0.8 > power(1.0, 1.0, n - 1, 0.05)
    assert seeds_for_power(0.0, 1.0, 0.05) is None
    assert seeds_for_power(0.01, 1.0, 0.05) is None


def test_power_refuses_what_has_none():
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        power(1.0, 1.0, 1, 0.05)
    with pytest.raises(ValueError, match="sd must be positive, got 0"):
        power(1.0, 0.0, 5, 0.05)


def test_the_plan_of_an_experiment_from_its_evidence(tmp_path, make_record):
    write_campaign(tmp_path, make_record, "cpu")
    campaigns, _ = load_campaigns(tmp_path)
    found, without = plans(EXPERIMENT, plan("cpu"), campaigns)
    assert {p.claim.id for p in found} | set(without) == {claim.id for claim in EXPERIMENT.claims}
    assert without["ema-extra-memory"] == "no variance over seeds to plan by"
    first = found[0]
    assert (first.n_planned, first.pilot.n, first.campaign) == (5, 5, campaigns[0])
    assert power(first.detectable, first.pilot.sd, 5, 0.05 / 2 / 35) == pytest.approx(0.8, abs=1e-6)
    text = summary(EXPERIMENT, plan("cpu"), campaigns)
    assert "| ema-0.999-lowers-loss-constant" in text and campaigns[0].campaign_id in text
    (shift,) = [line for line in text.splitlines() if line.startswith("| ema-best-decay-grows-constant")]
    assert shift.count("×") == 4, "bound, pilot, sd and detectable distance are factors"


def test_a_claim_that_the_scale_does_not_measure_has_no_plan(tmp_path, make_record):
    write_campaign(tmp_path, make_record, "cpu")
    _, without = plans(EXPERIMENT, plan("laptop"), load_campaigns(tmp_path)[0])
    assert without["ema-best-decay-grows-constant"] == "not measured at this scale"


def test_seeds_are_those_in_which_the_first_arm_is_planned(tmp_path, make_record):
    write_campaign(tmp_path, make_record, "cpu")
    specs = [spec for spec in plan("cpu") if spec.seed < 3 or spec.factors["schedule"] != "constant"]
    found, _ = plans(EXPERIMENT, specs, load_campaigns(tmp_path)[0])
    seeds = {p.claim.id: p.n_planned for p in found}
    assert (seeds["ema-0.999-lowers-loss-constant"], seeds["ema-0.999-lowers-loss-cosine"]) == (3, 5)


def test_without_evidence_of_its_own_the_highest_scale_is_the_pilot(tmp_path, make_record):
    for scale in ("laptop", "cpu"):
        write_campaign(tmp_path, make_record, scale)
    found, _ = plans(EXPERIMENT, plan("gpu"), load_campaigns(tmp_path)[0])
    assert found and {p.campaign.scale for p in found} == {"cpu"}


def test_smoke_is_no_pilot(tmp_path, make_record):
    write_campaign(tmp_path, make_record, "smoke")
    found, without = plans(EXPERIMENT, plan("cpu"), load_campaigns(tmp_path)[0])
    assert found == [] and "no pilot data" in without.values()


def test_claims_of_the_fake_experiment_are_what_the_test_takes_them_for():
    sampled = [claim for claim in EXPERIMENT.claims if not isinstance(claim.estimand, ExactRatio)]
    assert len(sampled) == 35
    assert isinstance(sampled[0], Claim) and isinstance(sampled[0].estimand, RelativeReduction)
    assert sampled[0].region == Region(low=0.01)


def test_the_command_line_prints_the_plan_and_runs_nothing(tmp_path, make_record, capsys):
    from experiments.run import main

    write_campaign(tmp_path / "results", make_record, "cpu")
    arguments = ["ema_ablation", "--scale", "cpu", "--plan", "--results", str(tmp_path / "results")]
    assert main([*arguments, "--runs", str(tmp_path / "runs")]) == 0
    assert "| ema-0.999-lowers-loss-constant" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
