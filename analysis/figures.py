"""Figures of an experiment from its records: ``python -m analysis.figures [experiment]``.

Serves the section «EMA» of THEORY.md: what an average of the weights gains against the raw weights, over the length
of the average (``analysis.lengths`` has that of lengths chosen after the run, ``analysis.rates`` the figure of the
exact worlds, ``analysis.freezing`` that of frozen layers). The difference is paired within seed before it is
averaged, so the intervals are those of the difference; the spread between seeds that both arms share has no part in
them.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.arms import REDUCTION, arm_table, factors_of, layout_of
from analysis.estimands import CannotEstimate
from analysis.evidence import in_order, is_default
from analysis.formatting import ENGLISH
from analysis.freezing import draw_freezing
from analysis.lengths import draw_lengths, has_lengths
from analysis.load import Campaign, load_campaigns
from analysis.pareto import draw_pareto
from analysis.rates import draw_rates
from analysis.scaling import draw_scaling
from analysis.style import CLAIMED, HUES, INK, MARKERS, MUTED, STYLE
from analysis.sweeps import draw_sweeps
from analysis.tables import experiments_with_results, options_of
from experiments.harness.experiment import UserError, load_experiment

LOW, HIGH = f"{REDUCTION}_low", f"{REDUCTION}_high"


@dataclass(frozen=True)
class CurveLayout:
    """A curve of the paired gain over a numeric descriptor of the arms, one panel per combination of other factors."""

    title: str
    x: str
    x_label: str
    y_label: str
    hue: str
    """The factor whose levels are the curves of a panel."""
    share: str
    """Descriptor whose value, where it is not small, makes an outcome mechanical."""
    share_short: str
    share_label: str
    claimed_from: float
    """The gain from which on the guides' claim is true."""
    claimed_label: str
    arm: str
    """The condition that names the arms."""
    special: str
    """An arm that is marked by a ring, since its x depends on the run."""
    special_label: str


FIGURES = {
    "ema_ablation": CurveLayout(
        title="What averaged weights gain over raw weights",
        x="horizon_steps",
        x_label="averaging horizon 1/(1−β), steps",
        y_label="reduction of test loss\nagainst raw weights, %",
        hue="schedule",
        share="initial_weight_share",
        share_short="% of θ₀",
        share_label="% of θ₀: the share of the initial weights that is left in the average, where it is 0.5% or more.",
        claimed_from=0.01,
        claimed_label="what the guides claim: +1% or more",
        arm="arm",
        special="ema_optimal",
        special_label="compute_optimal_decay(T)",
    )
}

DRAWN: dict[str, Callable[[Campaign], Figure]] = {
    "polyak_averaging": draw_rates,
    "freeze_ratio": draw_freezing,
    "sft_vs_lora_vs_qlora": draw_pareto,
    "lora_scaling": draw_scaling,
    "preset_vs_tuned": draw_sweeps,
}
"""Experiments with a figure of their own kind."""

WITH_LENGTHS = ("ema_ablation", "ema_conditions")
"""Experiments with a figure of averaging lengths, in a file of its own."""

FLOOR = 0.3
"""Height of the strip, as a share of a panel, that holds what lies below the axis and the shares."""
NOTABLE_SHARE, MECHANICAL_SHARE = 0.005, 0.03
"""Shares of initial weights from which on they are shown, and from which on an outlier does not stretch the axis."""
HEAD_IN, FOOT_IN = 1.2, 0.5
"""Inches above the panels for title and legend, and below them for the notes."""
BARS = "Bars: 95% t-intervals of the difference paired within seed, not adjusted for the number of arms."


@rc_context(STYLE)
def draw(campaign: Campaign, layout: CurveLayout) -> Figure:
    """The figure of one campaign.

    Raises:
        CannotEstimate: if no trial that succeeded recorded the metric.
    """
    table = arm_table(campaign, layout_of(campaign.experiment))
    table = table[table[layout.x].notna() & table[REDUCTION].notna()]
    hues = list(dict.fromkeys(table[layout.hue]))
    others = [name for name in factors_of(campaign) if name != layout.hue]
    panels = list(table.groupby(others, sort=False, dropna=False))
    varying = [index for index, name in enumerate(others) if table[name].nunique(dropna=False) > 1]
    columns = min(3, len(panels))
    n_rows = math.ceil(len(panels) / columns)
    width, height = max(8.6, 4.7 * columns), HEAD_IN + FOOT_IN + 3.9 * n_rows
    engine = ConstrainedLayoutEngine(rect=(0, FOOT_IN / height, 1, 1 - (HEAD_IN + FOOT_IN) / height))
    figure = Figure(figsize=(width, height), layout=engine)
    axes = figure.subplots(n_rows, columns, squeeze=False).ravel()
    for axis, (levels, rows) in zip(axes, panels, strict=False):
        _panel(axis, rows, layout, hues)
        names = [_level(others[index], levels[index]) for index in varying or range(len(others))]
        names += [campaign.models_of({name: rows[name].iloc[0] for name in others})]
        axis.set_title(" · ".join(filter(None, names)), loc="left", fontsize=11.5, fontweight="bold", pad=8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel(layout.y_label, y=(1 + FLOOR) / 2)
    _frame(figure, layout, hues, campaign.scope)
    return figure


def _frame(figure: Figure, layout: CurveLayout, hues: Sequence[str], scope: str) -> None:
    """Title with scope and legend above the panels, notes below; room for both is given in inches."""
    inch = 1 / figure.get_figheight()
    left = 0.14 / figure.get_figwidth()
    figure.text(left, 1 - 0.12 * inch, layout.title, va="top", fontsize=14, fontweight="bold")
    figure.text(left, 1 - 0.42 * inch, scope, va="top", fontsize=10.5, color=MUTED)
    handles, place = _legend(layout, hues), (left, 1 - 0.66 * inch)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=place, ncols=3, frameon=False, fontsize=9.5, borderaxespad=0
    )
    figure.text(left, 0.1 * inch, f"{BARS}\n{layout.share_label}", va="bottom", fontsize=9, color=MUTED)


def _panel(axis: Axes, rows: pd.DataFrame, layout: CurveLayout, hues: Sequence[str]) -> None:
    """Curves above the floor; below it, the arms that fall out of the range and the shares of initial weights."""
    floor, top = _range(rows, layout)
    axis.set_xscale("log")
    axis.set_xlim(rows[layout.x].min() / 2, rows[layout.x].max() * 2)
    axis.set_ylim(floor - (top - floor) * FLOOR / (1 - FLOOR), top)
    axis.axhspan(100 * layout.claimed_from, top, color=CLAIMED, zorder=0, linewidth=0)
    axis.axhline(0, color=INK, linewidth=1.2, zorder=1)
    axis.text(1.012, 0, "raw", transform=axis.get_yaxis_transform(), va="center", fontsize=9.5)
    for index, hue in enumerate(hues):
        shift = 10 ** (0.1 * (index - (len(hues) - 1) / 2))
        curve = rows[rows[layout.hue] == hue].sort_values(layout.x)
        _curve(axis, curve.assign(_x=curve[layout.x] * shift), layout, index, floor)
    _strip(axis, rows, layout, hues, floor)
    digits = 1 if top - floor < 8 else 0
    axis.xaxis.set_major_locator(LogLocator(numticks=8))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: ENGLISH.number(x, 0)))
    axis.set_yticks([tick for tick in axis.get_yticks() if floor - 1e-9 <= tick <= top])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: ENGLISH.number(y, digits, signed=True)))
    axis.set_xlabel(layout.x_label)
    axis.spines["left"].set_bounds(floor, top)


def _curve(axis: Axes, rows: pd.DataFrame, layout: CurveLayout, index: int, floor: float) -> None:
    """One hue: its line, its points with intervals, and triangles where it lies below the floor."""
    colour, marker = HUES[index % len(HUES)], MARKERS[index % len(MARKERS)]
    above = Rectangle((0, FLOOR), 1, 1 - FLOOR, transform=axis.transAxes)
    x, y, low, high = rows["_x"], *(100 * rows[name] for name in (REDUCTION, LOW, HIGH))
    seen = y >= floor
    axis.plot(x, y, color=colour, linewidth=1.4, alpha=0.5, zorder=2)[0].set_clip_path(above)
    axis.vlines(x[seen], low[seen], high[seen], color=colour, linewidth=2.2, zorder=3).set_clip_path(above)
    axis.plot(x[seen], y[seen], marker, color=colour, markersize=6.5, markeredgecolor="white", zorder=4)
    ring = seen & (rows[layout.arm] == layout.special)
    axis.plot(x[ring], y[ring], "o", markersize=12.5, fillstyle="none", color=INK, markeredgewidth=1.1, zorder=5)
    below = x[~seen]
    strip = axis.get_xaxis_transform()
    axis.plot(below, [FLOOR - 0.045] * len(below), "v", color=colour, markersize=7, zorder=4, transform=strip)


def _strip(axis: Axes, rows: pd.DataFrame, layout: CurveLayout, hues: Sequence[str], floor: float) -> None:
    """Below the floor, at each x: the gains that fall out of the range, and the share of initial weights."""
    place: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "va": "center", "fontsize": 9}
    axis.axhline(floor, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    for row in rows.to_dict("records"):
        x, index = float(row[layout.x]), hues.index(row[layout.hue])
        if 100 * row[REDUCTION] < floor:
            gain = ENGLISH.number(100 * row[REDUCTION], 0)
            axis.text(x, FLOOR - 0.1 - 0.05 * index, gain, ha="center", color=HUES[index % len(HUES)], **place)
        if index == 0 and row[layout.share] >= NOTABLE_SHARE:
            left = ">99" if 0.99 < row[layout.share] < 1 else ENGLISH.number(100 * row[layout.share], 0)
            axis.text(x, 0.03, left, ha="center", color=INK, **place)
    axis.text(-0.015, 0.03, layout.share_short, ha="right", color=MUTED, **{**place, "transform": axis.transAxes})


def _range(rows: pd.DataFrame, layout: CurveLayout) -> tuple[float, float]:
    """Lower and upper end of the y axis in percent: what is not mechanical, zero and the claimed gain are in view."""
    free = rows[~(rows[layout.share] > MECHANICAL_SHARE) | (rows[REDUCTION] >= -2 * layout.claimed_from)]
    low, high = 100 * free[LOW].fillna(free[REDUCTION]).min(), 100 * free[HIGH].fillna(free[REDUCTION]).max()
    top = max(200 * layout.claimed_from, 1.15 * high)
    return max(min(-100 * layout.claimed_from, 1.15 * low), -3 * top), top


def _level(name: str, level: object) -> str:
    """``main``, but ``1,000 steps``."""
    if isinstance(level, int | float) and not isinstance(level, bool):
        return f"{ENGLISH.number(level, 0) if level == int(level) else level} {name}"
    return str(level)


def _legend(layout: CurveLayout, hues: Sequence[str]) -> list[Artist]:
    curves: list[Artist] = [
        Line2D([], [], color=HUES[i % len(HUES)], marker=MARKERS[i % len(MARKERS)], label=f"{layout.hue}: {hue}")
        for i, hue in enumerate(hues)
    ]
    ring = Line2D([], [], linestyle="", marker="o", markersize=11, fillstyle="none", color=INK)
    ring.set_label(layout.special_label)
    below = Line2D([], [], linestyle="", marker="v", color=MUTED, label="below the range, value beneath (%)")
    return [*curves, ring, below, Patch(color=CLAIMED, label=layout.claimed_label)]


def to_png(figure: Figure) -> bytes:
    """The figure as PNG without date or software version, so that equal figures are equal bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


def write_figures(experiment: str, results: Path, out: Path) -> list[Path]:
    """PNGs per evidence campaign of the experiment's version: ``<experiment>_<scale>.png``, and
    ``<experiment>_lengths_<scale>.png`` of averages.

    Settings of one's own add the campaign id.

    Returns:
        The paths; none where there is no evidence or the experiment declares no figure.
    """
    if not {experiment} & {*FIGURES, *DRAWN, *WITH_LENGTHS}:
        return []
    paths, version = [], load_experiment(experiment).version
    for campaign in in_order(load_campaigns(results, experiment)[0]):
        if campaign.version != version:
            continue
        for kind, figure in _figures_of(campaign):
            path = out / f"{experiment}{kind}_{campaign.scale}{_suffix(campaign)}.png"
            png = to_png(figure)
            out.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
            paths.append(path)
    return paths


def _figures_of(campaign: Campaign) -> Iterator[tuple[str, Figure]]:
    """What a figure adds to the name of its file, and the figure."""
    name = campaign.experiment
    if name in FIGURES:
        yield "", draw(campaign, FIGURES[name])
    if name in DRAWN:
        yield "", DRAWN[name](campaign)
    if name in WITH_LENGTHS and has_lengths(campaign):
        yield "_lengths", draw_lengths(campaign)


def _suffix(campaign: Campaign) -> str:
    return "" if is_default(load_experiment(campaign.experiment), campaign) else f"_{campaign.campaign_id}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: writes the figures of one experiment or of all."""
    options = options_of("figures", argv)
    try:
        names = experiments_with_results(options.results, options.experiment)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for name in names:
        try:
            paths = write_figures(name, options.results, options.out)
        except CannotEstimate as error:  # of an unfinished campaign
            print(f"{name}: no figure yet: {error}")
            continue
        print("\n".join(map(str, paths)) or f"{name}: no evidence yet, or no figure is declared in FIGURES")
    return 0


if __name__ == "__main__":
    sys.exit(main())
