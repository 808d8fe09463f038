"""The figure of averaging lengths: its lines are the paired reductions of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.arms import REDUCTION, arm_table, layout_of
from analysis.estimands import CannotEstimate
from analysis.figures import write_figures
from analysis.lengths import draw_lengths
from analysis.load import Campaign, load_campaigns
from experiments.harness.averaging import LENGTHS
from experiments.harness.record import write_record
from tests.analysis.fake_ema import write_campaign

NAME = "ema_ablation"


@pytest.fixture
def campaign(tmp_path: Path, make_record: Any) -> Campaign:
    write_campaign(tmp_path, make_record, "cpu")
    ((found,), _) = load_campaigns(tmp_path)
    return found


def curves(axis: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axis.lines if not str(line.get_label()).startswith("_")}


def test_one_line_per_schedule_and_length_of_run(campaign: Campaign) -> None:
    main, length = draw_lengths(campaign).axes
    assert main.get_title(loc="left") == "main · smollm2-135m"
    assert set(curves(main)) == {"constant · 200 steps", "cosine · 200 steps"}
    assert set(curves(length)) == {f"{s} · {n} steps" for s in ("constant", "cosine") for n in ("1,000", "10,000")}


def test_a_line_holds_the_paired_reduction_of_each_length(campaign: Campaign) -> None:
    table = arm_table(campaign, layout_of(NAME))
    rows = table[(table["track"] == "main") & (table["schedule"] == "cosine") & table["sigma_rel"].notna()]
    line = curves(draw_lengths(campaign).axes[0])["cosine · 200 steps"]
    assert tuple(line.get_xdata()) == LENGTHS
    assert line.get_ydata() == pytest.approx((100 * rows.sort_values("sigma_rel")[REDUCTION]).to_list())


def test_records_without_lengths_have_the_other_figure_alone(tmp_path: Path, make_record: Any) -> None:
    """Those of version 1."""
    for arm, loss in (("raw", 2.0), ("ema_0.9", 1.9)):
        rows = [{"split": "test", "arm": a, "value": v, "horizon_steps": 10.0, "initial_weight_share": 0.0}
                for a, v in (("raw", 2.0), (arm, loss))][-1:]  # fmt: skip
        factors = {"track": "main", "schedule": arm, "steps": 100}
        write_record(tmp_path, make_record(factors=factors, observations=rows))
    campaign = load_campaigns(tmp_path)[0][0]
    with pytest.raises(CannotEstimate, match="needs averages with sigma_rel, got none"):
        draw_lengths(campaign)
    assert write_figures("ema_conditions", tmp_path, tmp_path) == []
