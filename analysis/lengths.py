"""The figure of averaging lengths: what an average gains, from the shortest to the longest, from one training each.

Serves the section «EMA» of THEORY.md. A length is the width σ_rel of a power-function average as a share of the run;
all of a run are put together from two that were followed (``forge.posthoc_ema``).
"""

from __future__ import annotations

import math

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.arms import REDUCTION, arm_table, factors_of, layout_of
from analysis.estimands import CannotEstimate
from analysis.formatting import ENGLISH
from analysis.load import Campaign
from analysis.style import CLAIMED, HUES, INK, MARKERS, MUTED, STYLE

LENGTH = "sigma_rel"
LOW, HIGH = f"{REDUCTION}_low", f"{REDUCTION}_high"
LINES = ("schedule", "steps")
"""Factors whose levels are lines of a panel: the first has colours, the second line styles; others have panels."""
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)))
CLAIMED_FROM = 1.0
"""Percent from which on the guides' claim is true."""
DEEPEST = 2.0
"""The axis goes so many times as far down as up: what is lost by averages that are far too long is not its subject."""


def has_lengths(campaign: Campaign) -> bool:
    """Whether a campaign recorded averages by their length."""
    return LENGTH in campaign.observations.columns


@rc_context(STYLE)
def draw_lengths(campaign: Campaign) -> Figure:
    """Mean paired reduction of test loss with its interval over seeds, against the averaging length.

    Raises:
        CannotEstimate: if no trial that succeeded recorded averages by their length.
    """
    if not has_lengths(campaign):
        raise CannotEstimate(f"the figure of lengths needs averages with {LENGTH}, got none; run today's version")
    table = arm_table(campaign, layout_of(campaign.experiment))
    table = table[table[LENGTH].notna() & table[REDUCTION].notna()]
    lines = [name for name in LINES if name in table.columns]
    others = [name for name in factors_of(campaign) if name not in lines]
    panels = list(table.groupby(others, sort=False, dropna=False))
    columns = min(3, len(panels))
    figure = Figure(figsize=(max(9.0, 4.6 * columns), 1.5 + 3.8 * math.ceil(len(panels) / columns)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).ravel()
    for axis, (levels, rows) in zip(axes, panels, strict=False):
        _panel(axis, rows, lines, {name: list(dict.fromkeys(table[name])) for name in lines})
        names = [str(level).replace("_", " ") for level in dict.fromkeys(levels)]
        names.append(campaign.models_of({name: rows[name].iloc[0] for name in others}))
        axis.set_title(" · ".join(filter(None, names)), loc="left", fontsize=11, fontweight="bold")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel("reduction of test loss\nagainst raw weights, %")
    handles = {h.get_label(): h for axis in axes for h in axis.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
    figure.suptitle(
        f"What an average of each length gains · {campaign.scope}\nBands: 95% t-intervals of the difference paired "
        "within seed, not adjusted for\nthe number of lengths. Ring: the best mean of a line. Shaded: +1% or more.",
        x=0.01,
        ha="left",
        fontsize=11.5,
    )
    return figure


def _panel(axis: Axes, rows: pd.DataFrame, lines: list[str], levels: dict[str, list[object]]) -> None:
    high, low = (100 * rows[end].fillna(rows[REDUCTION]) for end in (HIGH, LOW))
    top = max(1.5 * CLAIMED_FROM, 1.15 * high.max())
    axis.set_xscale("log")
    axis.set_ylim(max(min(-0.5 * CLAIMED_FROM, 1.15 * low.min()), -DEEPEST * top), top)
    axis.axhspan(CLAIMED_FROM, top, color=CLAIMED, zorder=0, linewidth=0)
    axis.axhline(0, color=INK, linewidth=1.1, zorder=1)
    for named, line in rows.groupby(lines, sort=False):
        places = [levels[name].index(level) for name, level in zip(lines, named, strict=True)]
        _line(axis, line.sort_values(LENGTH), places, " · ".join(map(_level, lines, named)))
    shown = [width for width in (0.02, 0.05, 0.1, 0.25) if rows[LENGTH].min() / 1.1 < width < rows[LENGTH].max() * 1.1]
    axis.xaxis.set_major_locator(FixedLocator(shown))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f}%"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: ENGLISH.number(y, 1, signed=True)))
    axis.set_xlabel("averaging length σ, share of the run")


def _line(axis: Axes, line: pd.DataFrame, places: list[int], label: str) -> None:
    """One run's curve with its band and a ring at its best mean."""
    hue, style = (*places, 0)[:2]
    colour = HUES[hue % len(HUES)]
    x, y = line[LENGTH], 100 * line[REDUCTION]
    axis.fill_between(x, 100 * line[LOW], 100 * line[HIGH], color=colour, alpha=0.18, linewidth=0, zorder=2)
    curve = axis.plot(x, y, color=colour, label=label, linewidth=1.5, linestyle=STYLES[style % len(STYLES)], zorder=3)[
        0
    ]
    curve.set(marker=MARKERS[style % len(MARKERS)], markersize=4.5, markeredgecolor="white")
    best = y == y.max()
    axis.plot(x[best], y[best], "o", markersize=11, fillstyle="none", color=MUTED, zorder=4)


def _level(name: str, level: object) -> str:
    return f"{ENGLISH.number(float(str(level)), 0)} {name}" if name == "steps" else str(level)
