"""The curve of averaging lengths: where its snapshots lie, what an interruption leaves of it, what its clock counts."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
import torch

from experiments.ema_conditions import EXPERIMENT, SCALES, trials
from experiments.harness.averaging import FOLLOWED, LENGTHS, SMOKE_CURVE, WIDEST, AveragingCurve
from experiments.harness.experiment import Preempted, UserError
from experiments.harness.posthoc import CurveCallback
from forge.posthoc_ema import WIDEST as WIDEST_OF_FORGE
from forge.posthoc_ema import combine, exponential_profile, gamma_of, power_profile
from tests.experiments.stopping import Context


def test_lengths_are_equally_spaced_and_in_range():
    ratios = [longer / shorter for shorter, longer in pairwise(LENGTHS)]
    assert len(LENGTHS) == 12 and ratios == pytest.approx([2 ** (1 / 3)] * 11, rel=0.01)
    assert WIDEST == WIDEST_OF_FORGE and LENGTHS[-1] < WIDEST


@pytest.mark.parametrize("steps", [200, 1_000, 10_000])
def test_every_length_comes_out_of_the_followed_ones_within_a_tenth(steps):
    """What the design promises of its profiles, whatever is trained; and of the exponential one that is checked."""
    curve = AveragingCurve()
    updates = [step // curve.follow_every for step in curve.snapshot_steps(steps)]
    stored = [power_profile(gamma_of(width), at) for at in updates for width in FOLLOWED]
    errors = [combine(stored, power_profile(gamma_of(width), updates[-1]))[1] for width in LENGTHS]
    assert max(errors) < 0.103
    assert combine(stored, exponential_profile(0.5 ** (10 / updates[-1]), updates[-1]))[1] < 0.03


def test_snapshots_are_multiples_of_the_updates_and_include_the_last_step():
    curve = AveragingCurve()
    assert curve.snapshot_steps(200) == tuple(range(20, 201, 20))
    assert AveragingCurve(snapshots=20).snapshot_steps(3_000)[-2:] == (2_888, 3_000)
    assert curve.spread(3, 160) == (48, 112, 160)
    assert SMOKE_CURVE.snapshot_steps(2) == (1, 2)
    assert set(curve.spread(4, 198)) <= set(curve.snapshot_steps(198))


def test_settings_survive_a_record():
    curve = AveragingCurve((0.05, 0.1), snapshots=7)
    assert AveragingCurve.of(json.loads(json.dumps(dataclasses.asdict(curve)))) == curve


def test_more_checkpoints_than_snapshots_are_refused():
    with pytest.raises(UserError, match=r"evaluations must be in \[1, snapshots of the run = 3\], got 4"):
        dataclasses.replace(SCALES["smoke"], cells=dataclasses.replace(SCALES["smoke"].cells, evaluations=4))


def spec(condition="base"):
    (found, *_) = [s for s in trials(SCALES["smoke"], "smoke") if s.factors["condition"] == condition]
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return EXPERIMENT.run_trial(spec(), Context(tmp_path_factory.mktemp("work")))


def timeless(measurements):
    return [row for row in measurements.observations if row.unit != "s"]


def test_every_length_is_evaluated_at_every_checkpoint(measured):
    assert all(check.passed for check in measured.checks)
    rows = {(o.arm, o.step, o.split) for o in timeless(measured)}
    arms = {"raw", *(arm["arm"] for arm in AveragingCurve().arms)}
    assert rows == {(arm, step, split) for arm in arms for step in (2, 4, 6) for split in ("validation", "test")}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_trial_ends_as_if_it_had_not_been(measured, tmp_path, stop):
    with pytest.raises(Preempted):
        EXPERIMENT.run_trial(spec(), Context(tmp_path, stop_at=stop))
    kept = json.loads((tmp_path / "curve_seconds.json").read_text())
    assert kept["step"] == stop and kept["seconds"]["steps"] > 0
    resumed = EXPERIMENT.run_trial(spec(), Context(tmp_path))
    assert timeless(resumed) == timeless(measured)
    assert resumed.checks == measured.checks
    seconds = {o.part: o.value for o in resumed.observations if o.unit == "s"}
    assert seconds["steps"] > kept["seconds"]["steps"], "the clock goes on where it stood"


def test_a_large_batch_is_a_treatment(tmp_path):
    large = EXPERIMENT.run_trial(spec("large_batch"), Context(tmp_path))
    (check,) = (check for check in large.checks if check.name == "batch_size")
    assert check.passed and check.observed == "8"


def test_an_average_that_is_not_updated_or_not_stored_fails_the_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(
        CurveCallback,
        "_snapshot",
        lambda self: {**self.ema.state_dict(), "update_every": 1, "relative_to_start": False},
    )
    monkeypatch.setattr("experiments.harness.posthoc.FOLLOWED", (1e-4, 2e-4))
    failed = EXPERIMENT.run_trial(spec(), Context(tmp_path))
    assert "curve_equals_raw" in {check.name for check in failed.checks if not check.passed}


def test_the_weights_come_back_after_the_curve(tmp_path, monkeypatch):
    seen = []
    along = CurveCallback.along

    def watched(self, model, step):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        yield from along(self, model, step)
        seen.append(all(torch.equal(p, before[name]) for name, p in model.named_parameters()))

    monkeypatch.setattr(CurveCallback, "along", watched)
    EXPERIMENT.run_trial(spec(), Context(tmp_path))
    assert seen == [True] * 3
