"""Tuning as a part of a method: a seeded study with a fixed budget of training runs, which resumes.

Every study begins with the same learning rates at the method's middle size, so that methods can be compared at equal
rates too; what follows is suggested by a Gaussian process (Optuna's ``GPSampler``). With two runs after three common
ones the tree-structured Parzen estimator searches on one side of the best rate only, so that a method whose best rate
lies between two common ones would seem worse than it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.harness.experiment import UserError
from experiments.harness.record import Metric

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BASE_PARAMS = Metric("base_params", "1", "none")
TRAINABLE_SHARE = Metric("trainable_share", "1", "none")
SAVED = Metric("saved_bytes", "bytes", "minimize")
CHOSEN_RATE = Metric("chosen_learning_rate", "1", "none")
CHOSEN_SIZE = Metric("chosen_size", "1", "none")
DIVERGED_RUNS = Metric("diverged_tuning_runs", "1", "minimize")
RATE_MEAN = Metric("mean_accuracy_over_learning_rates", "1", "maximize")
REACHED = Metric("reached_target", "1", "maximize")
SECONDS_TO_TARGET = Metric("seconds_to_target", "s", "minimize")
BYTES_TO_TARGET = Metric("bytes_to_target", "bytes", "minimize")
RANK_SUM = Metric("rank_sum", "1", "none")
RANK_BUDGET = Metric("rank_budget", "1", "none")

FIRST_TUNING_SEED = 10_000
"""Studies train on this seed and those above it, final runs on those below."""


@dataclass(frozen=True)
class Candidate:
    """One setting of a method."""

    learning_rate: float
    size: int | None
    """The method's own size; None where it has none."""


@dataclass(frozen=True)
class TuningRun:
    """One training run of a study and what came of it."""

    candidate: Candidate
    common: bool
    """Whether its learning rate is one with which every study begins."""
    figures: dict[str, float]
    """At least ``eval_loss`` on validation, which decides."""

    @property
    def score(self) -> float:
        """The validation loss; infinite where it is not finite."""
        loss = self.figures["eval_loss"]
        return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Space:
    """What is searched, and with how many training runs.

    Raises:
        UserError: if the rates are no interval, or the budget does not hold the common runs.
    """

    lowest_rate: float
    highest_rate: float
    common: int
    """Runs at common learning rates, evenly spread over the range in logarithms."""
    runs: int
    """Training runs in all."""
    sizes: tuple[int, ...] = ()
    """Sizes of the method in rising order; empty where it has none."""

    def __post_init__(self) -> None:
        if not 0 < self.lowest_rate < self.highest_rate:
            raise UserError(
                f"learning rates must be an interval above 0, got {self.lowest_rate} to {self.highest_rate}; "
                "lower the first or raise the second"
            )
        if not 1 <= self.common <= self.runs:
            raise UserError(
                f"runs at common rates must be at least 1 and at most the {self.runs} tuning runs, got {self.common}; "
                "raise the tuning runs or lower the common ones"
            )

    @property
    def common_rates(self) -> tuple[float, ...]:
        """Middles of ``common`` equal parts of the range, in logarithms."""
        decades = math.log10(self.highest_rate / self.lowest_rate)
        return tuple(self.lowest_rate * 10 ** (decades * (i + 0.5) / self.common) for i in range(self.common))


def tune(
    train: Callable[[Candidate], dict[str, float]],
    space: Space,
    seed: int,
    file: Path,
    before_each: Callable[[int], None],
) -> list[TuningRun]:
    """Run a study to the end of its budget; runs that ``file`` has from an earlier call are not trained again.

    The sampler is seeded and sees the same results in the same order, so that an interrupted study ends as one that
    was not. Should it suggest something else than ``file`` has there (another version of Optuna), that run and those
    after it are trained anew.

    Args:
        train: trains and gives the figures of one candidate on validation.
        space: what is searched.
        seed: of the sampler.
        file: JSON of finished runs, written after each.
        before_each: called with the number of the run before it is trained; may raise to stop here.

    Returns:
        All runs of the budget in order.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=space.common)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    middle = {"size_number": len(space.sizes) // 2} if space.sizes else {}
    for rate in space.common_rates:
        study.enqueue_trial({"learning_rate": rate, **middle})
    finished = read_runs(file)
    runs: list[TuningRun] = []
    for number in range(space.runs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Clip non-finite values")  # of runs that diverged
            trial = study.ask()
            rate = trial.suggest_float("learning_rate", space.lowest_rate, space.highest_rate, log=True)
            size = space.sizes[trial.suggest_int("size_number", 0, len(space.sizes) - 1)] if space.sizes else None
        candidate = Candidate(rate, size)
        if number < len(finished) and finished[number]["candidate"] == dataclasses.asdict(candidate):
            runs.append(TuningRun(candidate, number < space.common, finished[number]["figures"]))
        else:
            finished = []
            before_each(number)
            runs.append(TuningRun(candidate, number < space.common, train(candidate)))
            write_runs(file, runs)
        study.tell(trial, runs[-1].score)
    return runs


def best_of(runs: Sequence[TuningRun]) -> TuningRun | None:
    """The run with the least validation loss, of equal ones the first; None if none has a finite one."""
    best = min(runs, key=lambda run: run.score)
    return best if math.isfinite(best.score) else None


def mean_over_rates(runs: Sequence[TuningRun], figure: str) -> float:
    """Mean of a figure over the common learning rates: how well a method does where nobody has tuned its rate.

    Direct optimisation of prompts is called «very sensitive to the learning rate and initialization» in
    arXiv:2101.00190 §4.3; this is the first half of it. A spread over the rates would not do: it is least where nothing
    is learned at any of them.
    """
    return statistics.fmean(run.figures[figure] for run in runs if run.common)


def write_runs(file: Path, runs: Sequence[DataclassInstance]) -> None:
    """The runs of a study as JSON, whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps([dataclasses.asdict(run) for run in runs]))
    os.replace(temporary, file)


def read_runs(file: Path) -> list[Any]:
    """What ``write_runs`` wrote, one dict a run; none where there is no file."""
    runs: list[Any] = json.loads(file.read_text()) if file.is_file() else []
    return runs
