"""``monitor_detection``: from when a fault can be seen, what counts as noticed, and where its measures can go."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.harness.claims import Difference
from experiments.harness.experiment import UserError
from experiments.harness.models import load_causal_lm
from experiments.harness.record import Measurements, TrialSpec
from experiments.monitor_detection import (
    EXPERIMENT,
    EXTREME_NORM,
    FAULTS,
    SCALES,
    SEPARATION,
    Settings,
    _Norms,
    _observe,
    _observe_thresholds,
    _separation,
    run_trial,
)
from experiments.worlds.faults import RATE_FACTORS, Fault
from forge.layers import find_layers
from forge.monitor import GradientReport, MonitorRecord

STEPS, STEP = 12, 6
RUN = dataclasses.replace(SCALES["smoke"], steps=STEPS, fault_step=STEP, window=2)


@dataclasses.dataclass
class Context:
    """A trial that nobody watches; it is asked to stop, and must not: its norms would begin in the middle."""

    work_dir: object

    def report(self, *args, **kwargs): ...

    def should_stop(self):
        return True

    def wandb_run_id(self):
        return None


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Gradient norms by step of a short run with a fault, and what was recorded."""
    kept: dict[str, tuple[list[dict[str, float]], Measurements]] = {}

    def run(fault):
        if fault not in kept:
            norms: list[dict[str, float]] = []
            keep = _Norms.keep
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_Norms, "keep", lambda self, s, r: (norms.append(dict(r.norms)), keep(self, s, r))[1])
                settings = {k: v for k, v in dataclasses.asdict(RUN).items() if k != "seeds"}
                spec = TrialSpec(
                    experiment=EXPERIMENT.name,
                    version=EXPERIMENT.version,
                    scale="own",
                    seed=0,
                    factors={"fault": fault},
                    settings=settings,
                )
                measured = run_trial(spec, Context(tmp_path_factory.mktemp(fault)))
            kept[fault] = norms, measured
        return kept[fault]

    return run


def values(measurements, **conditions):
    """Metric → value of the rows that have these conditions."""
    rows = [row.model_dump() for row in measurements.observations]
    return {r["metric"]: r["value"] for r in rows if all(r.get(k) == v for k, v in conditions.items())}


def record(step, *kinds):
    return MonitorRecord(step=step, loss=1.0, grad_norm=1.0, counts=dict.fromkeys(kinds, 1), findings=(), action="warn")


def observed(fault, visible_from, *records):
    into = Measurements()
    _observe(into, fault, visible_from, STEPS, list(records))
    return values(into)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "healthy"])
def test_a_fault_shows_in_the_gradient_from_its_first_visible_step_on_and_not_before(trial, fault):
    healthy, broken = trial("healthy")[0], trial(fault)[0]
    first = Fault(fault, STEP, torch.nn.Linear(1, 1)).visible_from
    same = [one == other for one, other in zip(healthy, broken, strict=True)]
    assert same == [True] * (first - 1) + [False] * (STEPS - first + 1)
    assert all(check.passed for check in trial(fault)[1].checks)


@pytest.mark.parametrize("fault", RATE_FACTORS)
def test_the_learning_rate_is_raised_from_the_fault_on(fault):
    callback, optimizer = Fault(fault, 3, torch.nn.Linear(1, 1)), SimpleNamespace(param_groups=[{}])
    rates = []
    for done in range(4):
        optimizer.param_groups[0]["lr"] = 0.5  # as the scheduler sets it after every step
        callback.on_step_begin(None, SimpleNamespace(global_step=done), None, optimizer=optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.5, 0.5 * RATE_FACTORS[fault], 0.5 * RATE_FACTORS[fault]]


def test_a_dead_layer_stays_dead(trial):
    """AdamW's momentum would revive it in the step after its death."""
    name = f"{find_layers(load_causal_lm(RUN.model, random_init=True, method='full'))[0].name}.mlp."
    for step, norms in enumerate(trial("dead_layer")[0], start=1):
        ours = [norm for parameter, norm in norms.items() if parameter.startswith(name)]
        assert len(ours) == 3
        assert all(norm == 0 for norm in ours) if step >= STEP else all(norm > 0 for norm in ours)


def test_healthy_gradients_are_never_exactly_zero(trial):
    """So that the smallest norm of a healthy run is one that the threshold is compared with."""
    assert all(0 < norm < math.inf for step in trial("healthy")[0] for norm in step.values())


def test_detection_and_alarms_are_told_apart_by_the_first_visible_step():
    at_once = observed("high_lr", 7, record(6), record(7, "exploding"))
    assert at_once == {
        "false_alarm": 0,
        "any_false_alarm": 0,
        "detected": 1,
        "detected_by_any_finding": 1,
        "detected_at_once": 1,
        "detection_delay_steps": 0,
    }
    late = observed("high_lr", 7, record(6), record(7, "vanishing"), record(9, "nan"))
    assert (late["detected"], late["detected_at_once"], late["detection_delay_steps"]) == (1, 0, 2)
    early = observed("high_lr", 7, record(6, "exploding"), record(7))
    assert (early["false_alarm"], early["detected"], early["detected_by_any_finding"]) == (1, 0, 0)
    assert "detection_delay_steps" not in early


def test_spikes_of_the_loss_count_only_where_every_finding_does():
    spiked = observed("high_lr", 7, record(6, "loss_spike"), record(7, "loss_spike"))
    assert (spiked["false_alarm"], spiked["any_false_alarm"]) == (0, 1)
    assert (spiked["detected"], spiked["detected_by_any_finding"]) == (0, 1)


def test_all_steps_of_a_healthy_run_are_quiet_ones():
    assert observed("healthy", 6, record(1), record(11, "loss_spike")) == {"false_alarm": 0, "any_false_alarm": 1}
    assert observed("healthy", 6, record(11, "inf"))["false_alarm"] == 1
    assert observed("vanishing_depth", 1, record(1, "vanishing")).keys() & {"false_alarm", "any_false_alarm"} == set()


def thresholds(fault, visible_from, *of_parameters):
    into = Measurements()
    _observe_thresholds(into, fault, visible_from, Settings(), list(of_parameters))
    return {row.model_dump()["arm"]: row.value for row in into.observations}


def test_where_the_norms_lie_beside_the_thresholds():
    steps = [[0.1, 10.0], [1e-3, 1.0], [1e-9, 1e5], [1e-2, 2.0]]
    assert thresholds("healthy", 3, *steps) == pytest.approx({"healthy": -9})
    assert thresholds("vanishing_depth", 1, *steps) == pytest.approx({"faulty": -9, "threshold": -7})
    assert thresholds("high_lr", 3, *steps) == pytest.approx({"healthy": 1, "faulty": 5, "middle": 3, "threshold": 3})
    assert thresholds("dead_layer", 3, *steps) == {}


def test_a_side_without_a_usable_norm_is_not_recorded():
    assert thresholds("high_lr", 2, [10.0], []) == pytest.approx({"healthy": 1, "threshold": 3})


def test_norms_that_say_nothing_of_a_threshold_are_left_out():
    norms = _Norms(["a"])
    norms.keep(1, GradientReport({"a.w": 0.0, "a.b": math.nan, "c": math.inf, "d": 3.0, "e": 4.0}, (), ()))
    assert norms.of_parameters == [[3.0, 4.0]]


def test_the_area_is_of_the_first_steps_of_the_fault_against_the_last_before_it():
    """With a window of 4: steps 9–12 against 13 and 14."""
    rng = np.random.default_rng(0)
    norms = 10 ** rng.uniform(-0.01, 0.01, size=20)
    seen = norms.copy()
    seen[12:14] *= 10
    elsewhere = norms.copy()
    elsewhere[:3] *= 1_000
    elsewhere[14:] *= 1_000
    assert _separation([[n] for n in seen], 13, 4) == 1
    assert _separation([[n] for n in seen / 7], 13, 4) == 1
    assert _separation([[n] for n in elsewhere], 13, 4) == _separation([[n] for n in norms], 13, 4)
    assert _separation([[1.0]] * 20, 13, 4) == 0.5
    assert _separation([[1.0]] * 12 + [[math.nan]] * 8, 13, 4) == 1


def test_one_layer_among_quiet_ones_is_seen_by_the_layers_and_not_by_the_whole():
    layers = [[1.0 + 0.01 * (step % 3), 1e3 * (1 + 0.1 * (step % 3))] for step in range(20)]
    for step in (12, 13):
        layers[step][0] = 3.0
    assert _separation(layers, 13, 4) == 1
    assert _separation([[math.hypot(*step)] for step in layers], 13, 4) < 0.9


def test_a_drift_of_the_norms_is_no_fault():
    """Every step is compared with the steps just before it."""
    rng = np.random.default_rng(1)
    areas = [_separation([[10 ** (0.01 * s + rng.normal(0, 0.1))] for s in range(60)], 41, 20) for _ in range(200)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.04)


def test_separation_is_recorded_for_both_norms_where_a_fault_lasts(trial):
    for fault in ("raised_lr", "dead_layer"):
        measured = trial(fault)[1]
        arms = {arm: values(measured, arm=arm)[SEPARATION.name] for arm in ("global_norm", "layer_norm")}
        assert all(0 <= area <= 1 for area in arms.values())
    assert SEPARATION.name not in values(trial("high_lr")[1])


def test_the_thresholds_of_the_settings_are_those_of_the_monitor(trial, tmp_path):
    settings = {k: v for k, v in dataclasses.asdict(RUN).items() if k != "seeds"} | {"exploding_above": 1e-3}
    spec = TrialSpec(
        experiment=EXPERIMENT.name,
        version=EXPERIMENT.version,
        scale="own",
        seed=0,
        factors={"fault": "healthy"},
        settings=settings,
    )
    assert values(run_trial(spec, Context(tmp_path)))["false_alarm"] == 1
    assert values(trial("healthy")[1])["false_alarm"] == 0


def test_every_threshold_is_compared_with_norms_that_the_trials_record(trial):
    for claim in EXPERIMENT.claims:
        if isinstance(claim.estimand, Difference) and claim.estimand.metric == EXTREME_NORM.name:
            for arm in (claim.estimand.first, claim.estimand.second):
                assert EXTREME_NORM.name in values(trial(arm["fault"])[1], arm=arm["arm"]), claim.id


def test_no_claim_is_out_of_reach_from_the_start():
    """A difference of areas can be reached wherever the global norm's area is at most 0.98, and missed anywhere."""
    claims = [c for c in EXPERIMENT.claims if c.estimand.metric == SEPARATION.name]
    assert {c.estimand.where["fault"] for c in claims} == {"raised_lr", "dead_layer"}
    assert all(isinstance(c.estimand, Difference) and c.region.low == 0.02 for c in claims)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 1}, "window must be in [2, (fault_step - 1) / 2], got 1"),
        ({"window": 40}, "got 40 with fault_step 80"),
        ({"vanishing_below": 0.0}, "0 < vanishing_below < exploding_above, got 0.0 and 1000.0"),
        ({"vanishing_below": 1e4}, "0 < vanishing_below < exploding_above, got 10000.0"),
        ({"fault_step": 120}, "fault_step must be in [2, steps), got 120 of 120"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(UserError) as error:
        Settings(**wrong)
    assert message in str(error.value)
