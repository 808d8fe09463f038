"""Estimators of the estimands that claims declare: observations → one value per seed.

Serves every section of THEORY.md. The unit of replication is the training seed: arms of one seed share initial
weights, data order and dropout masks, so each estimand is computed within a seed, and ``analysis.statistics`` averages
the seeds. Nothing is guessed: a selector that is wrong or ambiguous, or an incomplete pair, is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from experiments.harness.claims import (
    ArgBestShift,
    Estimand,
    Exact,
    ExactRatio,
    LogLogSlope,
    Regret,
    RelativeReduction,
    Selector,
    SpreadReduction,
)
from experiments.harness.experiment import unknown

MIN_SPREAD_STEPS = 4
MIN_SLOPE_STEPS = 4


class CannotEstimate(ValueError):
    """The observations do not determine the estimand; the message says the rule, the value and the fix."""


def per_seed_values(estimand: Estimand, observations: pd.DataFrame) -> pd.Series[float]:
    """The estimand of each replicate.

    Args:
        estimand: what to estimate; its selectors must name columns of ``observations``.
        observations: tidy rows as ``analysis.load.Campaign.observations`` gives them.

    Returns:
        One dimensionless value per seed, indexed by ``seed`` in rising order; for an exact one one per
        trial, indexed by ``trial_id``.

    Raises:
        CannotEstimate: if a selector is wrong or ambiguous, a pair is incomplete, or a value is not usable.
    """
    rows = select(observations, estimand.where)
    match estimand:
        case RelativeReduction(metric, treatment, control):
            t, c = _arms(_of_metric(rows, metric), {"treatment": treatment, "control": control}, _last)
            return (c - t) / _positive(c, f"{metric} of the control")
        case Regret(metric, choice, rivals):
            roles = {"choice": choice} | {f"rival {i}": rival for i, rival in enumerate(rivals, start=1)}
            chosen, *others = _arms(_of_metric(rows, metric), roles, _last)
            if not others:
                raise CannotEstimate("a regret needs at least 1 rival, got none; name the rivals in the claim")
            return chosen / _positive(pd.concat(others, axis=1).min(axis=1), f"{metric} of the best rival") - 1
        case ArgBestShift(metric, along, start, end):
            rows = _with_level(_of_metric(rows, metric), along)
            first, last = _arms(rows, {"start": start, "end": end}, partial(_log10_best, along=along))
            return last - first
        case SpreadReduction(metric, treatment, control):
            rows = _of_metric(rows, metric)
            _require_same_steps(select(rows, treatment), select(rows, control))
            t, c = _arms(rows, {"treatment": treatment, "control": control}, _residual_sd)
            return 1 - t / _positive(c, f"residual standard deviation of {metric} of the control")
        case LogLogSlope(metric, arm):
            (slopes,) = _arms(_of_metric(rows, metric), {"arm": arm}, partial(_log_log_slopes, rule=estimand))
            return slopes
        case Exact(inner):
            return _per_trial(inner, rows)
        case ExactRatio(numerator, denominator):
            top, bottom = (_one_each(_of_metric(rows, name), ["trial_id"], name) for name in (numerator, denominator))
            _require_same("trial", {numerator: top, denominator: bottom})
            return top / _positive(bottom, denominator)


def select(observations: pd.DataFrame, selector: Selector) -> pd.DataFrame:
    """The rows that equal the selector in every column it names; possibly none.

    Raises:
        CannotEstimate: if the selector names a column that does not exist.
    """
    rows = observations
    for name, level in selector.items():
        if name not in observations.columns:
            raise CannotEstimate(
                "a selector must name a condition that was recorded: " + unknown("column", name, observations.columns)
            )
        rows = rows[rows[name] == level]
    return rows


def _arms(
    rows: pd.DataFrame, roles: Mapping[str, Selector], read: Callable[[pd.DataFrame, str], pd.Series[float]]
) -> list[pd.Series[float]]:
    """Reduce the rows of each arm to one value per seed, and require that the arms have the same seeds."""
    arms: dict[str, pd.Series[float]] = {}
    for role, selector in roles.items():
        name = f"{role} {{{', '.join(f'{key}={level}' for key, level in selector.items())}}}"
        selected = select(rows, selector)
        if selected.empty:
            raise CannotEstimate(f"every arm needs observations, got none for {name}; correct the selector or run it")
        arms[name] = read(selected, name)
    _require_same("seed", arms)
    return list(arms.values())


def _require_same(unit: str, arms: Mapping[str, pd.Series[float]]) -> None:
    """Pairs are needed: every arm must have every replicate."""
    everywhere = sorted(set().union(*(arm.index for arm in arms.values())))
    for name, arm in arms.items():
        if missing := [str(replicate) for replicate in everywhere if replicate not in arm.index]:
            raise CannotEstimate(
                f"estimates are paired within {unit}, but {name} lacks {unit} {', '.join(missing)}; run what is missing"
            )


def _of_metric(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    selected = select(rows, {"metric": metric})
    if selected.empty:
        raise CannotEstimate("a claim needs a recorded metric: " + unknown("metric", metric, set(rows["metric"])))
    return selected


def _one_each(rows: pd.DataFrame, keys: list[str], name: str) -> pd.Series[float]:
    """The single finite value of each key, indexed by the keys in rising order."""
    repeated = rows[rows.duplicated(keys, keep=False)]
    if not repeated.empty:
        group = repeated[(repeated[keys] == repeated[keys].iloc[0]).all(axis=1)]
        vary = [str(c) for c in group if c not in ("trial_id", "value") and group[c].nunique(dropna=False) > 1]
        raise CannotEstimate(
            f"a selector must pick one row per {' and '.join(keys)}, got {len(group)} for {name} that differ in "
            f"{', '.join(vary) or 'no recorded condition'}; name these conditions in the claim"
        )
    broken = rows[~np.isfinite(rows["value"])]
    if not broken.empty:
        row = broken.iloc[0]
        raise CannotEstimate(
            f"values must be finite, got {row['value']} for {name} (seed {row['seed']}, step {row['step']}); "
            "a trial that gives it must be recorded as diverged"
        )
    return rows.set_index(keys)["value"].sort_index()


def _at_last_step(rows: pd.DataFrame, *keys: str) -> pd.DataFrame:
    return rows[rows["step"] == rows.groupby(["trial_id", *keys])["step"].transform("max")]


def _last(rows: pd.DataFrame, name: str) -> pd.Series[float]:
    """Per seed, the value at the last recorded step of its trial."""
    return _one_each(_at_last_step(rows), ["seed"], name)


def _with_level(rows: pd.DataFrame, along: str) -> pd.DataFrame:
    """The rows that have a level of ``along``, which must be a positive number."""
    if along not in rows.columns:
        raise CannotEstimate("``along`` must name a recorded condition: " + unknown("column", along, rows.columns))
    present = rows[rows[along].notna()].infer_objects()
    if not pd.api.types.is_numeric_dtype(present[along]) or not (present[along] > 0).all():
        levels = sorted({str(level) for level in present[along]})
        raise CannotEstimate(f"levels of {along} must be positive numbers, got {', '.join(levels)}; record them so")
    return present


def _table(rows: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
    """Values by seed (rows) and level of ``column`` (columns, in rising order), complete."""
    table = _one_each(rows, ["seed", column], name).unstack(column)
    for seed, lacking in table.isna().iterrows():
        if lacking.any():
            levels = ", ".join(f"{level:g}" for level in table.columns[lacking])
            raise CannotEstimate(
                f"every seed needs the same levels of {column}, but {name} lacks {column} {levels} in seed {seed}; "
                "run what is missing"
            )
    return table


def _log10_best(rows: pd.DataFrame, name: str, along: str) -> pd.Series[float]:
    """Per seed, log10 of the level of ``along`` that minimises the metric at the last step."""
    table = _table(_at_last_step(rows, along), along, name)
    if table.shape[1] < 2:
        raise CannotEstimate(
            f"a best level needs at least 2 levels of {along}, got only {table.columns[0]:g} for {name}; run a grid"
        )
    x = np.log10(table.columns.to_numpy(dtype=np.float64))
    return table.apply(lambda y: _parabola_minimum(x, y.to_numpy()), axis=1)


def _parabola_minimum(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Abscissa of the minimum: the vertex through the best point and its neighbours, or the point itself at the edge.

    ``argmin`` takes the first of equal values, so the left neighbour of an inner best point is strictly higher: the
    parabola is convex, and its vertex lies within half a grid step of that point.
    """
    i = int(y.argmin())
    if i in (0, len(x) - 1):
        return float(x[i])
    left, right = x[i] - x[i - 1], x[i + 1] - x[i]
    rise_left, rise_right = y[i - 1] - y[i], y[i + 1] - y[i]
    curvature = left * rise_right + right * rise_left
    return float(x[i] + (right**2 * rise_left - left**2 * rise_right) / (2 * curvature))


def _require_same_steps(treatment: pd.DataFrame, control: pd.DataFrame) -> None:
    steps = set(treatment["step"]) ^ set(control["step"])
    if steps and not treatment.empty and not control.empty:
        raise CannotEstimate(
            "a spread is compared over the same steps in both arms, but only one of them has step "
            f"{', '.join(str(step) for step in sorted(steps))}; record both together"
        )


def _residual_sd(rows: pd.DataFrame, name: str) -> pd.Series[float]:
    """Per seed, the residual standard deviation (n − 2 degrees of freedom) around the least-squares line over steps."""
    table = _table(rows, "step", name)
    n = table.shape[1]
    if n < MIN_SPREAD_STEPS:
        raise CannotEstimate(
            f"a spread needs at least {MIN_SPREAD_STEPS} recorded steps, got {n} for {name}; evaluate more often"
        )
    x = table.columns.to_numpy(dtype=np.float64)
    return table.apply(lambda y: _sd_around_line(x, y.to_numpy()), axis=1)


def _sd_around_line(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    line = stats.linregress(x, y)
    residuals = y - line.intercept - line.slope * x
    return math.sqrt(float(residuals @ residuals) / (len(y) - 2))


def _log_log_slopes(rows: pd.DataFrame, name: str, rule: LogLogSlope) -> pd.Series[float]:
    """Per seed, the slope over the last decade of steps, once the gates of the rule are passed."""
    table = _table(rows, "step", name)
    steps = table.columns.to_numpy(dtype=np.float64)
    opens = steps.max() / 10
    _require_gates(rows[rows["step"] >= opens], name, rule)
    last = _slopes(table, steps >= opens, name)
    before = _slopes(table, (steps >= opens / 10) & (steps <= opens), name)
    if abs(last.mean() - before.mean()) > rule.agree_within:
        raise CannotEstimate(
            f"the slope must agree with that of the decade before within {rule.agree_within:g}, got {last.mean():.3f} "
            f"after {before.mean():.3f} for {name}; run longer, or state the claim of a later window"
        )
    return last


def _slopes(table: pd.DataFrame, window: npt.NDArray[np.bool_], name: str) -> pd.Series[float]:
    if window.sum() < MIN_SLOPE_STEPS:
        raise CannotEstimate(
            f"a slope needs at least {MIN_SLOPE_STEPS} recorded steps in each of the last two decades, got "
            f"{window.sum()} for {name}; record more"
        )
    values = table.loc[:, window]
    if not (least := float(values.to_numpy().min())) > 0:
        raise CannotEstimate(f"a log-log slope needs positive values, got {least:g} for {name}; use another metric")
    x = np.log(values.columns.to_numpy(dtype=np.float64))
    return values.apply(lambda y: float(stats.linregress(x, np.log(y.to_numpy())).slope), axis=1)


def _require_gates(window: pd.DataFrame, name: str, rule: LogLogSlope) -> None:
    """The start must be forgotten when the window opens, and the average short compared with the time till then."""
    opens = window[window["step"] == window["step"].min()]
    if rule.min_forgetting is not None:
        if "forgetting" not in opens.columns or opens["forgetting"].isna().any():
            raise CannotEstimate(f"a slope needs the condition forgetting (μ Σ γ), which {name} lacks; record it")
        if opens["forgetting"].min() < rule.min_forgetting:
            raise CannotEstimate(
                f"the slowest direction must have forgotten its start (μ Σ γ ≥ {rule.min_forgetting:g}) when the "
                f"window opens, got {opens['forgetting'].min():.3g} at step {opens['step'].iloc[0]:g} for {name}; "
                "run longer"
            )
    horizon = opens["horizon_steps"].max() if "horizon_steps" in opens.columns else math.nan
    if horizon * rule.min_horizons > opens["step"].min():
        raise CannotEstimate(
            f"the window must open after {rule.min_horizons:g} averaging horizons ({rule.min_horizons * horizon:g} "
            f"steps), got {opens['step'].min():g} for {name}; run longer"
        )


def _per_trial(estimand: Estimand, rows: pd.DataFrame) -> pd.Series[float]:
    """The estimand of each trial by itself, indexed by ``trial_id``."""
    return pd.Series(
        {str(trial): float(per_seed_values(estimand, of_trial).iloc[0]) for trial, of_trial in rows.groupby("trial_id")}
    ).sort_index()


def _positive(values: pd.Series[float], what: str) -> pd.Series[float]:
    if not (values > 0).all():
        raise CannotEstimate(
            f"a ratio needs a positive denominator, got {values.min():g} for {what}; use another metric"
        )
    return values
