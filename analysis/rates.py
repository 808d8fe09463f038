"""The figure of ``polyak_averaging``: rates of convergence, and what a decay costs against the best one.

Serves the section «EMA» of THEORY.md. The values are exact (moments of SGD on a stochastic quadratic), so there are no
intervals.
"""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.estimands import CannotEstimate, select
from analysis.load import Campaign
from analysis.style import HUES, INK, MUTED, STYLE
from experiments.harness.claims import Selector

WORLD: Selector = {"world": "quadratic", "condition_number": 100, "noise": "isotropic"}
"""The hardest of the exact worlds; the table has all of them."""
LINES = {
    "last": ("last iterate", INK, "-"),
    "uniform": ("uniform average", HUES[0], "-"),
    "suffix": ("average of the second half", HUES[0], "--"),
    "ema_tenth": ("EMA, half-life t/10", HUES[1], "--"),
    "ema_0.99": ("EMA 0.99", HUES[2], ":"),
    "ema_0.999": ("EMA 0.999", HUES[2], "--"),
    "ema_0.9999": ("EMA 0.9999", HUES[2], "-"),
}
STARTS = {"initial_weights": "started at θ(0)", "bias_corrected": "bias-corrected"}


@rc_context(STYLE)
def draw_rates(campaign: Campaign) -> Figure:
    """Above: squared error against steps for each schedule. Below: excess loss over that of the best average."""
    rows = campaign.observations
    rates = select(rows, {"track": "rates", "metric": "squared_error", **WORLD})
    decays = select(rows, {"track": "decays", "metric": "excess_loss", **WORLD})
    if rates["schedule"].nunique() < 4:
        raise CannotEstimate("the figure of rates needs trials of every schedule; run the rest")
    figure = Figure(figsize=(14, 8.2), layout="constrained")
    upper, lower = figure.subplots(2, 4, sharey="row")
    for axis, (schedule, of_schedule) in zip(upper, rates.groupby("schedule", sort=False), strict=True):
        _rates_panel(axis, of_schedule)
        axis.set_title(f"step size: {schedule}", loc="left", fontsize=11.5, fontweight="bold")
    panels = [(schedule, start) for schedule in ("constant", "cosine") for start in STARTS]
    for axis, (schedule, start) in zip(lower, panels, strict=True):
        _decays_panel(axis, select(decays, {"schedule": schedule, "start": start}))
        axis.set_title(f"{schedule}, {STARTS[start]}", loc="left", fontsize=11.5, fontweight="bold")
    upper[0].set_ylabel("E‖θ − θ*‖²")
    lower[0].set_ylabel("excess loss / that of the best")
    upper[0].legend(frameon=False, fontsize=8.5, loc="lower left")
    lower[3].legend(title="length of the run (ring: the guide's decay)", frameon=False, fontsize=9.5, loc="upper left")
    figure.suptitle(
        f"SGD on a stochastic quadratic (condition number {WORLD['condition_number']}, {WORLD['noise']} noise), exact "
        f"moments · {campaign.scale}. Shaded: at most 1.25 × the best.",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    return figure


def _rates_panel(axis: Axes, rows: pd.DataFrame) -> None:
    for arm, (label, colour, style) in LINES.items():
        line = rows[rows["arm"] == arm].sort_values("step")
        axis.loglog(line["step"], line["value"], style, color=colour, label=label, linewidth=1.6)
    last = rows[rows["arm"] == "uniform"].sort_values("step").iloc[-1]
    for slope, name in ((-0.5, "1/√t"), (-1.0, "1/t")):
        steps = [last["step"] / 100, last["step"]]
        values = [2.5 * last["value"] * (step / last["step"]) ** slope for step in steps]
        axis.loglog(steps, values, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
        axis.annotate(name, (steps[0], values[0]), color=MUTED, fontsize=9, ha="right")
    axis.set_xlabel("steps t")


def _decays_panel(axis: Axes, rows: pd.DataFrame) -> None:
    """One curve per length of the run; a ring where the guide's table puts the decay."""
    for index, (steps, of_length) in enumerate(rows.groupby("steps")):
        grid = of_length[of_length["family"] == "grid"].sort_values("horizon_steps")
        best = grid["value"].min()
        axis.loglog(grid["horizon_steps"], grid["value"] / best, color=HUES[index], label=f"{steps:,.0f} steps")
        told = of_length[of_length["arm"] == f"guide_{1 - 10 / float(str(steps)):g}"]
        axis.loglog(
            told["horizon_steps"], told["value"] / best, "o", color=HUES[index], fillstyle="none", markersize=10
        )
    axis.axhspan(1, 1.25, color="#e8eef5", zorder=0, linewidth=0)
    axis.set_ylim(0.9, 1e3)
    axis.set_xlabel("averaging horizon 1/(1−β), steps")
