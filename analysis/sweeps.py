"""What the studies of ``preset_vs_tuned`` found: regret of the defaults, importance of every option, what was chosen.

Serves the section «Training Presets» of THEORY.md through a table and a figure; the verdicts come from
``analysis.verdicts``.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from analysis.estimands import CannotEstimate, per_seed_values, select
from analysis.formatting import ENGLISH, NOTHING, markdown_table
from analysis.load import Campaign
from analysis.statistics import mean_interval
from analysis.style import CLAIMED, HUES, INK, MUTED, NAMES, STYLE
from experiments.harness.claims import Regret

CLAIMED_TO = 5.0
"""Percent of regret up to which the defaults count as near the tuned setting."""
HEADER = ("track", "preset", "option", "default", "chosen", "importance ± sd", "n")
NOTE = (
    "Importance: share of an option in what tells the best third of a study's runs from all of them (PED-ANOVA), mean "
    "over studies; of k options that matter alike each has 1/k. Chosen: in the best run on validation, of rates the "
    "geometric mean and the range. n: studies."
)


def importance_table(campaign: Campaign) -> pd.DataFrame:
    """One row per task, preset and option: its level in the defaults, those that were chosen, and its importance.

    Columns: ``track``, ``preset``, ``option``, ``default``, ``chosen`` (text), ``mean`` and ``sd`` of the importance
    over studies, ``n``. Empty where no study was recorded.
    """
    observations = campaign.observations
    if "option" not in observations.columns:
        return pd.DataFrame()
    runs = select(observations, {"arm": "study", "split": "validation"})
    options = [option for option in dict.fromkeys(observations["option"].dropna()) if option in runs.columns]
    rows = []
    shares = observations[(observations["metric"] == "importance") & observations["option"].isin(options)]
    for levels, cell in shares.groupby(["track", "preset", "option"], sort=False):
        track, preset, option = map(str, levels)
        study = select(runs, {"track": track, "preset": preset})
        first, best = study[study["run"] == 0], study[study["chosen"].eq(True)]
        row = {"track": track, "preset": preset, "option": option}
        row |= {"default": _level(next(iter(first[option]), None)), "chosen": _chosen(list(best[option]))}
        rows.append(row | {"mean": cell["value"].mean(), "sd": cell["value"].std(ddof=1), "n": len(cell)})
    return pd.DataFrame(rows)


def sweeps_markdown(campaign: Campaign) -> str:
    """The table with its note, and what the studies spent; empty where no study was recorded."""
    table = importance_table(campaign)
    if table.empty:
        return ""
    shown = [
        [*row[:5], f"{ENGLISH.number(100 * row[5], 0)} ± {ENGLISH.number(100 * row[6], 0)}%", str(row[7])]
        for row in table.itertuples(index=False, name=None)
    ]
    spent = []
    for track, preset in dict.fromkeys(zip(table["track"], table["preset"], strict=True)):
        of_preset = select(campaign.observations, {"track": track, "preset": preset})
        means = of_preset.groupby("metric")["value"].mean()
        pruned, steps = means["pruned_runs"], means["steps_spent"]
        spent.append(f"{track} {preset} {ENGLISH.number(pruned, 1)} and {ENGLISH.number(steps, 0)}")
    text = markdown_table(HEADER, shown, [False] * 5 + [True] * 2)
    return f"{text}\n\n{NOTE}\n\nRuns pruned and optimizer steps of a study, on average: {', '.join(spent)}."


def _level(value: object) -> str:
    if value is None or value != value:  # missing, as NaN
        return NOTHING
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _chosen(values: list[object]) -> str:
    """How often each level was chosen; of a rate, which has no levels, the geometric mean and the range."""
    counts = Counter(map(_level, values))
    if len(counts) > 3 and all(isinstance(value, float) and value > 0 for value in values):
        rates = [float(str(value)) for value in values]
        return f"{math.exp(np.mean(np.log(rates))):.1e} ({min(rates):.1e}–{max(rates):.1e})"
    return ", ".join(f"{level} ×{count}" for level, count in counts.most_common())


@rc_context(STYLE)
def draw_sweeps(campaign: Campaign) -> Figure:
    """Left: regret of the defaults, a dot a seed, with its interval. Right: mean importance of every option.

    Raises:
        CannotEstimate: if no study was recorded.
    """
    table = importance_table(campaign)
    if table.empty:
        raise CannotEstimate("the figure of sweeps needs the importances of a study, got none; run today's version")
    tracks = list(dict.fromkeys(table["track"]))
    rows = [max(2, table.loc[table["track"] == track, "preset"].nunique()) for track in tracks]
    figure = Figure(figsize=(13, 1.6 + sum(0.75 * n + 1.6 for n in rows)), layout="constrained")
    grid = figure.subplots(len(tracks), 2, squeeze=False, width_ratios=(1, 1.4), height_ratios=rows)
    for (left, right), track in zip(grid, tracks, strict=True):
        of_track = table[table["track"] == track]
        presets = list(dict.fromkeys(of_track["preset"]))
        _regrets(left, campaign, str(track), presets)
        _importances(right, of_track, presets)
        title = f"{NAMES.get(str(track), str(track))} · {campaign.models_of({'track': track})}"
        left.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
    figure.suptitle(
        f"Defaults against tuning, and which option matters · {campaign.scope}\nLeft: dots are seeds, bars 95% "
        f"t-intervals of their mean, not adjusted for the number of presets; shaded: at most {CLAIMED_TO:.0f}%. Right: "
        "mean over studies.",
        x=0.01,
        ha="left",
        fontsize=11.5,
    )
    return figure


def _regrets(axis: Axes, campaign: Campaign, track: str, presets: list[str]) -> None:
    for y, preset in enumerate(presets):
        where = {"track": track, "preset": preset, "split": "test"}
        regret = 100 * per_seed_values(
            Regret("eval_loss", {"arm": "defaults"}, ({"arm": "tuned"},), where), campaign.observations
        )
        axis.plot(regret, [y - 0.16] * len(regret), "o", color=MUTED, ms=4, alpha=0.6)
        axis.plot(regret.mean(), y, "D", color=HUES[0], ms=7)
        try:
            interval = mean_interval(regret, 0.05)
        except CannotEstimate:  # one seed, or equal ones
            continue
        axis.plot([interval.low, interval.high], [y, y], color=HUES[0], lw=1.8)
    low, high = axis.get_xlim()
    axis.axvspan(low, CLAIMED_TO, color=CLAIMED, zorder=0, lw=0)
    axis.set_xlim(low, max(high, 1.2 * CLAIMED_TO))
    axis.axvline(0, color=INK, lw=0.8)
    axis.set_yticks(range(len(presets)), presets)
    axis.set_ylim(len(presets) - 0.5, -0.5)
    axis.set_xlabel("regret: test loss of the defaults above the tuned setting's, %")


def _importances(axis: Axes, table: pd.DataFrame, presets: list[str]) -> None:
    shares = table.pivot_table(index="preset", columns="option", values="mean", sort=False).reindex(presets)
    axis.imshow(
        shares.to_numpy(dtype=float),
        cmap=LinearSegmentedColormap.from_list("share", ["white", HUES[0]]),
        vmin=0.0,
        vmax=1.0,
        aspect="auto",
    )
    for (y, x), share in np.ndenumerate(shares.to_numpy(dtype=float)):
        text = NOTHING if math.isnan(share) else ENGLISH.share(share, 0)
        axis.text(x, y, text, ha="center", va="center", color="white" if share > 0.5 else INK)
    axis.set_xticks(range(len(shares.columns)), [str(name).replace("_", "\n") for name in shares.columns], fontsize=9)
    axis.set_yticks(range(len(presets)), presets)
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_title("importance of an option", loc="left", fontsize=10.5)
