"""The figure of the methods: what it draws is what the records say, and the front holds what nothing beats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.estimands import CannotEstimate
from analysis.figures import to_png, write_figures
from analysis.load import Campaign, load_campaigns
from analysis.pareto import draw_pareto, front
from experiments.harness.record import write_record
from experiments.sft_vs_lora_vs_qlora import EXPERIMENT

NAME, TRACK = EXPERIMENT.name, {"track": "language_modelling"}
CURRENT = {"experiment": NAME, "version": EXPERIMENT.version}
LOSSES = {"zero-shot": 3.0, "sft": 2.0, "lora": 2.2, "qlora": 2.3}
MEGABYTES = {"sft": 400.0, "lora": 200.0, "qlora": 250.0}


def campaign_of(folder: Path, make_record: Any, *, cost: bool = True) -> Campaign:
    plan = []
    for seed in range(3):
        for method, loss in LOSSES.items():
            at = {"arm": "final", "step": 0 if method == "zero-shot" else 10}
            rows = [{**at, "split": "test", "value": loss + 0.1 * (seed - 1)}]
            if method in MEGABYTES:
                sizes = {"saved_bytes": 1e6 * MEGABYTES[method] / 10, "peak_memory_bytes": 1.0}
                rows += [{**at, "metric": name, "unit": "bytes", "value": size} for name, size in sizes.items()]
            factors = {"measure": "quality", **TRACK, "method": method}
            plan.append(make_record(**CURRENT, seed=seed, factors=factors, observations=rows))
    if cost:
        rows = [
            {"metric": metric, "unit": "1", "value": value * 1e6, "method": method}
            for method, value in MEGABYTES.items()
            for metric in ("peak_memory_bytes", "step_time_sec")
        ]
        plan.append(make_record(**CURRENT, factors={"measure": "cost", **TRACK}, observations=rows))
    for record in plan:
        write_record(folder, record)
    ((campaign,), _) = load_campaigns(folder)
    return campaign


def test_the_front_holds_what_nothing_beats_at_no_more_cost() -> None:
    points = pd.DataFrame({"method": list("abcde"), "cost": [1, 2, 2, 3, 4], "loss": [3.0, 2.5, 2.0, 2.2, 1.0]})
    assert list(front(points, "cost")["method"]) == ["a", "c", "e"]


def test_points_are_means_at_their_cost_with_t_intervals(tmp_path: Path, make_record: Any) -> None:
    memory, _, size = draw_pareto(campaign_of(tmp_path, make_record)).axes
    drawn = {c.get_label(): c for c in memory.containers}
    assert set(drawn) == set(MEGABYTES)
    line, _, (bars,) = drawn["lora"].lines
    assert (*line.get_xdata(), *line.get_ydata()) == pytest.approx((200, 2.2))
    half_width = 4.302653 * 0.1 / 3**0.5  # t(0.975, 2 degrees of freedom), standard deviation 0.1
    assert bars.get_segments()[0][:, 1] == pytest.approx([2.2 - half_width, 2.2 + half_width])
    (baseline,) = (line for line in memory.lines if line.get_label() == "zero-shot")
    assert list(baseline.get_ydata()) == pytest.approx([3, 3])
    assert size.containers[0].lines[0].get_xdata() == pytest.approx([40])


def test_file_is_written_and_equal_for_equal_records(tmp_path: Path, make_record: Any) -> None:
    campaign = campaign_of(tmp_path, make_record)
    (path,) = write_figures(NAME, tmp_path, tmp_path / "figures")
    assert path.read_bytes() == to_png(draw_pareto(campaign))


def test_without_cost_it_says_what_is_missing(tmp_path: Path, make_record: Any) -> None:
    with pytest.raises(CannotEstimate, match="needs trials of cost, got none"):
        draw_pareto(campaign_of(tmp_path, make_record, cost=False))
