"""Arm tables and verdicts as text cells: numbers rounded by ``analysis.formatting``, columns named for readers.

Serves every section of THEORY.md through ``analysis.tables`` and the notebooks.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.arms import REDUCTION, factors_of, layout_of
from analysis.formatting import (
    ENGLISH,
    NOTHING,
    format_count,
    format_estimate,
    format_interval,
    format_region,
    format_span,
)
from analysis.load import Campaign
from analysis.verdicts import Verdict

VERDICT_HEADER = ("claim", "true if", "outcome", "estimate", "interval", "n", "p", "scope", "reason")


def arm_cells(campaign: Campaign, table: pd.DataFrame) -> pd.DataFrame:
    """The arm table as text; means and their spreads or intervals share a column. Without a control, no reductions."""
    layout = layout_of(campaign.experiment)
    metric = layout.metric
    cells = pd.DataFrame(index=table.index)
    for name in map(str, table.columns):
        if name in (f"{metric}_sd", f"{REDUCTION}_low", f"{REDUCTION}_high"):
            continue
        if name == f"{metric}_mean":
            pairs = zip(table[name], table[f"{metric}_sd"], strict=True)
            cells[f"{metric} ± sd"] = [_mean_sd(mean, sd) for mean, sd in pairs]
        elif name == REDUCTION:
            if not layout.control:
                continue
            cells["reduction"] = [_percent(value) for value in table[name]]
            bounds = zip(table[f"{REDUCTION}_low"], table[f"{REDUCTION}_high"], strict=True)
            cells["95% interval"] = [_bounds(low, high) for low, high in bounds]
        else:
            cells[name.removesuffix("_mean")] = [_cell(name, value) for value in table[name]]
    return cells


def short_arm_cells(campaign: Campaign, table: pd.DataFrame) -> pd.DataFrame:
    """The columns that a terminal has room for: factors that vary, arm, seeds, loss and reduction."""
    layout = layout_of(campaign.experiment)
    varying = [name for name in factors_of(campaign) if table[name].nunique(dropna=False) > 1]
    wanted = {*varying, layout.arm, "n", f"{layout.metric} ± sd", "reduction", "95% interval"}
    cells = arm_cells(campaign, table)
    return cells[[name for name in cells.columns if name in wanted]]


def verdict_cells(verdict: Verdict, campaign: Campaign) -> list[str]:
    """One row under ``VERDICT_HEADER``."""
    estimand = verdict.claim.estimand
    return [
        verdict.claim.id,
        format_region(estimand, verdict.claim.region, ENGLISH),
        outcome_text(verdict),
        format_estimate(estimand, verdict.estimate, ENGLISH),
        format_interval(estimand, verdict.interval, ENGLISH),
        NOTHING if verdict.n is None else str(verdict.n),
        NOTHING if verdict.p_sign_flip is None else ENGLISH.figure(verdict.p_sign_flip, 3),
        verdict.scope,
        verdict.reason,
    ]


def verdict_line(verdict: Verdict) -> str:
    """One line for the terminal."""
    estimand = verdict.claim.estimand
    line = f"- {verdict.claim.id}: {outcome_text(verdict)}"
    if verdict.estimate is not None:
        estimate = format_estimate(estimand, verdict.estimate, ENGLISH)
        true_if = format_region(estimand, verdict.claim.region, ENGLISH)
        line += f"; {estimate} {format_interval(estimand, verdict.interval, ENGLISH)}, true if {true_if}"
    return f"{line} ({verdict.reason})"


def outcome_text(verdict: Verdict) -> str:
    """The outcome in words; a claim edited after its data were seen is exploratory."""
    return verdict.outcome if verdict.registered else f"exploratory ({verdict.outcome})"


def is_numeric(column: pd.Series[str]) -> bool:
    """Whether a column of cells holds numbers, which are aligned to the right."""
    return all(text == NOTHING or text[0] in "0123456789+−<[" for text in column)


def _cell(name: str, value: object) -> str:
    """A cell by its column's name: units are suffixes, as everywhere in the project."""
    if value is None or value != value:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return str(value)
    number = float(value)
    if name.endswith("_share"):
        return format_span(number, ENGLISH)
    if name.endswith("_mean"):
        return format_count(number, ENGLISH) if abs(number) >= 1_000 else ENGLISH.figure(number, 2)
    if name.endswith(("_steps", "_bytes")) or number == int(number):
        return format_count(number, ENGLISH)
    return f"{number:.6g}"


def _mean_sd(mean: float, sd: float) -> str:
    return ENGLISH.figure(mean, 4) + (f" ± {ENGLISH.figure(sd, 4)}" if sd == sd else "")


def _percent(value: float) -> str:
    return ENGLISH.share(value, signed=True) if value == value else NOTHING


def _bounds(low: float, high: float) -> str:
    return f"[{_percent(low)}; {_percent(high)}]" if low == low else NOTHING
