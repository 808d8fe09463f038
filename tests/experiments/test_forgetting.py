"""The design of ``forgetting``: what differs between its cells, what is measured, that it resumes, wrong input."""

from __future__ import annotations

import pytest

from experiments.forgetting import BASE, CLAIMS, EXPERIMENT, HIGH_RATE, METHODS, SCALES, SMALL_DATA, Cells, trials
from experiments.harness.experiment import Preempted, UserError
from tests.experiments.stopping import Context

SMOKE = SCALES["smoke"]


def spec_of(method, cell, seed=0):
    (spec,) = [s for s in trials(SMOKE, "smoke") if s.seed == seed and s.factors == {"method": method, "cell": cell}]
    return spec


def figures(measurements):
    return {(o.metric, o.split, o.arm): o.value for o in measurements.observations if o.metric != "perplexity"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """``measured(method, cell)``, each trial run once."""
    known = {}

    def run(method, cell):
        if (method, cell) not in known:
            known[method, cell] = EXPERIMENT.run_trial(spec_of(method, cell), Context(tmp_path_factory.mktemp("work")))
        return known[method, cell]

    return run


def test_the_plan_has_whole_pairs_seed_by_seed():
    plan = trials(SCALES["cpu"], "cpu")
    assert len(plan) == 5 * len(METHODS) * 3
    assert [s.seed for s in plan] == sorted(s.seed for s in plan)
    assert len({s.campaign_id for s in plan}) == 1
    assert {c.section for c in CLAIMS} == {"classic"}


@pytest.mark.parametrize("method", METHODS)
def test_cells_differ_in_one_thing(method, measured):
    base, small, high = (measured(method, cell) for cell in (BASE, SMALL_DATA, HIGH_RATE))
    for each in (base, small, high):
        assert all(check.passed for check in each.checks)
        assert each.digests == base.digests
        assert each.tokens == base.tokens
        assert set(figures(each)) == {
            (metric, split, arm)
            for metric, split in (("eval_loss", "test"), ("other_domain_loss", "test"), ("eval_loss", "train"))
            for arm in ("initial", "trained")
        }
    expected = {check.name: check.expected for check in base.checks}
    seen = {cell: {c.name: c.observed for c in each.checks} for cell, each in (("small", small), ("high", high))}
    assert float(seen["small"]["passes_over_the_data"]) == SMOKE.cells.passes > float(expected["passes_over_the_data"])
    assert float(seen["high"]["peak_learning_rate"]) == pytest.approx(10 * float(expected["peak_learning_rate"]))
    before = ("other_domain_loss", "test", "initial")
    assert figures(base)[before] == figures(small)[before] == figures(high)[before]
    after = ("other_domain_loss", "test", "trained")
    assert len({figures(each)[after] for each in (base, small, high)}) == 3


def test_the_training_loss_is_that_of_the_blocks_that_are_trained_on(measured):
    at = ("eval_loss", "train", "initial")
    assert figures(measured("full", BASE))[at] != figures(measured("full", SMALL_DATA))[at]


def test_a_trial_that_was_stopped_ends_the_same(measured, tmp_path):
    spec = spec_of("full", SMALL_DATA)
    with pytest.raises(Preempted):
        EXPERIMENT.run_trial(spec, Context(tmp_path, stop_at=2))
    assert figures(EXPERIMENT.run_trial(spec, Context(tmp_path))) == figures(measured("full", SMALL_DATA))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 40, "passes": 7}, "passes must divide steps = 40, got 7"),
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"high_rate_factor": 1.0}, "high_rate_factor must be above 1, got 1.0"),
        ({"lora_learning_rate": 0.0}, "lora_learning_rate must be positive, got 0.0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        Cells(**changes)
