"""Picture of a memory report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forge.memory.profile.report import MemoryReport
    from forge.memory.profile.trace import Component

_COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "optimizer": "#54a24b"}
_HELD: tuple[tuple[Component, str], ...] = (("parameters", "#9d9d9d"), ("optimizer_state", "#c7c7c7"))
_GIB = 2**30


def plot_timeline(report: MemoryReport, path: Path) -> None:
    """Memory over the events of one step: coloured by phase, over what is held throughout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    heights = [size / _GIB for _, size in report.timeline]
    positions = range(len(heights))
    for phase, colour in _COLOURS.items():
        inside = [name == phase for name, _ in report.timeline]
        axes.fill_between(positions, heights, where=inside, step="post", color=colour, label=phase, alpha=0.8)
    floor = 0.0
    for component, colour in _HELD:
        top = floor + report.components[component] / _GIB
        if top > floor:
            axes.fill_between(positions, floor, top, color=colour, label=component.replace("_", " "))
        floor = top
    peak = report.peak_bytes / _GIB
    axes.annotate(
        f"peak {peak:,.3g} GiB ({report.phase})",
        xy=(heights.index(max(heights)), peak),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
    )
    axes.set(xlabel="allocations and releases of one optimizer step", ylabel="GiB", ylim=(0, peak * 1.15))
    axes.set_xlim(0, len(heights) - 1)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
