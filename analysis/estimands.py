"""Estimators of the estimands that claims declare: observations → one value per replicate.

Serves every section of THEORY.md. The unit of replication is the training seed: arms of one seed share initial
weights, data order and dropout masks, so each estimand is computed within a seed, and ``analysis.statistics`` averages
the seeds. Rates, proportions and exact quantities have the trial as their unit. ``analysis.rows`` finds the rows,
``analysis.formulas`` holds the formulas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from analysis import formulas
from analysis.rows import (
    CannotEstimate,
    at_last_step,
    last,
    many_arms,
    named,
    of_arm,
    of_arms,
    of_metric,
    one_each,
    positive,
    require_same,
    select,
    table,
)
from analysis.slopes import log_log_slopes
from experiments.harness.claims import (
    ArgBestShift,
    Difference,
    Estimand,
    Exact,
    ExactRatio,
    Interaction,
    LogLogSlope,
    Proportion,
    Rate,
    Ratio,
    Regret,
    RelativeReduction,
    SelectedReduction,
    Selector,
    bare,
)
from experiments.harness.experiment import unknown

__all__ = ["CannotEstimate", "per_seed_values", "select", "selectors", "successes"]


def per_seed_values(estimand: Estimand, observations: pd.DataFrame) -> pd.Series[float]:
    """The estimand of each replicate.

    Args:
        estimand: what to estimate; its selectors must name columns of ``observations``.
        observations: tidy rows as ``analysis.load.Campaign.observations`` gives them.

    Returns:
        One dimensionless value per seed, indexed by ``seed`` in rising order; for a rate, a proportion or an exact
        quantity one per trial, indexed by ``trial_id``.

    Raises:
        CannotEstimate: if a selector is wrong or ambiguous, a pair is incomplete, or a value is not usable.
    """
    return _values(estimand, observations, exact=False)


def successes(estimand: Rate | Proportion, observations: pd.DataFrame) -> tuple[int, int]:
    """Successes and attempts over all trials.

    Raises:
        CannotEstimate: if they are not whole numbers with ``0 ≤ successes ≤ attempts`` and at least one attempt.
    """
    rows = select(observations, estimand.where)
    if isinstance(estimand, Rate):
        outcomes = _zeros_and_ones(estimand.metric, rows)
        return int(outcomes.sum()), outcomes.size
    hits, attempts = _counts(estimand, rows)
    return int(hits.sum()), int(attempts.sum())


def selectors(estimand: Estimand) -> list[Selector]:
    """The selectors of an estimand's arms (treatment, control, choice, rivals, …); an empty one if it has none.

    Those of an interaction are its arms under both conditions.
    """
    estimand = bare(estimand)
    if isinstance(estimand, Interaction):
        conditions = (estimand.first, estimand.second)
        return [{**arm, **condition} for arm in selectors(estimand.estimand) for condition in conditions]
    found: list[Selector] = []
    for field in dataclasses.fields(estimand):
        value = getattr(estimand, field.name)
        if field.name in ("where", "choose_on", "report_on"):
            continue
        if isinstance(value, Mapping):
            found.append(value)
        elif isinstance(value, tuple):
            found.extend(value)
    return found or [{}]


def _values(estimand: Estimand, observations: pd.DataFrame, *, exact: bool) -> pd.Series[float]:
    rows = select(observations, estimand.where)
    match estimand:
        case RelativeReduction(metric, treatment, control):
            t, c = of_arms(of_metric(rows, metric), {"treatment": treatment, "control": control}, last)
            return _reduction(t, c, metric)
        case SelectedReduction(metric, treatments, controls):
            rows = of_metric(rows, metric)
            sides = {"treatment": treatments, "control": controls}
            read = {side: _of_chosen(rows, side, arms, estimand) for side, arms in sides.items()}
            require_same("seed", read)
            return _reduction(read["treatment"], read["control"], metric)
        case Interaction(inner, first, second):
            return _interaction(inner, first, second, observations)
        case Ratio(metric, numerator, denominator):
            roles = {"numerator": numerator, "denominator": denominator}
            top, bottom = of_arms(of_metric(rows, metric), roles, last)
            return top / positive(bottom, f"{metric} of the denominator")
        case Difference(metric, first, second):
            more, less = of_arms(of_metric(rows, metric), {"first": first, "second": second}, last)
            return more - less
        case Regret(metric, choice, rivals):
            return _regret(of_metric(rows, metric), metric, choice, rivals)
        case ArgBestShift(metric, along, start, end):
            rows = _with_level(of_metric(rows, metric), along)
            early, late = of_arms(rows, {"start": start, "end": end}, partial(_log10_best, along=along))
            grids = [np.log10(np.unique(select(rows, arm)[along])) for arm in (start, end)]
            _require_below_the_upper_end(early, late, grids, along)
            if not exact:
                _require_above_the_lower_end(early, late, grids, along)
            return late - early
        case LogLogSlope(metric, arm):
            read_slopes = partial(log_log_slopes, rule=estimand, exact=exact)
            (slopes,) = of_arms(of_metric(rows, metric), {"arm": arm}, read_slopes)
            return slopes
        case Rate(metric):
            return _zeros_and_ones(metric, rows)
        case Proportion():
            hits, attempts = _counts(estimand, rows)
            return hits / attempts
        case Exact(inner):
            return _per_trial(inner, rows)
        case ExactRatio(numerator, denominator):
            top, bottom = (one_each(of_metric(rows, name), ["trial_id"], name) for name in (numerator, denominator))
            require_same("trial", {numerator: top, denominator: bottom})
            return top / positive(bottom, denominator)


def _array(values: pd.Series[float] | pd.DataFrame) -> formulas.Array:
    return np.asarray(values.to_numpy(dtype=np.float64))


def _series(values: formulas.Array, like: pd.Series[float]) -> pd.Series[float]:
    return pd.Series(values, index=like.index)


def _reduction(treatment: pd.Series[float], control: pd.Series[float], metric: str) -> pd.Series[float]:
    control = positive(control, f"{metric} of the control")
    return _series(formulas.relative_reduction(_array(treatment), _array(control)), control)


def _regret(rows: pd.DataFrame, metric: str, choice: Selector, rivals: tuple[Selector, ...]) -> pd.Series[float]:
    if not rivals:
        raise CannotEstimate("a regret needs at least 1 rival, got none; name the rivals in the claim")
    together = many_arms(rows, [choice, *rivals])
    if together is not None:
        chosen, values = together.iloc[:, 0], together.iloc[:, 1:]
    else:
        roles = {"choice": choice} | {f"rival {i}": rival for i, rival in enumerate(rivals, start=1)}
        chosen, *others = of_arms(rows, roles, last)
        values = pd.concat(others, axis=1)
    positive(values.min(axis=1), f"{metric} of the best rival")
    return _series(formulas.regret(_array(chosen), _array(values)), chosen)


def _of_chosen(rows: pd.DataFrame, side: str, arms: tuple[Selector, ...], rule: SelectedReduction) -> pd.Series[float]:
    """Per seed, what ``report_on`` says of the arm and the step that are best under ``choose_on``."""
    if not arms:
        raise CannotEstimate(f"a selection needs at least 1 arm, got none for the {side}; name the arms in the claim")
    read: dict[str, list[pd.Series[float]]] = {"choose_on": [], "report_on": []}
    for number, arm in enumerate(arms):
        for use, split in (("choose_on", rule.choose_on), ("report_on", rule.report_on)):
            name = named(f"{side} under {use}", {**arm, **split})
            picked = of_arm(rows, {**arm, **split}, name).assign(_arm=number)
            read[use].append(one_each(picked, ["seed", "_arm", "step"], name))
    chosen_on, reported_on = (pd.concat(parts).sort_index() for parts in read.values())
    best = chosen_on.groupby("seed").idxmin()
    if lacking := [at for at in best if at not in reported_on.index]:
        seed, number, step = lacking[0]
        raise CannotEstimate(
            f"what is chosen must be reported, but {named(side, arms[number])}, chosen at step {step} in seed {seed}, "
            f"has no row for {named('report_on', rule.report_on)} there; evaluate both splits at the same steps"
        )
    return pd.Series(reported_on.loc[list(best)].to_numpy(), index=best.index)


def _interaction(
    inner: RelativeReduction | SelectedReduction, first: Selector, second: Selector, observations: pd.DataFrame
) -> pd.Series[float]:
    read: dict[str, pd.Series[float]] = {}
    for role, condition in (("first", first), ("second", second)):
        if repeated := sorted(condition.keys() & inner.where.keys()):
            raise CannotEstimate(
                f"what varies in an interaction must not be held in its where, got {', '.join(repeated)} in both; "
                "name it in first and second alone"
            )
        narrowed = dataclasses.replace(inner, where={**inner.where, **condition})
        read[named(role, condition)] = per_seed_values(narrowed, observations)
    require_same("seed", read)
    more, less = read.values()
    return more - less


def _zeros_and_ones(metric: str, rows: pd.DataFrame) -> pd.Series[float]:
    outcomes = one_each(at_last_step(of_metric(rows, metric)), ["trial_id"], metric)
    if not outcomes.isin([0, 1]).all():
        wrong = outcomes[~outcomes.isin([0, 1])].iloc[0]
        raise CannotEstimate(f"a rate needs outcomes 0 or 1, got {wrong:g} for {metric}; record whether it happened")
    return outcomes


def _counts(estimand: Proportion, rows: pd.DataFrame) -> tuple[pd.Series[float], pd.Series[float]]:
    """Successes and attempts of each trial."""
    names = estimand.successes, estimand.attempts
    hits, attempts = (one_each(at_last_step(of_metric(rows, name)), ["trial_id"], name) for name in names)
    require_same("trial", {names[0]: hits, names[1]: attempts})
    for name, counts in zip(names, (hits, attempts), strict=True):
        if not ((counts >= 0) & (counts == np.floor(counts))).all():
            raise CannotEstimate(f"a proportion needs whole counts, got {counts.min():g} for {name}; record counts")
    positive(attempts, names[1])
    if (hits > attempts).any():
        wrong = int((hits > attempts).to_numpy().argmax())
        raise CannotEstimate(
            f"a proportion needs at most as many successes as attempts, got {hits.iloc[wrong]:g} of "
            f"{attempts.iloc[wrong]:g} in trial {hits.index[wrong]}; exchange {names[0]} and {names[1]}"
        )
    return hits, attempts


def _with_level(rows: pd.DataFrame, along: str) -> pd.DataFrame:
    """The rows that have a level of ``along``, which must be a positive number."""
    if along not in rows.columns:
        raise CannotEstimate("``along`` must name a recorded condition: " + unknown("column", along, rows.columns))
    present = rows[rows[along].notna()].infer_objects()
    if not pd.api.types.is_numeric_dtype(present[along]) or not (present[along] > 0).all():
        levels = sorted({str(level) for level in present[along]})
        raise CannotEstimate(f"levels of {along} must be positive numbers, got {', '.join(levels)}; record them so")
    return present


def _require_below_the_upper_end(
    early: pd.Series[float], late: pd.Series[float], grids: Sequence[formulas.Array], along: str
) -> None:
    """Best levels at the upper ends of both conditions' grids (in log10) hide their shift, were it but in one seed."""
    if ((early == grids[0][-1]) & (late == grids[1][-1])).any():
        raise CannotEstimate(
            f"the best {along} must lie inside the grid in one condition at least, got the upper ends, "
            f"{10 ** grids[0][-1]:g} and {10 ** grids[1][-1]:g}, in both: the shift is not seen; widen the grid"
        )


def _require_above_the_lower_end(
    early: pd.Series[float], late: pd.Series[float], grids: Sequence[formulas.Array], along: str
) -> None:
    """Best levels at the lower ends in every seed have no variance, however many seeds there are.

    The lower end is often none of a thing (no averaging, no freezing), so that in some seeds it is a value like others.
    """
    if (early == grids[0][0]).all() and (late == grids[1][0]).all():
        raise CannotEstimate(
            f"the best {along} must lie above the lowest level in one condition and seed at least, got the lowest, "
            f"{10 ** grids[0][0]:g} and {10 ** grids[1][0]:g}, in both conditions and all {len(early)} seeds: there is "
            "no shift to estimate; that the lowest level is best is the finding"
        )


def _log10_best(rows: pd.DataFrame, name: str, along: str) -> pd.Series[float]:
    """Per seed, log10 of the level of ``along`` that minimises the metric at the last step."""
    values = table(at_last_step(rows, along), along, name)
    if values.shape[1] < 2:
        raise CannotEstimate(
            f"a best level needs at least 2 levels of {along}, got only {values.columns[0]:g} for {name}; run a grid"
        )
    x = np.log10(values.columns.to_numpy(dtype=np.float64))
    return pd.Series(formulas.best_abscissa(x, _array(values)), index=values.index)


def _per_trial(estimand: Estimand, rows: pd.DataFrame) -> pd.Series[float]:
    """The estimand of each trial by itself, indexed by ``trial_id``."""
    return pd.Series(
        {
            str(trial): float(_values(estimand, of_trial, exact=True).iloc[0])
            for trial, of_trial in rows.groupby("trial_id")
        }
    ).sort_index()
