"""Every experiment at ``smoke``, as a user would run it; and its claims name what its trials record."""

from __future__ import annotations

import pytest

from analysis.estimands import per_seed_values
from analysis.load import load_campaigns
from analysis.rows import CannotEstimate
from experiments.harness.experiment import experiment_names, load_experiment
from experiments.run import main

WITH_TESTS_OF_THEIR_OWN = {"ema_ablation", "verdict_calibration"}
WRONG_NAMES = ("must name a condition that was recorded", "needs a recorded metric", "must pick one row per")


@pytest.mark.parametrize("name", sorted(set(experiment_names()) - WITH_TESTS_OF_THEIR_OWN))
def test_smoke_and_the_names_in_claims(name, tmp_path, capsys):
    places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--wandb", "disabled"]
    assert main([name, "--scale", "smoke", *places]) == 0, capsys.readouterr().err
    ((campaign,), problems) = load_campaigns(tmp_path / "results")
    assert problems == []
    assert len(campaign.ok_records) == campaign.n_planned
    assert all(check.passed for record in campaign.records for check in record.checks)
    for claim in load_experiment(name).claims:
        try:
            per_seed_values(claim.estimand, campaign.observations)
        except CannotEstimate as error:  # a smoke run is too short for most, but never misnamed
            misnamed = any(words in str(error) for words in WRONG_NAMES) and "(known: )" not in str(error)
            assert not misnamed, f"{claim.id}: {error}"
