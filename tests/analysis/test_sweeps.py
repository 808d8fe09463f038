"""What is shown of studies: levels, importances and regrets are those of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.estimands import CannotEstimate
from analysis.figures import to_png, write_figures
from analysis.load import Campaign, load_campaigns
from analysis.sweeps import draw_sweeps, importance_table, sweeps_markdown
from analysis.tables import write_tables
from experiments.harness.record import write_record
from experiments.preset_vs_tuned import EXPERIMENT

NAME = EXPERIMENT.name
CHOSEN = (1e-5, 1e-4, 1e-3, 1e-4)
SCHEDULES = ("cosine", "linear", "cosine", "cosine")


def campaign_of(folder: Path, make_record: Any, seeds: int = 4) -> Campaign:
    """Studies of two runs each, the second of which was chosen; ``sft`` loses 10, 20, 30, 40 % against it."""
    for seed in range(seeds):
        for preset in ("sft", "lora"):
            of_lora = {"lora_r": 16} if preset == "lora" else {}
            study = {"arm": "study", "split": "validation", "pruned": False}
            first = {"run": 0, "chosen": False, "learning_rate": 2e-5, "lr_scheduler_type": "cosine", **of_lora}
            second = {"run": 1, "chosen": True, "learning_rate": CHOSEN[seed], "lr_scheduler_type": SCHEDULES[seed]}
            shares = {"learning_rate": 0.7, "lr_scheduler_type": 0.3 - 0.1 * len(of_lora), "learning_rate + next": 1.0}
            shares |= {"lora_r": 0.1 + 0.02 * seed} if of_lora else {}
            loss = 1.0 + (0.1 * (seed + 1) if preset == "sft" else 0.0)
            rows = [
                {"value": 0.6, **study, **first},
                {"value": 0.5, **study, **second, **of_lora},
                *({"metric": "importance", "arm": "study", "option": o, "value": v} for o, v in shares.items()),
                {"metric": "pruned_runs", "arm": "study", "value": float(seed)},
                {"metric": "steps_spent", "arm": "study", "value": 1_000.0},
                {"split": "test", "arm": "defaults", "value": loss},
                {"split": "test", "arm": "tuned", "value": 1.0},
            ]
            factors = {"track": "classification", "preset": preset}
            made = make_record(
                experiment=NAME, version=EXPERIMENT.version, seed=seed, factors=factors, observations=rows
            )
            write_record(folder, made)
    ((campaign,), _) = load_campaigns(folder)
    return campaign


def test_a_row_an_option_with_its_default_and_what_was_chosen(tmp_path: Path, make_record: Any) -> None:
    table = importance_table(campaign_of(tmp_path, make_record)).set_index(["preset", "option"])
    assert len(table) == 2 + 3 and set(table["n"]) == {4}
    assert table.loc[("sft", "lr_scheduler_type"), ["default", "chosen"]].tolist() == ["cosine", "cosine ×3, linear ×1"]
    assert table.loc[("lora", "lora_r"), ["default", "chosen"]].tolist() == ["16", "16 ×4"]
    assert table.loc[("lora", "lora_r"), "mean"] == pytest.approx(0.13)
    assert table.loc[("sft", "learning_rate"), "default"] == "2e-05"


def test_rates_without_levels_have_a_mean_and_a_range(
    tmp_path: Path, make_record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.CHOSEN", (1e-5, 2e-5, 4e-5, 8e-5))
    table = importance_table(campaign_of(tmp_path, make_record)).set_index(["preset", "option"])
    assert table.loc[("sft", "learning_rate"), "chosen"] == "2.8e-05 (1.0e-05–8.0e-05)"


def test_the_page_has_the_table_and_what_was_spent(tmp_path: Path, make_record: Any) -> None:
    campaign_of(tmp_path, make_record)
    page, *_ = write_tables(NAME, tmp_path, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "### Studies" in text and "70 ± 0%" in text and "learning_rate + next" not in text.split("### Studies")[1]
    assert "on average: classification sft 1.5 and 1,000, classification lora 1.5 and 1,000." in text


def test_regrets_are_those_of_each_seed_and_their_mean(tmp_path: Path, make_record: Any) -> None:
    regrets, importances = draw_sweeps(campaign_of(tmp_path, make_record)).axes
    seeds, mean, interval, *_ = regrets.lines
    assert list(seeds.get_xdata()) == pytest.approx([10, 20, 30, 40])
    assert list(mean.get_xdata()) == pytest.approx([25])
    assert list(interval.get_xdata()) == pytest.approx([25 - 20.54, 25 + 20.54], abs=0.01)  # t(3) = 3.182, sd 12.91
    shown = {text.get_text() for text in importances.texts}
    assert shown == {"70%", "30%", "—", "20%", "13%"}


def test_one_seed_has_no_interval(tmp_path: Path, make_record: Any) -> None:
    figure = draw_sweeps(campaign_of(tmp_path, make_record, seeds=1))
    assert len(figure.axes[0].lines) == 2 * 2 + 1  # a dot and a mean for each preset, and the zero line
    assert to_png(figure).startswith(b"\x89PNG")


def test_without_studies_nothing_is_shown(tmp_path: Path, make_record: Any) -> None:
    write_record(tmp_path, make_record(experiment=NAME, version=EXPERIMENT.version))
    ((campaign,), _) = load_campaigns(tmp_path)
    assert sweeps_markdown(campaign) == ""
    with pytest.raises(CannotEstimate, match="importances of a study"):
        draw_sweeps(campaign)


def test_the_file_is_written(tmp_path: Path, make_record: Any) -> None:
    campaign_of(tmp_path, make_record)
    (path,) = write_figures(NAME, tmp_path, tmp_path)
    assert path.name.startswith(f"{NAME}_cpu") and path.suffix == ".png"
