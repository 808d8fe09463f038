"""The guide's table of methods from records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.formatting import RUSSIAN
from analysis.load import load_campaigns
from analysis.methods_table import NOTE, methods_markdown
from experiments.harness.record import write_record

TRACK = {"track": "classification"}


def records_of(make_record: Any, experiment: str) -> list[Any]:
    at = {"arm": "final", "step": 40}
    quality = [
        make_record(
            experiment=experiment,
            seed=seed,
            factors={"measure": "quality", **TRACK, "method": "lora"},
            observations=[
                {**at, "split": "test", "value": 0.5 + 0.1 * seed},
                {**at, "split": "test", "metric": "accuracy", "unit": "1", "value": 0.75},
                {**at, "metric": "trainable_share", "unit": "1", "value": 0.0125},
                {**at, "metric": "saved_bytes", "unit": "bytes", "value": 1.5e6},
            ],
        )
        for seed in (0, 1)
    ]
    figures = {"peak_memory_bytes": 2e8, "step_time_sec": 0.25}
    rows = [{"metric": name, "unit": "1", "value": value, "method": "lora"} for name, value in figures.items()]
    return [*quality, make_record(experiment=experiment, factors={"measure": "cost", **TRACK}, observations=rows)]


def campaign_of(folder: Path, make_record: Any, experiment: str) -> Any:
    for record in records_of(make_record, experiment):
        write_record(folder, record)
    ((campaign,), _) = load_campaigns(folder)
    return campaign


def test_a_row_holds_what_was_measured(tmp_path: Path, make_record: Any) -> None:
    text = methods_markdown(campaign_of(tmp_path, make_record, "sft_vs_lora_vs_qlora"), RUSSIAN)
    assert text.startswith(NOTE)
    row = text.splitlines()[-1].replace("\u00a0", " ")
    assert row == "| lora | classification | 1,25 % | 200,0 | 0,250 | 1,50 | 0,5500 ± 0,0707 | 0,750 | 2 |"


def test_other_experiments_have_none(tmp_path: Path, make_record: Any) -> None:
    assert methods_markdown(campaign_of(tmp_path, make_record, "freeze_ratio"), RUSSIAN) == ""
