"""Tuning as part of a method: the space, the budget, what is the same for every method, and resuming."""

from __future__ import annotations

import json
import math

import pytest

from experiments.harness.experiment import Preempted, UserError
from experiments.harness.tuning import Candidate, Space, TuningRun, best_of, mean_over_rates, tune

SPACE = Space(1e-5, 1e-1, common=3, runs=8, sizes=(8, 16, 32))


def nothing(number):
    """Goes on."""


def loss_of(candidate):
    """Least at a rate of 1e-3 and the largest size."""
    size = candidate.size or 32
    return {"eval_loss": 1 + abs(math.log10(candidate.learning_rate) + 3) + 1 / size}


def run_of(loss, *, common=True, **figures):
    return TuningRun(Candidate(1e-3, 8), common, {"eval_loss": loss, **figures})


def test_common_rates_are_the_middles_of_equal_parts():
    assert Space(1e-5, 1e-1, 2, 2).common_rates == pytest.approx((1e-4, 1e-2))
    assert SPACE.common_rates == pytest.approx((10 ** (-5 + 4 / 6), 1e-3, 10 ** (-1 - 4 / 6)))


def test_a_study_spends_its_budget_and_begins_with_the_common_rates_at_the_middle_size(tmp_path):
    asked = []
    runs = tune(loss_of, SPACE, 0, tmp_path / "runs.json", asked.append)
    assert asked == list(range(8)) and len(runs) == 8
    assert [run.candidate.learning_rate for run in runs[:3]] == pytest.approx(SPACE.common_rates)
    assert {run.candidate.size for run in runs[:3]} == {16}
    assert [run.common for run in runs] == [True] * 3 + [False] * 5
    assert all(1e-5 <= run.candidate.learning_rate <= 1e-1 and run.candidate.size in SPACE.sizes for run in runs)
    assert len({run.candidate for run in runs}) == 8


@pytest.mark.parametrize("best", [4.6e-5, 1.6e-4, 5e-4, 7e-3, 4e-2])
def test_two_runs_after_the_common_ones_come_near_the_best_rate_on_either_side(tmp_path, best):
    """Where no common rate is near; half of the gap between two of them is 0.59 decades."""

    def loss(candidate):
        return {"eval_loss": 0.45 + 0.2 * math.log10(candidate.learning_rate / best) ** 2}

    space = Space(3e-5, 1e-1, common=3, runs=5)
    for seed in range(2):
        runs = tune(loss, space, seed, tmp_path / f"{seed}.json", nothing)
        nearest = min(abs(math.log10(run.candidate.learning_rate / best)) for run in runs)
        assert nearest < 0.25


def test_without_a_size_only_the_rate_is_searched(tmp_path):
    runs = tune(loss_of, Space(1e-5, 1e-1, 2, 4), 0, tmp_path / "runs.json", nothing)
    assert {run.candidate.size for run in runs} == {None}


def test_the_seed_decides_what_is_tried(tmp_path):
    first, again, other = (
        tune(loss_of, SPACE, seed, tmp_path / f"{i}.json", nothing) for i, seed in enumerate((0, 0, 1))
    )
    assert first == again
    assert first[:3] == other[:3] and first[3:] != other[3:]


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_an_interrupted_study_ends_as_one_that_was_not(tmp_path, stop_at):
    whole = tune(loss_of, SPACE, 3, tmp_path / "whole.json", nothing)
    trained = []

    def train(candidate):
        trained.append(candidate)
        return loss_of(candidate)

    def before(number):
        if number == stop_at and len(trained) == stop_at:
            raise Preempted

    with pytest.raises(Preempted):
        tune(train, SPACE, 3, tmp_path / "parts.json", before)
    assert len(json.loads((tmp_path / "parts.json").read_text())) == stop_at
    for _ in range(2):
        assert tune(train, SPACE, 3, tmp_path / "parts.json", nothing) == whole
        assert len(trained) == SPACE.runs


def test_a_loss_that_is_not_finite_never_wins(tmp_path):
    losses = iter([math.nan, 2.0, math.inf, 1.5, math.nan, 1.7, 3.0, 4.0])
    runs = tune(lambda _: {"eval_loss": next(losses)}, SPACE, 0, tmp_path / "runs.json", nothing)
    assert best_of(runs) == runs[3]
    again = tune(loss_of, SPACE, 0, tmp_path / "runs.json", nothing)
    assert [run.score for run in again] == [run.score for run in runs]


def test_of_equal_runs_the_first_wins_and_without_a_finite_one_none():
    assert best_of([run_of(2.0), first := run_of(1.0), run_of(1.0)]) is first
    assert best_of([run_of(math.nan), run_of(math.inf)]) is None


def test_the_mean_is_over_the_common_rates():
    runs = [run_of(1.0, accuracy=0.5), run_of(math.nan, accuracy=0.7), run_of(1.0, common=False, accuracy=0.0)]
    assert mean_over_rates(runs, "accuracy") == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1e-1, 3, 8), r"learning rates must be an interval above 0, got 0\.0 to 0\.1; lower the first"),
        ((1e-1, 1e-1, 3, 8), r"learning rates must be an interval above 0, got 0\.1 to 0\.1"),
        ((1e-5, 1e-1, 0, 8), r"common rates must be at least 1 and at most the 8 tuning runs, got 0"),
        ((1e-5, 1e-1, 9, 8), r"at most the 8 tuning runs, got 9; raise the tuning runs"),
    ],
)
def test_wrong_spaces(arguments, message):
    with pytest.raises(UserError, match=message):
        Space(*arguments)


def test_what_another_study_has_tried_is_trained_anew(tmp_path):
    """As after an update of Optuna: the file holds figures of settings that this study does not ask for."""
    file = tmp_path / "runs.json"
    tune(loss_of, SPACE, 3, file, nothing)
    asked = []
    runs = tune(loss_of, SPACE, 4, file, asked.append)
    assert asked == [3, 4, 5, 6, 7]
    assert runs == tune(loss_of, SPACE, 4, tmp_path / "fresh.json", nothing)
