"""The figure of ``lora_scaling``: learning-rate curves of SFT and LoRA, and what each change of an arm is worth.

Serves the sections «Training Presets» of THEORY.md and those on the lecture and on classic fine-tuning.
"""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.arms import REDUCTION, arm_table, layout_of
from analysis.estimands import select
from analysis.load import Campaign
from analysis.style import HUES, INK, MUTED, NAMES, STYLE
from experiments.harness.claims import Selector

CURVES: dict[str, tuple[Selector, str, str]] = {
    "all weights": ({"method": "full", "variant": "centre"}, HUES[0], "-"),
    "all weights, no warm-up": ({"method": "full", "variant": "no_warmup"}, HUES[0], "--"),
    "LoRA": ({"method": "lora", "variant": "centre"}, HUES[1], "-"),
}
METHOD_HUES = {"full": HUES[0], "lora": HUES[1]}


@rc_context(STYLE)
def draw_scaling(campaign: Campaign) -> Figure:
    """Left: test loss against the learning rate, a line a seed. Right: change of the tuned loss against the centre."""
    table = arm_table(campaign, layout_of(campaign.experiment))
    tracks = list(dict.fromkeys(table["track"]))
    figure = Figure(figsize=(13, 6.2 * len(tracks) + 1.0), layout="constrained")
    grid = figure.subplots(len(tracks), 2, squeeze=False, width_ratios=(1, 1.15))
    for (left, right), track in zip(grid, tracks, strict=True):
        _curves(left, select(campaign.observations, {"track": track, "metric": "eval_loss", "split": "test"}))
        _changes(right, table[(table["track"] == track) & table[REDUCTION].notna()])
        title = f"{NAMES.get(track, track)} · {campaign.models_of({'track': track})}"
        left.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
    figure.suptitle(
        f"Learning rates, and what else matters · {campaign.scope}\nLeft: a line a seed. Right: bars are 95% "
        "t-intervals of the difference paired within seed, not adjusted for the number of arms.",
        x=0.01,
        ha="left",
        fontsize=11.5,
    )
    return figure


def _curves(axis: Axes, rows: pd.DataFrame) -> None:
    """Test loss against the learning rate on the long grid and at what the search tried between."""
    for name, (selector, hue, line) in CURVES.items():
        arm = select(rows, selector)
        for number, (_, of_seed) in enumerate(arm.groupby("seed")):
            curve = of_seed.sort_values("learning_rate")
            label = name if number == 0 else None
            axis.plot(curve["learning_rate"], curve["value"], line, color=hue, lw=1.1, alpha=0.75, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("test loss, nats")
    axis.legend(frameon=False, fontsize=9.5, loc="upper left")


def _changes(axis: Axes, table: pd.DataFrame) -> None:
    """Relative reduction of the tuned loss against the centre of the same method, one line an arm."""
    labels = [
        f"{NAMES[str(m)]}: {str(v).replace('_', ' ')}" for m, v in zip(table["method"], table["variant"], strict=True)
    ]
    for y, (_, row) in enumerate(table.iterrows()):
        hue = METHOD_HUES[str(row["method"])]
        value, low, high = (100 * row[name] for name in (REDUCTION, f"{REDUCTION}_low", f"{REDUCTION}_high"))
        axis.plot([low, high], [y, y], color=hue, lw=1.6)
        axis.plot(value, y, "o", color=hue, ms=5.5)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.axvline(0, color=INK, lw=0.8)
    axis.set_xlabel("reduction of the tuned test loss against the centre, %")
    axis.set_title(
        "centre: r 16, alpha 2r on q,k,v,o; batches of 8, cosine, warm-up 10%. Right is better.",
        loc="left",
        fontsize=9,
        color=MUTED,
    )
