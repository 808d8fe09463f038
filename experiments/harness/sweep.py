"""Sweeps: a seeded TPE study with pruning over options of a preset, which resumes; and how much each option matters.

The counterpart of ``tuning`` for more options than a rate and a size. A study begins with the setting that it is to
improve on; what follows is suggested by the tree-structured Parzen estimator (Bergstra et al. 2011), and a run whose
validation loss is above the median of the earlier ones at the same point is stopped there. One study is one trial of
a campaign, and so one worker runs it; several workers, also on several machines, share the studies of a campaign.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.harness.experiment import UserError
from experiments.harness.record import Metric, Scalar
from experiments.harness.tuning import read_runs, write_runs

if TYPE_CHECKING:
    from optuna import Study, Trial

IMPORTANCE = Metric("importance", "1", "none")
"""Share of an option in what tells the best runs of a study from the others."""
RATE_DISTANCE = Metric("learning_rate_distance", "decades", "none")
"""Of a learning rate from the preset's own, upwards or downwards: of the ``chosen`` one, and of the ``threefold`` one,
with which it can be compared."""
PRUNED_RUNS = Metric("pruned_runs", "1", "none")
STEPS_SPENT = Metric("steps_spent", "1", "minimize")
"""Optimizer steps of a study."""

BEST_SHARE = 1 / 3
"""The runs of a study that count as its best where importances are measured."""
PARTS = 3
"""Of the interval of a rate, where importances are measured."""


@dataclass(frozen=True)
class Rates:
    """An option whose values are searched between two bounds, evenly in logarithms."""

    low: float
    high: float


Levels = tuple[Scalar, ...]
"""An option whose values are these."""


@dataclass(frozen=True)
class Space:
    """What is searched, and with how many training runs.

    Raises:
        UserError: if ``start`` is outside, or a number is too small.
    """

    options: Mapping[str, Rates | Levels]
    start: Mapping[str, Scalar]
    """The setting with which the study begins, one value for each option."""
    runs: int
    """Training runs in all, whether or not they are stopped early."""
    looks: int
    """Looks at validation in a run, evenly spread, the last one at its end."""

    def __post_init__(self) -> None:
        for name in ("runs", "looks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of a sweep must be at least 1, got {getattr(self, name)}")
        if self.options.keys() != self.start.keys():
            raise UserError(
                f"a sweep must start with a value for each of {', '.join(self.options)}, got {', '.join(self.start)}"
            )
        for name, distribution in self.distributions.items():
            if not _contains(distribution, self.start[name]):
                raise UserError(
                    f"a sweep must start inside its space, got {name}={self.start[name]}; it has {distribution}: "
                    "widen it"
                )

    @property
    def unpruned(self) -> int:
        """Runs at the beginning that are drawn at random, and finished runs before one may be stopped: a third."""
        return max(1, self.runs // 3)

    @property
    def distributions(self) -> dict[str, Any]:
        """As Optuna has them."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        return {
            name: FloatDistribution(values.low, values.high, log=True)
            if isinstance(values, Rates)
            else CategoricalDistribution(values)
            for name, values in self.options.items()
        }


def _contains(distribution: Any, value: Scalar) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:  # a category that is none of them
        return False


@dataclass(frozen=True)
class SweepRun:
    """One training run of a study and what came of it."""

    values: dict[str, Scalar]
    losses: list[float]
    """On validation, one for each look; of a pruned run those until it was stopped."""
    pruned: bool
    figures: dict[str, float]
    """What else ``train`` gives."""

    @property
    def last_loss(self) -> float:
        """Of all looks the last one; infinite where it is not finite."""
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf

    @property
    def score(self) -> float:
        """The validation loss at the end; infinite where there is none or it is not finite."""
        return math.inf if self.pruned else self.last_loss


class Reports:
    """Takes the validation losses of a run, and says at each whether the run should stop."""

    def __init__(self, trial: Trial, looks: int) -> None:
        self._trial = trial
        self._looks = looks
        self.losses: list[float] = []
        self.pruned = False

    def __call__(self, loss: float) -> bool:
        """Whether to stop; never at the last look, where the run is finished."""
        self.losses.append(loss)
        self._trial.report(loss, len(self.losses))
        if len(self.losses) < self._looks:
            self.pruned = not math.isfinite(loss) or bool(self._trial.should_prune())
        return self.pruned


def sweep(
    train: Callable[[dict[str, Scalar], Reports], dict[str, float]],
    space: Space,
    seed: int,
    file: Path,
    before_each: Callable[[int], None],
) -> list[SweepRun]:
    """Run a study to the end of its budget; runs that ``file`` has from an earlier call are not trained again.

    Sampler and pruner see the same losses in the same order, so that an interrupted study ends as one that was not.
    Should the sampler suggest something else than ``file`` has there (another version of Optuna), that run and those
    after it are trained anew.

    Args:
        train: trains one setting, reports its validation loss at every look, stops when told to, and gives figures.
        space: what is searched.
        seed: of the sampler.
        file: JSON of the runs so far, written after each.
        before_each: called with the number of the run before it is trained; may raise to stop here.

    Returns:
        All runs of the budget in order.
    """
    from optuna.trial import TrialState

    study = _study(space, seed)
    earlier = [SweepRun(**row) for row in read_runs(file)]
    runs: list[SweepRun] = []
    for number in range(space.runs):
        trial = study.ask(space.distributions)
        if number < len(earlier) and earlier[number].values == trial.params:
            run = earlier[number]
            for look, loss in enumerate(run.losses, start=1):
                trial.report(loss, look)
            runs.append(run)
        else:
            earlier = []
            before_each(number)
            reports = Reports(trial, space.looks)
            figures = train(trial.params, reports)
            run = SweepRun(trial.params, reports.losses, reports.pruned, figures)
            runs.append(run)
            write_runs(file, runs)
        if run.pruned:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, run.score)
    return runs


def _study(space: Space, seed: int) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=space.unpruned),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=space.unpruned),
    )
    study.enqueue_trial(dict(space.start))
    return study


def best_run(runs: Sequence[SweepRun]) -> SweepRun | None:
    """The finished run with the least validation loss, of equal ones the first; None if none has a finite one."""
    best = min(runs, key=lambda run: run.score)
    return best if math.isfinite(best.score) else None


def importances(runs: Sequence[SweepRun], space: Space) -> dict[str, float]:
    """How much each option tells the best third of the runs from all of them: shares that sum to 1.

    PED-ANOVA (arXiv:2304.10255): the Pearson divergence between the values of the best and those of all. It needs no
    more than the order of the runs, so that stopped ones have a place too: behind the finished ones, those that were
    stopped later first, as TPE itself orders them. A rate counts by the third of its interval in which it lies: over
    a continuum a handful of runs diverges from the others by chance, and more so than over a few levels. The shares
    hold for this space: a wider interval of an option makes it matter more. Of a dozen runs they are a sketch: averages
    over studies say more than any one of them.

    Args:
        runs: of one study.
        space: in which they were drawn.
    """
    import optuna

    order = sorted(runs, key=lambda run: (-len(run.losses), run.last_loss))
    study = optuna.create_study()
    levels = {name: range(PARTS) if isinstance(kind, Rates) else kind for name, kind in space.options.items()}
    distributions = {name: optuna.distributions.CategoricalDistribution(tuple(kind)) for name, kind in levels.items()}
    for place, run in enumerate(order):
        params = {name: _level(run.values[name], kind) for name, kind in space.options.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=float(place)))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are few runs
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _level(value: Any, kind: Rates | Levels) -> Scalar:
    """The value itself, or the part of its interval in which a rate lies."""
    if not isinstance(kind, Rates):
        return value  # type: ignore[no-any-return]
    return min(PARTS - 1, int(PARTS * math.log(value / kind.low) / math.log(kind.high / kind.low)))
