"""Gains document by document: whether an arm helps all documents of the test split, or some.

Serves the section «EMA» of THEORY.md through the notebook. Documents share the trained models, so they are no
replicates of the training: this describes, and carries no interval.
"""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis.arms import REDUCTION, Layout
from analysis.estimands import CannotEstimate, select
from analysis.load import Campaign
from analysis.style import HUES, INK, MARKERS, STYLE
from experiments.harness.claims import Scalar, Selector


def document_gains(campaign: Campaign, layout: Layout, arm: Scalar, by: str, where: Selector) -> pd.DataFrame:
    """Relative reduction of each document's loss against the control, paired within seed, mean over seeds.

    Args:
        campaign: trials with per-example outcomes; those of one document are weighted by their tokens.
        layout: metric, arm column and control.
        arm: level of the arm column that is compared with the control.
        by: factor that is kept apart.
        where: conditions of the rows that are used.

    Returns:
        Columns ``by``, ``example`` and ``relative_reduction``.

    Raises:
        CannotEstimate: if there are no such outcomes.
    """
    rows = campaign.examples
    rows = select(rows[(rows["metric"] == layout.metric) & rows[layout.arm].isin([arm, layout.control])], where)
    if rows.empty:
        raise CannotEstimate(f"no trial that succeeded recorded {layout.metric} by document for {arm}")
    keys = [by, "example", "trial_id", layout.arm]
    totals = rows.assign(total=rows["value"] * rows["tokens"]).groupby(keys)[["total", "tokens"]].sum()
    losses = (totals["total"] / totals["tokens"]).unstack(layout.arm)
    reduction = ((losses[layout.control] - losses[arm]) / losses[layout.control]).rename(REDUCTION)
    return reduction.groupby([by, "example"]).mean().reset_index()


@rc_context(STYLE)
def document_figure(gains: pd.DataFrame, by: str, title: str) -> Figure:
    """One row per document, one colour per level of ``by``, from what ``document_gains`` returns."""
    names = list(gains.groupby("example")[REDUCTION].mean().sort_values(kind="stable").index)
    figure = Figure(figsize=(8.6, 1.7 + 0.24 * len(names)), layout="constrained")
    axis = figure.subplots()
    for index, (level, rows) in enumerate(gains.groupby(by)):
        y = [names.index(name) + 0.12 * index for name in rows["example"]]
        marker, colour = MARKERS[index % len(MARKERS)], HUES[index % len(HUES)]
        axis.plot(100 * rows[REDUCTION], y, marker, color=colour, label=f"{by}: {level}", alpha=0.85)
    axis.axvline(0, color=INK, linewidth=1.2, zorder=1)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.set_xlabel("reduction of loss against the control, % (mean over seeds)")
    axis.set_title(title, loc="left", fontsize=11.5)
    figure.legend(loc="outside lower left", ncols=4, frameon=False)
    return figure
