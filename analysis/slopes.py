"""Log-log slopes: how fast a metric falls with the step, once the gates of the claim are passed.

Serves the section «EMA» of THEORY.md (rates of convergence).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis import formulas
from analysis.rows import CannotEstimate, table
from experiments.harness.claims import LogLogSlope

MIN_SLOPE_STEPS = 4


def log_log_slopes(rows: pd.DataFrame, name: str, rule: LogLogSlope, *, exact: bool) -> pd.Series[float]:
    """Per seed, the slope over the last decade of steps, once the gates of the rule are passed.

    Args:
        rows: observations of one metric and arm.
        name: what the arm is called in a message.
        rule: the estimand, which names the gates.
        exact: whether the values are computed and not measured. Then a constant is one that has reached its floor,
            and its slope is 0; measured with noise, it is a metric that does not move.
    """
    values = table(rows, "step", name)
    steps = values.columns.to_numpy(dtype=np.float64)
    opens = steps.max() / 10
    _require_gates(rows[rows["step"] >= opens], name, rule)
    last = _slopes(values, steps >= opens, name, exact)
    before = _slopes(values, (steps >= opens / 10) & (steps <= opens), name, exact)
    if abs(last.mean() - before.mean()) > rule.agree_within:
        raise CannotEstimate(
            f"the slope must agree with that of the decade before within {rule.agree_within:g}, got {last.mean():.3f} "
            f"after {before.mean():.3f} for {name}; run longer, or state the claim of a later window"
        )
    return last


def _slopes(values: pd.DataFrame, window: npt.NDArray[np.bool_], name: str, exact: bool) -> pd.Series[float]:
    if window.sum() < MIN_SLOPE_STEPS:
        raise CannotEstimate(
            f"a slope needs at least {MIN_SLOPE_STEPS} recorded steps in each of the last two decades, got "
            f"{window.sum()} for {name}; record more"
        )
    values = values.loc[:, window]
    y = values.to_numpy()
    if not (least := float(y.min())) > 0:
        raise CannotEstimate(f"a log-log slope needs positive values, got {least:g} for {name}; use another metric")
    constant = (y == y[:, :1]).all(axis=1)
    if constant.any() and not exact:
        seed, value = values.index[constant][0], y[constant][0, 0]
        raise CannotEstimate(
            f"a measured slope needs values that vary over the steps, got exactly {value:g} at all {y.shape[1]} steps "
            f"of a decade for {name} in seed {seed}; check that the metric is measured anew at each step"
        )
    x = np.log(values.columns.to_numpy(dtype=np.float64))
    return pd.Series(formulas.slope(x, np.log(y)), index=values.index)


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
