"""The arm table: what each arm of a campaign measured, and its paired difference to the control.

Serves every section of THEORY.md through tables, figures and notebooks. It describes; the verdicts, with intervals
that are simultaneous over the claims, come from ``analysis.verdicts``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.estimands import CannotEstimate, select
from analysis.load import Campaign
from analysis.statistics import mean_interval
from experiments.harness.claims import Scalar, Selector
from experiments.harness.experiment import unknown

ALPHA = 0.05
REDUCTION = "relative_reduction"
_ROW = ("trial_id", "seed", "status", "metric", "unit", "value", "step")


@dataclass(frozen=True)
class Layout:
    """How an experiment's observations become an arm table; the defaults suit any experiment that follows the harness.

    Rows are all combinations of factor levels and arms. Other conditions that a row carries (decay, horizon) describe
    its arm.
    """

    metric: str = "eval_loss"
    also: tuple[str, ...] = ("perplexity",)
    """Further metrics, shown as means over seeds."""
    where: Selector = field(default_factory=lambda: {"split": "test"})
    arm: str = "arm"
    """The condition, or the factor, whose levels are compared within a seed."""
    conditions: tuple[str, ...] = ()
    """Conditions of a row that vary within a trial as factors do between trials: a table row for each level."""
    control: Scalar = "raw"
    """The level that the others are paired with; empty where there is none."""
    order: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    """Factors that come first, in this order, each with the levels that come first; the rest is sorted."""


LAYOUTS: dict[str, Layout] = {
    "ema_ablation": Layout(
        also=("perplexity", "chosen_sigma_rel"),
        order={"track": ("main", "length"), "steps": (), "schedule": ("constant", "cosine")},
    ),
    "ema_conditions": Layout(
        also=("accuracy",),
        order={"track": ("cells", "generative"), "condition": ("base",), "schedule": ("constant", "cosine")},
    ),
    "freeze_ratio": Layout(
        also=("perplexity", "other_domain_loss", "accuracy", "macro_f1"),
        where={"measure": "quality", "split": "test", "arm": "trained"},
        arm="frozen",
        control="lower_0",
        order={"track": ("language_modelling",), "method": ("full", "lora"), "frozen": ("lower_0", "lower_25")},
    ),
    "forgetting": Layout(
        metric="other_domain_loss",
        also=("eval_loss", "perplexity"),
        control="initial",
        order={"method": ("full", "lora"), "cell": ("base",), "arm": ("initial", "trained")},
    ),
    "quantization": Layout(
        metric="relative_error",
        also=("eval_loss", "accuracy", "perplexity"),
        where={},
        conditions=("quantity",),
        control="int4",
        order={
            "track": ("pretrained", "classifier", "language_model"),
            "quantity": ("weights", "layer_outputs", "hidden_state", "logits"),
        },
    ),
    "lora_scaling": Layout(
        metric="tuned_loss",
        also=(
            "tuned_accuracy",
            "chosen_learning_rate",
            "chosen_at_edge",
            "usable_decades",
            "highest_usable_learning_rate",
        ),
        arm="variant",
        control="centre",
        order={"track": ("classification",), "method": ("full", "lora"), "variant": ("centre",)},
    ),
    "sft_vs_lora_vs_qlora": Layout(
        also=(
            "perplexity",
            "accuracy",
            "other_domain_loss",
            "trainable_share",
            "saved_bytes",
            "reached_target",
            "seconds_to_target",
            "chosen_learning_rate",
        ),
        where={"measure": "quality", "split": "test", "arm": "final"},
        arm="method",
        control="sft",
        order={
            "track": ("language_modelling",),
            "method": ("zero-shot", "few-shot", "sft", "classic", "lora", "lora-all-linear", "qlora"),
        },
    ),
    "preset_vs_tuned": Layout(
        also=("accuracy", "chosen_learning_rate"),
        control="defaults",
        order={"track": ("classification",), "preset": ("sft", "classic", "lora", "qlora")},
    ),
    "training_mechanics": Layout(
        metric="difference_norm",
        also=("reference_norm",),
        where={},
        conditions=("group", "method", "weights", "way", "lengths"),
        control="",
        order={"measure": ("start", "merge", "accumulation"), "track": ("language_modelling",)},
    ),
    "monitor_detection": Layout(
        metric="detected",
        also=("detected_by_any_finding", "detected_at_once", "detection_delay_steps", "any_false_alarm"),
        where={},
        arm="fault",
        control="",
    ),
    "verdict_calibration": Layout(
        metric="false_verdicts",
        also=("simulations", "no_interval", "interval_width"),
        where={"side": "worse", "position": "edge"},
        arm="outcomes",
        conditions=("n_seeds",),
        control="",
        order={"estimand": (), "n_seeds": (), "outcomes": ("gaussian", "skewed", "heavy_tailed", "discrete")},
    ),
    "polyak_averaging": Layout(
        metric="excess_loss",
        also=("squared_error", "variance", "variance_over_cramer_rao"),
        where={"track": "rates"},
        conditions=("schedule",),
        control="last",
        order={"world": ("quadratic",), "condition_number": (), "noise": (), "schedule": ("constant",)},
    ),
}
"""Experiments whose table differs from the default one."""


def layout_of(experiment: str) -> Layout:
    """The layout that an experiment declares, or the default one."""
    return LAYOUTS.get(experiment, Layout())


def factors_of(campaign: Campaign) -> list[str]:
    """Names of the factors of a campaign that its layout does not fix, in the layout's order.

    Conditions that act as factors are among them.
    """
    layout = layout_of(campaign.experiment)
    names = {name for record in campaign.records for name in record.spec.factors} - set(layout.where)
    names |= set(layout.conditions)
    first = [name for name in layout.order if name in names]
    return [*first, *sorted(names - set(first))]


def final_rows(campaign: Campaign, layout: Layout) -> pd.DataFrame:
    """Observations of the layout's metric at the last step of each trial and arm.

    Raises:
        CannotEstimate: if there are none, or a condition of the layout was not recorded.
    """
    observations = campaign.observations
    rows = observations[observations["metric"] == layout.metric]
    rows = rows if rows.empty else select(rows, layout.where)
    if rows.empty:
        where = ", ".join(f"{name}={level}" for name, level in layout.where.items())
        raise CannotEstimate(f"no trial that succeeded recorded {layout.metric} at {where}")
    if layout.arm not in rows.columns:
        raise CannotEstimate("an arm table needs the arms: " + unknown("condition", layout.arm, rows.columns))
    last = rows.groupby(["trial_id", *layout.conditions, layout.arm], dropna=False)["step"].transform("max")
    return rows[rows["step"] == last]


def paired_rows(campaign: Campaign, layout: Layout) -> pd.DataFrame:
    """``final_rows`` with the control's value in ``control`` and the paired difference in ``relative_reduction``.

    The pair of a row is the control with the same seed and the same levels of all other factors; both columns are
    missing where it has none.
    """
    rows = final_rows(campaign, layout)
    pair = ["seed", *(name for name in factors_of(campaign) if name != layout.arm)]
    controls = rows.loc[rows[layout.arm] == layout.control, [*pair, "value"]].rename(columns={"value": "control"})
    rows = rows.merge(controls, on=pair, how="left", validate="many_to_one")
    reduction = (rows["control"] - rows["value"]) / rows["control"]
    rows[REDUCTION] = reduction.where(rows[layout.arm] != layout.control)
    return rows


def arm_table(campaign: Campaign, layout: Layout) -> pd.DataFrame:
    """One row per combination of factor levels and arm.

    Columns: the factors, the arm, its descriptors, ``n`` (seeds), ``<metric>_mean`` and ``_sd`` (over seeds), the mean
    of each further metric, and ``relative_reduction`` (mean over seeds of ``(control − arm) / control``) with its
    95 % paired-t interval ``_low``/``_high``, which is per arm and not adjusted for the number of arms.

    Raises:
        CannotEstimate: see ``final_rows``.
    """
    rows = paired_rows(campaign, layout)
    factors = [name for name in factors_of(campaign) if name != layout.arm]
    keys = [*factors, layout.arm]
    described = descriptors(rows, {*keys, *layout.where})
    further = campaign.observations
    arms = tuple(dict.fromkeys(rows.sort_values("seed", kind="stable")[layout.arm]))
    table = []
    for levels, cell in rows.groupby(keys, sort=False, dropna=False):
        row: dict[Hashable, object] = dict(zip(keys, levels, strict=True))
        row |= {name: next(iter(cell[name].dropna()), np.nan) for name in described}
        row |= {"n": cell["seed"].nunique()}
        row |= {f"{layout.metric}_mean": cell["value"].mean(), f"{layout.metric}_sd": cell["value"].std(ddof=1)}
        row |= {f"{metric}_mean": _matching_mean(further, metric, layout, cell) for metric in layout.also}
        row |= _interval(cell[REDUCTION].dropna())
        table.append(row)
    order = {layout.arm: arms, **layout.order}
    frame = pd.DataFrame(table).sort_values(keys, kind="stable", key=lambda column: _ranks(column, order))
    return frame.reset_index(drop=True)


def descriptors(rows: pd.DataFrame, known: set[str]) -> list[str]:
    """Conditions that describe an arm: recorded, not all missing, and neither factor nor bookkeeping."""
    names = [name for name in rows.columns if name not in known and name not in {*_ROW, "control", REDUCTION}]
    return sorted(name for name in names if rows[name].notna().any())


def mechanics(campaign: Campaign, selector: Selector) -> dict[str, float]:
    """Horizon and share of initial weights of the arm that a selector names, where they were recorded.

    An average over a horizon longer than the run keeps most of the initial weights: that outcome is mechanical, and is
    shown beside the loss. Descriptors that differ between the matching rows are left out.
    """
    observations = campaign.observations
    if not selector.keys() <= set(observations.columns):
        return {}
    rows = select(observations, selector)
    names = [name for name in ("horizon_steps", "initial_weight_share") if name in rows.columns]
    levels = {name: rows[name].dropna().unique() for name in names}
    return {name: float(found[0]) for name, found in levels.items() if len(found) == 1}


def _matching_mean(observations: pd.DataFrame, metric: str, layout: Layout, cell: pd.DataFrame) -> float:
    """Mean of a further metric over the trials, arm and step of one cell; NaN where it was not recorded.

    A condition of the layout that the metric never has (a size has no split) does not count for it.
    """
    rows = observations[observations["metric"] == metric]
    where = {name: level for name, level in layout.where.items() if name in rows and rows[name].notna().any()}
    rows = select(rows, where)
    keys = ["trial_id", layout.arm, "step"]
    return float(rows.merge(cell[keys], on=keys)["value"].mean())


def _ranks(column: pd.Series[Any], order: Mapping[str, tuple[Scalar, ...]]) -> pd.Series[int]:
    """Sort keys of a column of levels: those that the order names first, then the others by value."""
    first = order.get(str(column.name), ())
    others = sorted((level for level in column.dropna().unique() if level not in first), key=_by_value)
    ranks = {level: rank for rank, level in enumerate([*first, *others])}
    return column.map(ranks).fillna(len(ranks)).astype(int)


def _by_value(level: Scalar) -> tuple[bool, float, str]:
    """Numbers before words, so that levels of both kinds can be sorted."""
    numeric = isinstance(level, int | float | np.number)
    return (False, float(level), "") if numeric else (True, 0.0, str(level))


def _interval(reductions: pd.Series[float]) -> dict[Hashable, object]:
    """Mean and interval; the interval is missing where it cannot be estimated (one seed, or equal values)."""
    low = high = np.nan
    try:
        estimate = mean_interval(reductions, ALPHA)
        low, high = estimate.low, estimate.high
    except CannotEstimate:
        pass
    return {REDUCTION: reductions.mean(), f"{REDUCTION}_low": low, f"{REDUCTION}_high": high}
