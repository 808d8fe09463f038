"""Claims: an estimand, and the region of its values in which the claim is true.

A claim is declared in the file of the experiment that tests it, before its data exist. Its digest covers everything
that the verdict depends on (estimand, region, alpha), so that a claim edited after its data were seen is recognised.
This module is declarative: how an estimand is estimated is the business of ``analysis.statistics``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

Scalar = str | int | float | bool
Selector = Mapping[str, Scalar]
"""Conditions that a row of observations must equal: ``{"arm": "ema_0.999", "schedule": "cosine"}``."""


@dataclass(frozen=True)
class Region:
    """The closed interval ``[low, high]`` of estimand values in which a claim is true."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if math.isnan(self.low) or math.isnan(self.high) or self.low > self.high:
            raise ValueError(f"a region needs low <= high, got [{self.low}, {self.high}]")


@dataclass(frozen=True)
class RelativeReduction:
    """Mean over seeds of ``(control − treatment) / control``: positive when the treatment lowers the metric.

    Both arms are read at the last recorded step. The unit of replication is the seed.
    """

    metric: str
    treatment: Selector
    control: Selector
    where: Selector = field(default_factory=dict)


@dataclass(frozen=True)
class Regret:
    """Mean over seeds of ``choice / min(rivals) − 1``: what choosing ``choice`` costs against the best rival.

    Negative when the choice beats every rival. The best rival is picked within each seed, on the same data, which
    favours the rivals: the estimate is an upper bound of the regret against any rival fixed beforehand.
    """

    metric: str
    choice: Selector
    rivals: tuple[Selector, ...]
    where: Selector = field(default_factory=dict)


@dataclass(frozen=True)
class ArgBestShift:
    """Mean over seeds of ``log10(best level of ``along`` under ``end`` / best level under ``start``)``.

    The best level minimises the metric; it is interpolated by a parabola in ``log10(along)`` through the best grid
    point and its neighbours, and is the grid point itself at the edge of the grid.
    """

    metric: str
    along: str
    start: Selector
    end: Selector
    where: Selector = field(default_factory=dict)


@dataclass(frozen=True)
class ExactRatio:
    """``numerator / denominator`` of two metrics of one trial, both free of sampling error (counts, bytes).

    The interval is the range over all trials; it carries no confidence level and takes no share of alpha.
    """

    numerator: str
    denominator: str
    where: Selector = field(default_factory=dict)


@dataclass(frozen=True)
class LogLogSlope:
    """Slope of log(metric) against log(step) over the last decade of the run, ``[T/10, T]``, by least squares.

    A narrow interval does not protect from bias: an average that is still leaving its start has a slope of −2 with
    hardly any spread. So the slope counts only where the decade before agrees, the start is forgotten, and the window
    opens late for the length of the average.
    """

    metric: str
    arm: Selector
    where: Selector = field(default_factory=dict)
    agree_within: float = 0.1
    """Largest difference to the slope over the decade before."""
    min_forgetting: float | None = 10.0
    """Least value of the condition ``forgetting`` (μ Σ γ, by which the slowest direction has left its start) at the
    beginning of the window; None where nothing of the kind exists."""
    min_horizons: float = 10.0
    """The window opens after this many times the condition ``horizon_steps``, where it was recorded."""


@dataclass(frozen=True)
class SelectedReduction:
    """Mean over seeds of ``(control − treatment) / control``, each side at its best arm and checkpoint.

    Within a seed and a side, the arm and the step with the least value under ``choose_on`` are chosen, and their value
    under ``report_on`` is read: so that choosing among many decays or checkpoints does not count as a gain.
    """

    metric: str
    treatment: tuple[Selector, ...]
    control: tuple[Selector, ...]
    where: Selector = field(default_factory=dict)
    choose_on: Selector = field(default_factory=lambda: {"split": "validation"})
    report_on: Selector = field(default_factory=lambda: {"split": "test"})


@dataclass(frozen=True)
class Interaction:
    """Mean over seeds of an estimand under ``first`` minus the same estimand under ``second``.

    A difference of differences: how much more a treatment gains in one condition than in another. Both conditions share
    the seed.
    """

    estimand: RelativeReduction | SelectedReduction
    first: Selector
    second: Selector

    @property
    def where(self) -> Selector:
        """The selector that both conditions share."""
        return self.estimand.where


@dataclass(frozen=True)
class Ratio:
    """Mean over seeds of ``numerator / denominator``: the same metric, at the last step, of two arms of one seed."""

    metric: str
    numerator: Selector
    denominator: Selector
    where: Selector = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of ``first − second``: the same metric, at the last step, of two arms of one seed.

    For metrics that are shares or logarithms themselves: a difference of losses is judged as a relative reduction.
    """

    metric: str
    first: Selector
    second: Selector
    where: Selector = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """Share of trials whose metric, at the last step, is 1 and not 0: a probability; the unit is the trial.

    Its interval is the exact binomial one (Clopper & Pearson 1934); trials count as independent.
    """

    metric: str
    where: Selector = field(default_factory=dict)


@dataclass(frozen=True)
class Proportion:
    """Share of the attempts that each trial counts which succeed: a probability; the unit is the attempt.

    Both counts are read at the last step and summed over trials. Its interval is the exact binomial one (Clopper &
    Pearson 1934); attempts count as independent, with one probability for all.
    """

    successes: str
    attempts: str
    where: Selector = field(default_factory=dict)


@dataclass(frozen=True)
class Exact:
    """An estimand of values that were computed without sampling error, one per trial.

    The interval is the range over all trials; it carries no confidence level and takes no share of alpha.
    """

    estimand: RelativeReduction | Regret | ArgBestShift | LogLogSlope

    @property
    def where(self) -> Selector:
        """The selector of the estimand itself."""
        return self.estimand.where


Estimand = (
    RelativeReduction
    | SelectedReduction
    | Interaction
    | Ratio
    | Difference
    | Rate
    | Proportion
    | Regret
    | ArgBestShift
    | LogLogSlope
    | ExactRatio
    | Exact
)


def is_exact(estimand: Estimand) -> bool:
    """Whether its values have no sampling error."""
    return isinstance(estimand, Exact | ExactRatio)


def bare(estimand: Estimand) -> Estimand:
    """The estimand itself, without the mark that it is exact."""
    return estimand.estimand if isinstance(estimand, Exact) else estimand


@dataclass(frozen=True)
class Claim:
    """A sentence of a guide as a rule that data can break.

    Raises:
        ValueError: if ``alpha`` is not in (0, 1) or ``id`` is not lower-case words joined by hyphens.
    """

    id: str
    """Unique over all experiments: ``ema-0.999-lowers-loss-cosine``."""
    statement: str
    """The claim in one sentence, as its source puts it (Russian, since THEORY.md shows it)."""
    section: str
    """The section of THEORY.md that shows its verdict: a marker name such as ``ema``."""
    source: str
    """Where it is said: ``seed 003, «Выбор decay»``."""
    estimand: Estimand
    region: Region
    alpha: float = 0.05
    """Family-wise error rate of the experiment's intervals."""
    condition: str = ""
    """Under which condition, where a sentence is judged under several: in a few words, beside its statement."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be in (0, 1), got {self.alpha}")
        if not self.id or any(c not in "abcdefghijklmnopqrstuvwxyz0123456789.-" for c in self.id):
            raise ValueError(f"a claim id is lower-case letters, digits, dots and hyphens, got {self.id!r}")

    @property
    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of estimand, region and alpha."""
        rule = {
            "estimand": _rule(self.estimand),
            "region": [str(self.region.low), str(self.region.high)],
            "alpha": self.alpha,
        }
        return hashlib.sha256(json.dumps(rule, sort_keys=True).encode()).hexdigest()[:16]


def _rule(estimand: Estimand) -> list[object]:
    if isinstance(estimand, Exact):
        return ["Exact", _rule(estimand.estimand)]
    if isinstance(estimand, Interaction):
        return ["Interaction", _rule(estimand.estimand), dict(estimand.first), dict(estimand.second)]
    return [type(estimand).__name__, dataclasses.asdict(estimand)]
