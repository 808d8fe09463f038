"""The figure of frozen layers: what it draws is what the records say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.estimands import CannotEstimate
from analysis.figures import to_png, write_figures
from analysis.freezing import draw_freezing
from analysis.load import Campaign, load_campaigns
from experiments.harness.record import write_record

NAME = "freeze_ratio"
LOSSES = {"lower_0": 2.0, "lower_50": 2.2, "lower_90": 2.5, "upper_50": 2.1}
LEVELS = {"lower_0": 1.0, "lower_50": 2.0, "lower_90": 6.0}
"""Layers over layers that train: of six, 90 % are five."""
SHARE_LEFT = {"lower_0": 1.0, "lower_50": 0.4, "lower_90": 0.1, "upper_50": 0.5}


def campaign_of(folder: Path, make_record: Any, *, cost: bool = True) -> Campaign:
    track = {"track": "language_modelling", "method": "full"}
    plan = []
    for seed in range(3):
        for arm, loss in LOSSES.items():
            row = {"split": "test", "arm": "trained", "value": loss + 0.01 * seed * (arm != "lower_0")}
            if arm in LEVELS and seed == 1:  # only some seeds carry it
                row["layers_per_trained_layer"] = LEVELS[arm]
            factors = {"measure": "quality", **track, "frozen": arm}
            plan.append(make_record(experiment=NAME, seed=seed, factors=factors, observations=[row]))
    if cost:
        rows = [
            {"metric": metric, "unit": "1", "value": 8.0 * left, "frozen": arm}
            for arm, left in SHARE_LEFT.items()
            for metric in ("peak_memory_bytes", "gradient_bytes", "step_time_sec")
        ]
        plan.append(make_record(experiment=NAME, factors={"measure": "cost", **track}, observations=rows))
    for record in plan:
        write_record(folder, record)
    ((campaign,), _) = load_campaigns(folder)
    return campaign


def test_curves_hold_the_paired_reduction_and_the_saved_share(tmp_path: Path, make_record: Any) -> None:
    upper, lower = draw_freezing(campaign_of(tmp_path, make_record)).axes
    assert upper.get_title(loc="left") == "language modelling, all weights"
    (below,) = (line for line in upper.lines if line.get_marker() == "o")
    assert list(below.get_xdata()) == pytest.approx([50, 500 / 6])
    assert below.get_ydata() == pytest.approx([-10.5, -25.5])
    peak = next(line for line in lower.lines if line.get_label() == "peak of a step")
    assert list(peak.get_xdata()) == pytest.approx([0, 50, 500 / 6])
    assert peak.get_ydata() == pytest.approx([0, 60, 90])
    halves = [line.get_ydata() for line in lower.lines if line.get_fillstyle() == "left"]
    assert halves == [pytest.approx([50])] * 3


def test_file_is_written_and_equal_for_equal_records(tmp_path: Path, make_record: Any) -> None:
    campaign = campaign_of(tmp_path, make_record)
    (path,) = write_figures(NAME, tmp_path, tmp_path / "figures")
    assert path.read_bytes() == to_png(draw_freezing(campaign))


def test_without_cost_it_says_what_is_missing(tmp_path: Path, make_record: Any) -> None:
    with pytest.raises(CannotEstimate, match="needs trials of cost, got none"):
        draw_freezing(campaign_of(tmp_path, make_record, cost=False))
