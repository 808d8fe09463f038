"""Finding the rows that an estimand is about, and refusing what is wrong, ambiguous or incomplete.

Serves every section of THEORY.md through ``analysis.estimands``. Nothing is guessed: each refusal says the rule, the
value that was received and the fix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from experiments.harness.claims import Selector
from experiments.harness.experiment import unknown


class CannotEstimate(ValueError):
    """The observations do not determine the estimand; the message says the rule, the value and the fix."""


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


def named(role: str, selector: Selector) -> str:
    """``treatment {arm=ema}``, for messages."""
    return f"{role} {{{', '.join(f'{key}={level}' for key, level in selector.items())}}}"


def of_arms(
    rows: pd.DataFrame, roles: Mapping[str, Selector], read: Callable[[pd.DataFrame, str], pd.Series[float]]
) -> list[pd.Series[float]]:
    """Reduce the rows of each arm to one value per seed, and require that the arms have the same seeds."""
    arms: dict[str, pd.Series[float]] = {}
    for role, selector in roles.items():
        name = named(role, selector)
        arms[name] = read(of_arm(rows, selector, name), name)
    require_same("seed", arms)
    return list(arms.values())


def of_arm(rows: pd.DataFrame, selector: Selector, name: str) -> pd.DataFrame:
    """The rows of one arm, of which there must be some."""
    selected = select(rows, selector)
    if selected.empty:
        raise CannotEstimate(f"every arm needs observations, got none for {name}; correct the selector or run it")
    return selected


def many_arms(rows: pd.DataFrame, selectors: Sequence[Selector]) -> pd.DataFrame | None:
    """What ``last`` reads of many arms at once: values by seed (rows) and arm (columns), for selectors of equal keys.

    None where the keys differ, or an arm or a value is missing, repeated or not finite: reading arm by arm then says
    what is wrong. (Dozens of rivals, one by one, take a second.)
    """
    keys = list(selectors[0]) if selectors else []
    if not keys or any(list(selector) != keys for selector in selectors) or not set(keys) <= set(rows.columns):
        return None
    values = at_last_step(rows[["trial_id", "seed", "step", "value", *keys]].dropna(subset=keys), *keys)
    if values.duplicated(["seed", *keys]).any():
        return None
    by_arm = values.set_index(["seed", *keys])["value"].unstack(keys)
    arms = [tuple(selector.values()) if len(keys) > 1 else selector[keys[0]] for selector in selectors]
    if not set(arms) <= set(by_arm.columns) or not np.isfinite(by_arm[arms].to_numpy()).all():
        return None
    return by_arm[arms]


def require_same(unit: str, arms: Mapping[str, pd.Series[float]]) -> None:
    """Pairs are needed: every arm must have every replicate."""
    everywhere = sorted(set().union(*(arm.index for arm in arms.values())))
    for name, arm in arms.items():
        if missing := [str(replicate) for replicate in everywhere if replicate not in arm.index]:
            raise CannotEstimate(
                f"estimates are paired within {unit}, but {name} lacks {unit} {', '.join(missing)}; run what is missing"
            )


def of_metric(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric, of which there must be some."""
    selected = select(rows, {"metric": metric})
    if selected.empty:
        raise CannotEstimate("a claim needs a recorded metric: " + unknown("metric", metric, set(rows["metric"])))
    return selected


def one_each(rows: pd.DataFrame, keys: list[str], name: str) -> pd.Series[float]:
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


def at_last_step(rows: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """The rows at the last recorded step of their trial (and of the further keys)."""
    return rows[rows["step"] == rows.groupby(["trial_id", *keys])["step"].transform("max")]


def last(rows: pd.DataFrame, name: str) -> pd.Series[float]:
    """Per seed, the value at the last recorded step of its trial."""
    return one_each(at_last_step(rows), ["seed"], name)


def table(rows: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
    """Values by seed (rows) and level of ``column`` (columns, in rising order), complete."""
    values = one_each(rows, ["seed", column], name).unstack(column)
    for seed, lacking in values.isna().iterrows():
        if lacking.any():
            levels = ", ".join(f"{level:g}" for level in values.columns[lacking])
            raise CannotEstimate(
                f"every seed needs the same levels of {column}, but {name} lacks {column} {levels} in seed {seed}; "
                "run what is missing"
            )
    return values


def positive(values: pd.Series[float], what: str) -> pd.Series[float]:
    """The values, which must be fit for a denominator."""
    if not (values > 0).all():
        raise CannotEstimate(
            f"a ratio needs a positive denominator, got {values.min():g} for {what}; use another metric"
        )
    return values
