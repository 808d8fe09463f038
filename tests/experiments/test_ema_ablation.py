"""The experiment's own promises: its plan, its pairs, its manipulation checks, its bitwise repeatability."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from experiments.ema_ablation import EXPERIMENT, SCALES, trials
from forge.ema import EMAModel, compute_optimal_decay

TINY = {"batch_size": 2, "validation_blocks": 2, "test_blocks": 4, "late_evaluations": 2}


def specs(schedules=("constant",), seeds=1, **changes):
    main = dataclasses.replace(SCALES["smoke"].main, **{"steps": (6,), **TINY, **changes})
    settings = dataclasses.replace(SCALES["smoke"], seeds=seeds, main=main, length=None, schedules=schedules)
    return trials(settings, "smoke")


class Context:
    def __init__(self, work_dir):
        self.work_dir = work_dir

    def report(self, step, total, **figures):
        return None

    def should_stop(self):
        return False

    def wandb_run_id(self):
        return None


@pytest.fixture
def measure(tmp_path_factory):
    return lambda spec: EXPERIMENT.run_trial(spec, Context(tmp_path_factory.mktemp("work")))


def values(measurements, **conditions):
    rows = [o.model_dump() for o in measurements.observations]
    return {
        (row.get("arm"), row["step"]): row["value"]
        for row in rows
        if all(row.get(key) == value for key, value in conditions.items())
    }


@pytest.mark.parametrize(
    ("scale", "count"), [("smoke", 2 * 2 * 3), ("laptop", 3 * 2), ("cpu", 5 * 2 * 3), ("gpu", 3 * 2 * 3), ("paper", 30)]
)
def test_the_plan_is_tracks_by_lengths_by_schedules_by_seeds(scale, count):
    plan = trials(SCALES[scale], scale)
    assert len(plan) == len({spec.trial_id for spec in plan}) == count
    assert len({spec.campaign_id for spec in plan}) == 1
    per_seed = count // SCALES[scale].seeds
    assert [spec.seed for spec in plan] == sorted(spec.seed for spec in plan), "an early stop must leave whole pairs"
    assert {tuple(s.factors.items()) for s in plan[:per_seed]} == {tuple(s.factors.items()) for s in plan[-per_seed:]}


def test_more_seeds_continue_a_campaign():
    two, three = specs(seeds=2), specs(seeds=3)
    assert [s.trial_id for s in three][:2] == [s.trial_id for s in two]
    assert three[0].campaign_id == two[0].campaign_id != specs(batch_size=3)[0].campaign_id


def test_arms_of_a_seed_are_paired_and_seeds_differ(measure):
    constant, cosine, other = (measure(spec) for spec in [*specs(("constant", "cosine")), specs(seeds=2)[1]])
    assert constant.digests == cosine.digests != other.digests
    assert constant.digests["data"] == other.digests["data"]
    initial = {"metric": "eval_loss", "arm": "initial"}
    assert values(constant, **initial) == values(cosine, **initial) != values(other, **initial)
    raw = {"metric": "eval_loss", "arm": "raw", "split": "test"}
    assert values(constant, **raw) != values(cosine, **raw)
    for measurements in (constant, cosine, other):
        assert all(check.passed for check in measurements.checks) and measurements.diverged is None


def test_the_same_trial_twice_is_bitwise_the_same(measure):
    (spec,) = specs()
    first, second = measure(spec), measure(spec)
    for part in ("observations", "examples", "checks", "digests", "tokens"):
        assert getattr(first, part) == getattr(second, part)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    (spec,) = specs()
    return EXPERIMENT.run_trial(spec, Context(tmp_path_factory.mktemp("work")))


def test_every_arm_is_evaluated_with_its_conditions(measured):
    rows = [o.model_dump() for o in measured.observations]
    tests = {row["arm"]: row for row in rows if row.get("split") == "test" and row["metric"] == "eval_loss"}
    assert set(tests) == {"initial", "raw", "ema_0.99", "ema_0.999", "ema_0.9999", "ema_optimal"}
    assert tests["raw"]["horizon_steps"] == 1 and tests["initial"]["step"] == 0
    assert tests["ema_0.99"]["decay"] == 0.99
    assert tests["ema_0.99"]["horizon_steps"] == pytest.approx(100)
    assert tests["ema_0.99"]["initial_weight_share"] == pytest.approx(0.99**6)
    assert tests["ema_optimal"]["decay"] == compute_optimal_decay(6)
    late = [(row["arm"], row["step"]) for row in rows if row.get("split") == "validation"]
    assert sorted(late) == sorted((arm, step) for arm in tests if arm != "initial" for step in (4, 6))


def test_losses_lie_between_those_of_the_initial_and_the_raw_weights(measured):
    """What the formula says of so short a run: the longer the memory, the nearer to the initial weights."""
    loss = {arm: value for (arm, _), value in values(measured, metric="eval_loss", split="test").items()}
    order = ["raw", "ema_optimal", "ema_0.99", "ema_0.999", "ema_0.9999", "initial"]
    assert sorted(loss, key=loss.get) == order


def test_documents_make_up_the_test_loss(measured):
    loss = values(measured, metric="eval_loss", split="test")["raw", 6]
    rows = [e for e in measured.examples if e.arm == "raw"]
    assert sum(e.value * e.tokens for e in rows) / sum(e.tokens for e in rows) == pytest.approx(loss, rel=1e-12)
    assert sum(e.tokens for e in rows) == 4 * 31


def test_memory_is_measured(measured):
    extra, averaged = (values(measured, metric=m)[None, 6] for m in ("ema_extra_bytes", "averaged_param_bytes"))
    assert averaged == 4 * 117_120
    assert extra == pytest.approx(averaged, rel=0.01)
    assert measured.memory_bytes["ema"] == 4 * averaged


def test_a_recommended_decay_that_is_in_the_list_is_followed_once(measure):
    measurements = measure(specs(decays=(compute_optimal_decay(6), 0.999))[0])
    loss = values(measurements, metric="eval_loss", split="test")
    assert loss["ema_optimal", 6] == loss[f"ema_{compute_optimal_decay(6):g}", 6]


def test_an_average_that_is_never_updated_fails_the_trial(inline_cli, small, monkeypatch, tmp_path, read_all):
    monkeypatch.setattr(EMAModel, "update", lambda self: None)
    assert inline_cli(*small) == 4
    for record in read_all(tmp_path / "results").values():
        assert record["status"] == "crashed"
        assert "manipulation check failed: ema_updates" in record["error"]
        assert record["observations"], "what was measured is kept"


def test_an_average_that_copies_the_weights_fails_the_trial(inline_cli, small, monkeypatch, tmp_path, read_all):
    update, build, parameters = EMAModel.update, EMAModel.__init__, {}

    def building(self, model, *arguments, **options):
        build(self, model, *arguments, **options)
        parameters[id(self)] = dict(model.named_parameters())

    def copying(self):
        update(self)
        state = self.state_dict()
        for averages in state["averages"].values():
            averages.update({name: parameters[id(self)][name].detach().clone() for name in averages})
        self.load_state_dict(state)

    monkeypatch.setattr(EMAModel, "__init__", building)
    monkeypatch.setattr(EMAModel, "update", copying)
    assert inline_cli(*small) == 4
    errors = {record["error"] for record in read_all(tmp_path / "results").values()}
    assert all("averages_equal_to_raw" in error for error in errors)


def test_weights_that_do_not_train_fail_the_trial(inline_cli, small, monkeypatch, tmp_path, read_all):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    assert inline_cli(*small) == 4
    errors = {record["error"] for record in read_all(tmp_path / "results").values()}
    assert all("training_moved_the_model" in error for error in errors)


def test_a_loss_that_is_not_a_number_is_a_divergence_on_record(inline_cli, small, tmp_path, read_all, capsys):
    assert inline_cli(*small, "--learning-rate", "1e30", "--length.learning-rate", "1e30") == 4
    records = read_all(tmp_path / "results")
    assert {record["status"] for record in records.values()} == {"diverged"}
    assert all("the test loss of arm" in record["error"] for record in records.values())
    assert "0 of 2 planned trials succeeded (2 diverged)" in capsys.readouterr().out
