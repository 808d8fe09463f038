"""Figures: equal records give equal bytes, one file per evidence campaign."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.arms import REDUCTION, layout_of
from analysis.documents import document_figure, document_gains
from analysis.estimands import CannotEstimate
from analysis.figures import FIGURES, draw, main, to_png, write_figures
from analysis.load import load_campaigns
from analysis.notebooks.build import build, sources
from tests.analysis.fake_ema import DOCUMENTS, write_campaign

NAME = "ema_ablation"
PNG = b"\x89PNG"


def texts(figure: Any) -> str:
    """Everything that is written in the figure, legend included."""
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    panels = [text.get_text() for axis in figure.axes for text in axis.texts]
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    return "\n".join([*legends, *panels, *titles, *(text.get_text() for text in figure.texts)])


def test_regenerates_byte_for_byte(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "laptop")
    firsts = write_figures(NAME, tmp_path, tmp_path / "a")
    seconds = write_figures(NAME, tmp_path, tmp_path / "b")
    assert [first.name for first in firsts] == ["ema_ablation_laptop.png", "ema_ablation_lengths_laptop.png"]
    for first, second in zip(firsts, seconds, strict=True):
        assert first.read_bytes().startswith(PNG)
        assert first.read_bytes() == second.read_bytes()


def test_own_settings_do_not_take_the_name_of_the_default(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "laptop")
    other = write_campaign(tmp_path, make_record, "laptop", model="gpt2")
    names = {path.name for path in write_figures(NAME, tmp_path, tmp_path / "figures")}
    own = other[0].spec.campaign_id
    kinds = ("ema_ablation_laptop", "ema_ablation_lengths_laptop")
    assert names == {f"{kind}{suffix}.png" for kind in kinds for suffix in ("", f"_{own}")}


def test_smoke_and_undeclared_experiments_have_no_figure(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "smoke")
    assert write_figures(NAME, tmp_path, tmp_path) == []
    assert write_figures("monitor_detection", tmp_path, tmp_path) == []


def test_says_scope_interval_and_what_is_mechanical(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "laptop")
    (campaign,), _ = load_campaigns(tmp_path)
    said = texts(draw(campaign, FIGURES[NAME]))
    assert campaign.scope in said
    assert "not adjusted for the number of arms" in said
    assert ">99" in said, "0.9999 over 40 steps keeps 99.6 % of the initial weights"
    assert "main · 40 steps" in said
    assert "compute_optimal_decay(T)" in said


def test_one_panel_per_track_and_length(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "cpu")
    (campaign,), _ = load_campaigns(tmp_path)
    titles = [axis.get_title(loc="left") for axis in draw(campaign, FIGURES[NAME]).axes]
    assert len(titles) == 3
    assert titles[0].startswith("main · 200 steps")
    assert "1,000 steps" in titles[1]
    assert titles[1].endswith("tiny-random"), "the length track runs another model, and its panel says so"


def test_command_line(tmp_path: Path, make_record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_campaign(tmp_path, make_record, "laptop")
    assert main([NAME, "--results", str(tmp_path)]) == 0
    assert "ema_ablation_laptop.png" in capsys.readouterr().out
    assert main(["ema", "--results", str(tmp_path)]) == 2


def test_documents_are_paired_within_seed(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "laptop", gain={"constant": 0.05, "cosine": 0.0})
    (campaign,), _ = load_campaigns(tmp_path)
    gains = document_gains(campaign, layout_of(NAME), "ema_optimal", "schedule", {"track": "main"})
    assert set(gains["example"]) == set(DOCUMENTS)
    by_schedule = gains.groupby("schedule")[REDUCTION].mean()
    assert by_schedule["constant"] > 0.03
    assert abs(by_schedule["cosine"]) < 0.01
    assert to_png(document_figure(gains, "schedule", "title")).startswith(PNG)
    with pytest.raises(CannotEstimate, match=r"by document for ema_0\.5"):
        document_gains(campaign, layout_of(NAME), "ema_0.5", "schedule", {"track": "length"})


@pytest.mark.slow
def test_notebook_executes_to_the_same_bytes(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path / "results", make_record, "laptop")
    first, second = (build(sources()[NAME], tmp_path) for _ in range(2))
    assert first == second
    assert "ema-optimal-lowers-loss-constant" in first


@pytest.mark.slow
def test_notebook_executes_without_evidence(tmp_path: Path) -> None:
    assert "No evidence yet" in build(sources()[NAME], tmp_path)
