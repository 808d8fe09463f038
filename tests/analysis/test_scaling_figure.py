"""The figure of what matters to LoRA: its curves are the recorded losses, its points paired differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.figures import to_png, write_figures
from analysis.load import Campaign, load_campaigns
from analysis.scaling import draw_scaling
from experiments.harness.record import write_record
from experiments.lora_scaling import EXPERIMENT

RATES = {1e-4: 0.6, 1e-3: 0.5, 1e-2: 0.7}
TUNED = {("full", "centre"): 0.4, ("lora", "centre"): 0.5, ("lora", "rank_1"): 0.6}


def campaign_of(folder: Path, make_record: Any, version: int = EXPERIMENT.version) -> Campaign:
    for seed in range(3):
        for (method, variant), tuned in TUNED.items():
            noise = 0.01 * (seed - 1) if variant == "rank_1" else 0.0
            rows = [{"metric": "tuned_loss", "split": "test", "value": tuned + noise}]
            rows += [
                {"split": "test", "grid": "long", "learning_rate": rate, "value": loss} for rate, loss in RATES.items()
            ]
            factors = {"track": "classification", "method": method, "variant": variant}
            write_record(
                folder,
                make_record(experiment="lora_scaling", version=version, seed=seed, factors=factors, observations=rows),
            )
    ((campaign,), _) = load_campaigns(folder)
    return campaign


def test_curves_are_the_recorded_losses_of_each_seed(tmp_path: Path, make_record: Any) -> None:
    curves, _ = draw_scaling(campaign_of(tmp_path, make_record)).axes
    assert len(curves.lines) == 3 * 2
    assert {line.get_label() for line in curves.lines if not line.get_label().startswith("_")} == {
        "all weights",
        "LoRA",
    }
    for line in curves.lines:
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == RATES


def test_points_are_reductions_against_the_centre_of_the_same_method(tmp_path: Path, make_record: Any) -> None:
    _, changes = draw_scaling(campaign_of(tmp_path, make_record)).axes
    (label,) = changes.get_yticklabels()
    assert label.get_text() == "LoRA: rank 1"
    bar, point, _ = changes.lines
    assert point.get_xdata() == pytest.approx([-20.0])
    half_width = 4.302653 * 2.0 / 3**0.5  # t(0.975, 2 degrees of freedom), standard deviation 0.01 / 0.5
    assert bar.get_xdata() == pytest.approx([-20 - half_width, -20 + half_width])


def test_the_figure_is_written_for_its_experiment(tmp_path: Path, make_record: Any) -> None:
    campaign = campaign_of(tmp_path, make_record)
    (path,) = write_figures("lora_scaling", tmp_path, tmp_path / "figures")
    assert path.read_bytes() == to_png(draw_scaling(campaign))


def test_a_former_version_has_no_figure(tmp_path: Path, make_record: Any) -> None:
    campaign_of(tmp_path, make_record, EXPERIMENT.version - 1)
    assert write_figures("lora_scaling", tmp_path, tmp_path / "figures") == []
