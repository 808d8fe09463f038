"""Campaigns: grouping, tidy observations, what counts as a success, scope, broken files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.load import Campaign, load_campaigns
from experiments.harness.record import ExampleOutcome, ManipulationCheck, TrialRecord, write_record

PASSED = ManipulationCheck(name="ema differs", expected="True", observed="True", passed=True)
FAILED = ManipulationCheck(name="ema differs", expected="True", observed="False", passed=False)


def campaign_of(*records: TrialRecord) -> Campaign:
    first = records[0].spec
    planned = frozenset(trial_id for record in records for trial_id in record.plan)
    return Campaign(first.experiment, first.version, first.scale, first.campaign_id, records, planned)


def test_observations_are_tidy_rows_with_factors_and_conditions(make_record):
    record = make_record(
        seed=3,
        factors={"schedule": "cosine"},
        observations=[
            {"value": 2.5, "step": 300, "arm": "raw"},
            {"value": 2.25, "step": 300, "arm": "ema", "decay": 0.999},
        ],
    )
    observed = campaign_of(record).observations
    columns = ["trial_id", "seed", "status", "schedule", "metric", "unit", "value", "step", "arm", "decay"]
    assert list(observed.columns) == columns
    assert observed.iloc[1].to_dict() == {
        "trial_id": record.trial_id,
        "seed": 3,
        "status": "ok",
        "schedule": "cosine",
        "metric": "eval_loss",
        "unit": "nats/token",
        "value": 2.25,
        "step": 300,
        "arm": "ema",
        "decay": 0.999,
    }
    assert pd.isna(observed["decay"][0])


@pytest.mark.parametrize("status", ["diverged", "oom", "crashed", "cancelled"])
def test_failed_trials_yield_no_observations_but_stay_in_the_plan(make_record, status):
    good = make_record(seed=0, observations=[{"value": 1.0}])
    bad = make_record(seed=1, observations=[{"value": 9.0}], status=status)
    campaign = campaign_of(good, bad)
    assert campaign.observations["value"].tolist() == [1.0]
    assert campaign.n_planned == 2
    assert len(campaign.records) == 2


def test_a_failed_manipulation_check_fails_the_trial(make_record):
    good = make_record(seed=0, observations=[{"value": 1.0}], checks=[PASSED])
    bad = make_record(seed=1, observations=[{"value": 9.0}], checks=[PASSED, FAILED])
    campaign = campaign_of(good, bad)
    assert campaign.ok_records == (good,)
    assert campaign.observations["value"].tolist() == [1.0]


def test_no_observations_still_have_columns(make_record):
    observed = campaign_of(make_record(status="oom")).observations
    assert observed.empty
    assert {"metric", "value", "step", "seed"} <= set(observed.columns)


def test_a_condition_must_not_override_a_factor(make_record):
    campaign = campaign_of(make_record(factors={"arm": "lora"}, observations=[{"value": 1.0, "arm": "full"}]))
    with pytest.raises(ValueError, match=r"must not override .* got arm='full' against arm='lora' in trial .*rename"):
        _ = campaign.observations


def test_a_condition_must_not_override_the_seed(make_record):
    campaign = campaign_of(make_record(seed=1, observations=[{"value": 1.0, "seed": 2}]))
    with pytest.raises(ValueError, match="got seed=2 against seed=1"):
        _ = campaign.observations


def test_a_condition_that_repeats_its_factor_is_no_override(make_record):
    campaign = campaign_of(make_record(factors={"arm": "lora"}, observations=[{"value": 1.0, "arm": "lora"}]))
    assert campaign.observations["arm"].tolist() == ["lora"]


def test_examples_carry_seed_and_factors(make_record):
    outcome = ExampleOutcome(example="doc-7", arm="ema", metric="nll", value=12.5, tokens=64)
    campaign = campaign_of(
        make_record(seed=2, factors={"schedule": "linear"}, examples=[outcome]),
        make_record(seed=3, factors={"schedule": "linear"}, examples=[outcome], status="crashed"),
    )
    row = campaign.examples.drop(columns=["trial_id", "status"])
    assert row.to_dict("records") == [
        {
            "seed": 2,
            "schedule": "linear",
            "example": "doc-7",
            "arm": "ema",
            "metric": "nll",
            "value": 12.5,
            "tokens": 64,
        }
    ]


def test_scope_names_model_data_hardware_scale_and_seeds(make_record):
    records = [make_record(seed=seed) for seed in (2, 0, 1)]
    assert campaign_of(*records).scope == "smollm2-135m · moby_dick · CPU ×2 · cpu · seeds 0–2"


def test_scope_is_exact_about_gaps_mixed_hardware_and_factors(make_record):
    settings = {"dataset": "state_of_the_union"}
    campaign = campaign_of(
        make_record(
            seed=0,
            settings=settings,
            factors={"model": "tiny"},
            hardware={"device": "cuda", "gpu": "NVIDIA H200", "cores": 16},
        ),
        make_record(seed=4, settings=settings, factors={"model": "small"}, hardware={"device": "cpu"}),
        make_record(seed=7, settings=settings, factors={"model": "small"}, hardware={"device": "cpu"}, status="oom"),
    )
    assert campaign.scope == "small, tiny · state_of_the_union · CPU, NVIDIA H200 · cpu · seeds 0, 4"


def test_scope_is_that_of_the_only_group_of_settings(make_record):
    run = {"model": "smollm2-135m", "dataset": "moby_dick"}
    assert (
        campaign_of(make_record(settings={"cells": run}, hardware={})).scope
        == "smollm2-135m · moby_dick · cpu · seed 0"
    )
    several = {"first": run, "second": {"model": "minilm-l6"}}
    assert campaign_of(make_record(settings=several, hardware={})).scope == "moby_dick · cpu · seed 0"


def test_scope_tolerates_missing_settings(make_record):
    assert campaign_of(make_record(settings={}, hardware={})).scope == "cpu · seed 0"
    assert campaign_of(make_record(settings={}, hardware={}, status="oom")).scope == "cpu"


def test_a_campaign_needs_records():
    with pytest.raises(ValueError, match="at least one record, got none"):
        Campaign("ema_ablation", 1, "cpu", "abc", (), frozenset())


def test_campaigns_are_never_pooled_over_version_scale_or_settings(make_record, tmp_path):
    records = [
        make_record(seed=0, settings={"steps": 10}),
        make_record(seed=1, settings={"steps": 10}),
        make_record(settings={"steps": 20}),
        make_record(version=2, settings={"steps": 10}),
        make_record(scale="smoke", settings={"steps": 10}),
        make_record(experiment="freeze_ratio", settings={"steps": 10}),
    ]
    for record in records:
        write_record(tmp_path, record)
    campaigns, problems = load_campaigns(tmp_path)
    assert problems == []
    keys = [(c.experiment, c.version, c.scale, c.campaign_id) for c in campaigns]
    assert keys == sorted(keys)
    assert sorted((c.experiment, c.version, c.scale, len(c.records)) for c in campaigns) == [
        ("ema_ablation", 1, "cpu", 1),
        ("ema_ablation", 1, "cpu", 2),
        ("ema_ablation", 1, "smoke", 1),
        ("ema_ablation", 2, "cpu", 1),
        ("freeze_ratio", 1, "cpu", 1),
    ]
    assert [c.scale for c in campaigns if not c.is_evidence] == ["smoke"]
    only, _ = load_campaigns(tmp_path, "freeze_ratio")
    assert [c.experiment for c in only] == ["freeze_ratio"]


def test_campaigns_come_in_the_order_of_their_ids_whatever_the_file_names(make_record, tmp_path):
    for steps in range(8):
        write_record(tmp_path, make_record(settings={"steps": steps}))
    ids = [campaign.campaign_id for campaign in load_campaigns(tmp_path)[0]]
    assert len(ids) == 8
    assert ids == sorted(ids)


def test_the_plan_is_the_union_of_all_plans(make_record, tmp_path):
    first = make_record(seed=0, plan=["a", "b"])
    second = make_record(seed=1, plan=["b", "c"])
    for record in (first, second):
        write_record(tmp_path, record)
    (campaign,), _ = load_campaigns(tmp_path)
    assert campaign.planned == {"a", "b", "c", first.trial_id, second.trial_id}


def test_a_broken_file_is_named_and_the_others_are_used(make_record, tmp_path):
    path = write_record(tmp_path, make_record(observations=[{"value": 1.5}]))
    broken = path.with_name("0123456789abcdef.json")
    broken.write_text("{not json")
    campaigns, problems = load_campaigns(tmp_path)
    assert [campaign.observations["value"].tolist() for campaign in campaigns] == [[1.5]]
    assert len(problems) == 1
    assert str(broken) in problems[0]


def test_no_results_are_no_campaigns(tmp_path: Path):
    assert load_campaigns(tmp_path / "absent") == ([], [])
