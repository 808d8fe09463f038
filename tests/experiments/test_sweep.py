"""A sweep: where it begins, what it prunes, that it resumes, what importances say, wrong spaces."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments.harness.experiment import Preempted, UserError
from experiments.harness.sweep import Rates, Space, SweepRun, best_run, importances, sweep

START = {"learning_rate": 1e-5, "warmup_steps": 500, "lr_scheduler_type": "cosine"}
OPTIONS = {
    "learning_rate": Rates(1e-5, 1e-1),
    "warmup_steps": (0.0, 0.1, 500),
    "lr_scheduler_type": ("cosine", "linear"),
}
SPACE = Space(OPTIONS, START, runs=18, looks=3)


def nothing(number):
    """Goes on."""


def final_loss(values):
    """Least at a rate of 1e-3; hardly anything else matters."""
    return 1 + abs(math.log10(values["learning_rate"]) + 3) + 0.001 * (values["warmup_steps"] == 500)


def train(values, report):
    """A loss that falls to its end in three looks."""
    for look in (1, 2, 3):
        if report(final_loss(values) + 3 - look):
            break
    return {"steps": float(10 * look)}


def run_of(*losses, pruned=False, **values):
    return SweepRun({**START, **values}, list(losses), pruned, {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that ran to its end."""
    return sweep(train, SPACE, 3, tmp_path_factory.mktemp("whole") / "study.json", nothing)


def test_the_study_spends_its_budget_and_begins_with_the_start(whole):
    assert len(whole) == SPACE.runs
    assert whole[0].values == START and not whole[0].pruned
    for run in whole:
        assert run.values.keys() == OPTIONS.keys()
        assert 1e-5 <= run.values["learning_rate"] <= 1e-1 and run.values["warmup_steps"] in OPTIONS["warmup_steps"]


def test_runs_above_the_median_are_stopped_and_only_those(whole):
    """By hand: at each look before the last, against the finished runs before it."""
    for number, run in enumerate(whole):
        finished = [other for other in whole[:number] if not other.pruned]
        stopped = None
        if len(finished) >= SPACE.unpruned:
            for look in range(SPACE.looks - 1):
                losses = sorted(other.losses[look] for other in finished)
                middle = len(losses) // 2
                median = losses[middle] if len(losses) % 2 else (losses[middle - 1] + losses[middle]) / 2
                if final_loss(run.values) + 2 - look > median:
                    stopped = look + 1
                    break
        assert (run.pruned, len(run.losses)) == (stopped is not None, stopped or SPACE.looks), number
        assert run.figures["steps"] == 10 * len(run.losses)
    assert any(run.pruned for run in whole) and not any(run.pruned for run in whole[: SPACE.unpruned])


def test_the_best_run_is_a_finished_one_no_worse_than_the_start(whole):
    best = best_run(whole)
    assert not best.pruned and best.score == min(run.losses[-1] for run in whole if not run.pruned)
    assert best.score < whole[0].score
    assert best_run([run_of(2.0, 1.0, pruned=True), first := run_of(3.0), run_of(3.0)]) is first
    assert best_run([run_of(1.0, pruned=True), run_of(math.nan), run_of(math.inf)]) is None


@pytest.mark.parametrize("stop_at", [1, 7, 17])
def test_an_interrupted_study_ends_as_one_that_was_not(tmp_path, whole, stop_at):
    """Also where Ctrl-C or a crash hits the middle of a run, which is trained again."""
    trained = []

    def counted(values, report):
        trained.append(values)
        if len(trained) == stop_at + 1:
            report(1.0)
            raise KeyboardInterrupt
        return train(values, report)

    def before(number):
        if number == stop_at + 1:
            raise Preempted

    file = tmp_path / "study.json"
    with pytest.raises(KeyboardInterrupt):
        sweep(counted, SPACE, 3, file, nothing)
    assert len(json.loads(file.read_text())) == stop_at
    if stop_at + 1 < SPACE.runs:
        with pytest.raises(Preempted):
            sweep(counted, SPACE, 3, file, before)
    for _ in range(2):
        assert sweep(counted, SPACE, 3, file, nothing) == whole
        assert len(trained) == SPACE.runs + 1


def test_the_seed_decides_what_is_tried(tmp_path, whole):
    other = sweep(train, SPACE, 4, tmp_path / "study.json", nothing)
    assert other[0] == whole[0] and [run.values for run in other[1:]] != [run.values for run in whole[1:]]


def test_a_loss_that_is_not_finite_stops_its_run_at_once_and_never_wins(tmp_path):
    def diverging(values, report):
        for look in (1, 2, 3):
            if report(math.nan if values["learning_rate"] > 1e-3 else float(look)):
                break
        return {}

    runs = sweep(diverging, SPACE, 0, tmp_path / "study.json", nothing)
    broken = [run for run in runs if run.values["learning_rate"] > 1e-3]
    assert broken and all(run.pruned and len(run.losses) == 1 for run in broken)
    assert best_run(runs).values["learning_rate"] <= 1e-3
    restored = sweep(diverging, SPACE, 0, tmp_path / "study.json", nothing)
    assert [run.values for run in restored] == [run.values for run in runs]


def test_importances_find_what_matters(tmp_path, whole):
    shares = importances(whole, SPACE)
    assert shares.keys() == OPTIONS.keys() and sum(shares.values()) == pytest.approx(1)
    space = Space(OPTIONS, START, runs=40, looks=1)
    for matters, loss in (
        ("learning_rate", final_loss),
        ("lr_scheduler_type", lambda values: 1.0 + (values["lr_scheduler_type"] == "cosine") + 0.001 * hash_of(values)),
    ):
        runs = sweep(lambda v, report, loss=loss: {"stop": report(loss(v))}, space, 0, tmp_path / matters, nothing)
        shares = importances(runs, space)
        assert max(shares, key=shares.get) == matters, shares


def test_by_chance_a_rate_matters_no_more_than_other_options():
    """Losses that depend on nothing: the rate is compared with the most important other one, so it has less."""
    draw, shares = np.random.default_rng(0), []
    space = Space(OPTIONS, START, runs=12, looks=1)
    for _ in range(60):
        runs = [
            run_of(
                draw.random(),
                learning_rate=10 ** draw.uniform(-5, -1),
                warmup_steps=(0.0, 0.1, 500)[draw.integers(3)],
                lr_scheduler_type=("cosine", "linear")[draw.integers(2)],
            )
            for _ in range(12)
        ]
        found = importances(runs, space)
        rate = found.pop("learning_rate")
        shares.append(rate / (rate + max(found.values())))
    assert 0.2 < np.mean(shares) < 0.5


def hash_of(values):
    """Noise that is the same for the same rate."""
    return math.sin(1e6 * values["learning_rate"])


def test_pruned_runs_count_behind_the_finished_ones():
    """The three finished runs of nine share an option, which so matters most, though pruned losses are lower."""
    options = {"lr_scheduler_type": ("cosine", "linear"), "warmup_steps": (0.0, 0.1)}
    start = {"lr_scheduler_type": "cosine", "warmup_steps": 0.0}
    space = Space(options, start, runs=9, looks=2)
    runs = [
        SweepRun(
            {"lr_scheduler_type": "linear" if i < 3 else "cosine", "warmup_steps": 0.1 * (i % 2)},
            [5.0, 3.0] if i < 3 else [0.1],
            i >= 2,
            {},
        )
        for i in range(9)
    ]
    shares = importances(runs, space)
    assert shares["lr_scheduler_type"] > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 0}, "runs of a sweep must be at least 1, got 0"),
        ({"looks": 0}, "looks of a sweep must be at least 1, got 0"),
        ({"start": {"learning_rate": 1e-3}}, "a value for each of learning_rate, warmup_steps, lr_.*got learning_rate"),
        ({"start": {**START, "learning_rate": 1.0}}, r"start inside its space, got learning_rate=1\.0; .*widen it"),
        ({"start": {**START, "lr_scheduler_type": "poly"}}, "start inside its space, got lr_scheduler_type=poly"),
    ],
)
def test_wrong_spaces(change, message):
    with pytest.raises(UserError, match=message):
        Space(**{"options": OPTIONS, "start": START, "runs": 4, "looks": 3, **change})
