"""The curve of averaging lengths: where its snapshots lie, and what its profiles promise."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest

from experiments.harness.averaging import FOLLOWED, LENGTHS, SMOKE_CURVE, WIDEST, AveragingCurve
from forge.posthoc_ema import WIDEST as WIDEST_OF_FORGE
from forge.posthoc_ema import combine, exponential_profile, gamma_of, power_profile


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
