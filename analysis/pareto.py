"""The figure of ``sft_vs_lora_vs_qlora``: the quality of each method against what a step and a file of it cost.

Serves the section «Training Presets» of THEORY.md. A method lies on the Pareto front if no other one has both less
loss and less cost, by means; where intervals overlap, the front itself is uncertain.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from scipy.stats import t

from analysis.arms import ALPHA, arm_table, layout_of
from analysis.costs import MB, MEASURED, TIMES, cost_table
from analysis.estimands import CannotEstimate, select
from analysis.load import Campaign
from analysis.style import HUES, MARKERS, MUTED, NAMES, STYLE

LOSS, HALF_WIDTH, COST = "loss", "half_width", "cost"
FAMILIES = (
    ("sft", "classic"),
    ("lora", "lora-all-linear", "qlora"),
    ("adalora", "weightlora", "houlsby"),
    ("prefix-tuning", "p-tuning", "p-tuning-v2", "prompt-tuning"),
)
"""Methods that share a colour; within it, each has its marker."""
LOOKS = {method: (HUES[i], MARKERS[j]) for i, family in enumerate(FAMILIES) for j, method in enumerate(family)}
BASELINES = {"zero-shot": (0, (4, 2)), "few-shot": (0, (1, 2))}
"""Line styles of the methods that train nothing."""
MANY_TIMES = 20
"""Costs whose greatest is more than so many times the least are drawn on a logarithmic axis."""


@rc_context(STYLE)
def draw_pareto(campaign: Campaign) -> Figure:
    """Mean test loss with its interval over seeds, against peak memory of a step, its time, and the size of the file.

    Raises:
        CannotEstimate: if there is no trial of quality or none of cost.
    """
    quality, cost = arm_table(campaign, layout_of(campaign.experiment)), cost_table(campaign)
    if cost.empty:
        raise CannotEstimate("the figure of methods needs trials of cost, got none; run them")
    tracks = list(dict.fromkeys(cost["track"]))
    figure = Figure(figsize=(12.5, 4.3 * len(tracks) + 1.2), layout="constrained")
    for axes, track in zip(figure.subplots(len(tracks), 3, squeeze=False, sharey="row"), tracks, strict=True):
        points = methods_of(select(quality, {"track": track}), select(cost, {"track": track}))
        for axis, (name, label) in zip(axes, _COSTS.items(), strict=True):
            _panel(axis, points, name)
            axis.set_xlabel(label)
        axes[0].set_ylabel("test loss, nats")
        axes[0].set_title(
            f"{NAMES.get(track, track)} · {campaign.models_of({'track': track})}", loc="left", fontsize=11
        )
    handles = {h.get_label(): h for axis in figure.axes for h in axis.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    figure.suptitle(
        f"What a method of fine-tuning gives and costs · {campaign.scope}\nBars: 95% t-intervals of the mean over "
        "seeds, not paired, not adjusted. Line: Pareto front of the means.",
        x=0.01,
        ha="left",
        fontsize=11.5,
    )
    return figure


_COSTS = {
    MEASURED: "peak memory of a step, MB",
    TIMES[0]: "time of a step, s",
    "saved_bytes": "saved weights, MB",
}


def methods_of(quality: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    """One row a method of one task: ``loss``, ``half_width`` of its interval, and the costs; of baselines no costs."""
    metric = "eval_loss"
    critical = t.ppf(1 - ALPHA / 2, np.maximum(quality["n"] - 1, 1))
    rows = quality[["method", "n", "saved_bytes_mean"]].rename(columns={"saved_bytes_mean": "saved_bytes"})
    rows[LOSS] = quality[f"{metric}_mean"]
    rows[HALF_WIDTH] = critical * quality[f"{metric}_sd"] / np.sqrt(quality["n"])
    rows = rows.merge(cost[["method", MEASURED, TIMES[0]]], on="method", how="left")
    rows[MEASURED] /= MB
    rows["saved_bytes"] /= MB
    return rows


def front(points: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Rows that no other row beats in ``loss`` at no more ``cost``, in rising order of cost."""
    rows = points.sort_values([cost, LOSS])
    return rows[rows[LOSS] < rows[LOSS].cummin().shift(fill_value=np.inf)]


def _panel(axis: Axes, points: pd.DataFrame, cost: str) -> None:
    for name, style in BASELINES.items():
        for loss in points.loc[points["method"] == name, LOSS]:
            axis.axhline(loss, color=MUTED, linewidth=1, linestyle=style, label=name)
    trained = points[points[cost].notna()]
    best = front(trained, cost)
    axis.step(best[cost], best[LOSS], where="post", color=MUTED, linewidth=1, zorder=1)
    for row in trained.to_dict("records"):
        colour, marker = LOOKS[row["method"]]
        at = {"color": colour, "marker": marker, "label": row["method"], "linestyle": "", "markeredgecolor": "white"}
        axis.errorbar(row[cost], row[LOSS], yerr=row[HALF_WIDTH], capsize=2, markersize=7, **at)
    if trained[cost].max() > MANY_TIMES * trained[cost].min():
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(left=0)
