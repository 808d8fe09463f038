"""The contract of an experiment, and the registry that finds them.

A newcomer adds an experiment by writing one file in ``experiments/`` with a module-level ``EXPERIMENT``; the file's
name is the experiment's name, its command-line name and its results folder.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from experiments.harness.claims import Claim
from experiments.harness.record import Measurements, TrialSpec

WRONG_INPUT = 2
"""Exit code of a command, or of a worker process, that was asked for something impossible."""


class UserError(Exception):
    """Wrong input: one line with the rule, the value and the fix; exit code 2 on the command line."""


class TrialContext(Protocol):
    """What the runner lends to a trial: a work folder, progress, W&B, and the wish to stop."""

    work_dir: Path
    """Private to the trial and kept until it is finished, so that an interrupted one can resume."""

    def report(self, step: int, total: int, **figures: float | str | None) -> None:
        """Publish progress (``loss``, ``tokens_per_second``, ``phase``) for the live display."""

    def should_stop(self) -> bool:
        """True once the time budget is spent or the user has pressed Ctrl-C: checkpoint and raise Preempted."""

    def wandb_run_id(self) -> str | None:
        """The id of the trial's W&B run, or None when tracking is off."""


class Preempted(Exception):
    """Raised by a trial that stopped early after writing a checkpoint; the queue keeps it for the next call."""


@dataclass(frozen=True)
class Experiment:
    """A design that yields observations of its claims' estimands.

    Any change of design or claim is a new ``version``; results of different versions are never pooled.
    """

    name: str
    version: int
    question: str
    """One line for the list of experiments."""
    claims: tuple[Claim, ...]
    scales: dict[str, Any]
    """One literal table: scale name → settings (a frozen dataclass whose fields are the command-line options)."""
    trials: Callable[[Any, str], list[TrialSpec]]
    """``trials(settings, scale)``: the whole plan, in the order in which it is run."""
    run_trial: Callable[[TrialSpec, TrialContext], Measurements]
    cost: dict[str, str]
    """What each scale costs, in words, for the list: ``{"laptop": "12 min on 2 cores"}``."""

    def spec(self, scale: str, seed: int, factors: dict[str, Any], settings: dict[str, Any]) -> TrialSpec:
        """One trial of this experiment, for ``trials``."""
        return TrialSpec(
            experiment=self.name, version=self.version, scale=scale, seed=seed, factors=factors, settings=settings
        )

    def __post_init__(self) -> None:
        ids = [claim.id for claim in self.claims]
        repeated = sorted({i for i in ids if ids.count(i) > 1})
        if repeated:
            raise ValueError(f"claim ids must be unique, repeated in {self.name}: {', '.join(repeated)}")


def experiment_names() -> list[str]:
    """Names of all experiments, without importing them."""
    folder = str(Path(__file__).resolve().parent.parent)
    return sorted(m.name for m in pkgutil.iter_modules([folder]) if not m.ispkg and m.name != "run")


def load_experiment(name: str) -> Experiment:
    """Import one experiment by name.

    Raises:
        UserError: if there is none of that name; the near misses are listed.
    """
    names = experiment_names()
    if name not in names:
        raise UserError(unknown("experiment", name, names))
    experiment: Experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    if experiment.name != name:
        raise ValueError(f"experiments/{name}.py must define EXPERIMENT with name {name!r}, got {experiment.name!r}")
    return experiment


def load_experiments() -> list[Experiment]:
    """Import all experiments and refuse (UserError) a claim id that two of them use."""
    experiments = [load_experiment(name) for name in experiment_names()]
    owner: dict[str, str] = {}
    for experiment in experiments:
        for claim in experiment.claims:
            if claim.id in owner:
                raise UserError(
                    f"claim ids must be unique over all experiments, got {claim.id!r} in {owner[claim.id]} and "
                    f"{experiment.name}; rename one of them"
                )
            owner[claim.id] = experiment.name
    return experiments


def unknown(kind: str, value: str, known: Iterable[str]) -> str:
    """``unknown scale 'labtop'; did you mean laptop? (known: cpu, gpu, laptop)``."""
    known = sorted(known)
    near = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {kind} {value!r}{hint} (known: {', '.join(known)})"
