"""The figure of ``freeze_ratio``: what frozen layers cost in loss, and what they save.

Serves the section «Layer Freezing» of THEORY.md. Differences of loss are paired within seed; memory is that of one
real step, which the seed does not change.
"""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.arms import REDUCTION, arm_table, layout_of
from analysis.costs import MEASURED, cost_table
from analysis.estimands import CannotEstimate, select
from analysis.load import Campaign
from analysis.style import HUES, INK, MUTED, NAMES, STYLE

NONE, PERCENT = "lower_0", "percent_frozen"
CONTROLS: dict[str, tuple[str, str, Literal["left", "right"], float]] = {
    "upper_50": ("upper half instead", "v", "left", -3.0),
    "lower_50_embeddings_trained": ("lower half, embeddings trained", "D", "right", 3.0),
}
"""Arms beside the curve, all with 50 % frozen: label, marker above, filled half of the one below, shift to the side."""
SAVED = {
    "gradient_bytes": ("gradients", HUES[0], "o"),
    MEASURED: ("peak of a step", HUES[1], "s"),
    "step_time_sec": ("time of a step", HUES[2], "^"),
}


@rc_context(STYLE)
def draw_freezing(campaign: Campaign) -> Figure:
    """Above: change of test loss against the share of frozen layers. Below: what is saved of a full step.

    Raises:
        CannotEstimate: if there is no trial of quality or none of cost.
    """
    quality, cost = arm_table(campaign, layout_of(campaign.experiment)), cost_table(campaign)
    if cost.empty:
        raise CannotEstimate("the figure of freezing needs trials of cost, got none; run them")
    pairs = list(quality[["track", "method"]].drop_duplicates().itertuples(index=False, name=None))
    figure = Figure(figsize=(3.6 * len(pairs), 7.4), layout="constrained")
    axes = figure.subplots(2, len(pairs), squeeze=False, sharex=True, sharey="row")
    for upper, lower, (track, method) in zip(axes[0], axes[1], pairs, strict=True):
        group = {"track": track, "method": method}
        upper.set_title(f"{NAMES[track]}, {NAMES[method]}", loc="left", fontsize=11.5, fontweight="bold")
        arms = _with_percent(select(quality, group))
        _loss_panel(upper, arms)
        _saved_panel(lower, select(cost, group).merge(arms[["frozen", PERCENT]], on="frozen"))
        lower.set_xlabel("layers frozen, %")
    axes[0][0].set_ylabel("reduction of test loss\nagainst no freezing, %")
    axes[1][0].set_ylabel("saved against no freezing, %")
    axes[0][0].legend(frameon=False, fontsize=9, loc="best")
    axes[1][0].legend(frameon=False, fontsize=9, loc="best")
    figure.suptitle(
        f"What frozen layers cost and save · {campaign.scope}\nBars: 95% t-intervals of the difference paired within "
        "seed, not adjusted. Dashed: in proportion, as the guide says. Half-filled: upper half, embeddings trained.",
        x=0.01,
        ha="left",
        fontsize=11.5,
    )
    return figure


def _loss_panel(axis: Axes, arms: pd.DataFrame) -> None:
    axis.axhline(0, color=MUTED, linewidth=0.8)
    below = arms[~arms["frozen"].isin([NONE, *CONTROLS])]
    _bars(axis, below, 0.0, label="from below", color=HUES[0], marker="o")
    for arm, (label, marker, _, shift) in CONTROLS.items():
        _bars(axis, select(arms, {"frozen": arm}), shift, label=label, color=INK, marker=marker, linestyle="")


def _bars(axis: Axes, rows: pd.DataFrame, shift: float, **style: Any) -> None:
    if rows.empty:
        return
    middle = 100 * rows[REDUCTION]
    reach = [middle - 100 * rows[f"{REDUCTION}_low"], 100 * rows[f"{REDUCTION}_high"] - middle]
    axis.errorbar(rows[PERCENT] + shift, middle, yerr=reach, capsize=2, **style)


def _saved_panel(axis: Axes, rows: pd.DataFrame) -> None:
    axis.plot([0, 90], [0, 90], color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    below = rows[~rows["frozen"].isin(CONTROLS)]
    nothing_frozen = select(below, {"frozen": NONE})
    if nothing_frozen.empty:
        raise CannotEstimate("the figure of freezing needs the cost of a model that is not frozen; run the rest")
    whole = nothing_frozen.iloc[0]
    for metric, (label, colour, marker) in SAVED.items():
        saved = 100 * (1 - below[metric] / whole[metric])
        axis.plot(below[PERCENT], saved, color=colour, marker=marker, label=label)
        for arm, (_, _, filled, _) in CONTROLS.items():
            control = 100 * (1 - select(rows, {"frozen": arm})[metric] / whole[metric])
            axis.plot([50] * len(control), control, color=colour, marker=marker, fillstyle=filled, linestyle="")


def _with_percent(arms: pd.DataFrame) -> pd.DataFrame:
    """Arms with the share of layers that they freeze, which is less than its name says where layers do not divide."""
    named = arms["frozen"].str.extract(r"_(\d+)", expand=False).astype(float)
    return arms.assign(**{PERCENT: (100 * (1 - 1 / arms["layers_per_trained_layer"])).fillna(named)})
