"""The table of what a training step costs."""

from __future__ import annotations

import pytest

from analysis.costs import cost_markdown, cost_table
from analysis.formatting import ENGLISH, RUSSIAN
from analysis.load import load_campaigns
from experiments.harness.record import TrialSpec, write_record

FIGURES = {
    "peak_memory_bytes": 4e6,
    "predicted_peak_bytes": 4.1e6,
    "seed_formula_bytes": 1e6,
    "parameter_bytes": 1e6,
    "gradient_bytes": 5e5,
    "optimizer_bytes": 1e6,
    "step_time_sec": 0.25,
}


def rows(arm, **more):
    figures = FIGURES | more
    return [{"metric": name, "unit": "bytes", "value": value, "frozen": arm} for name, value in figures.items()]


@pytest.fixture
def campaign(make_record, tmp_path):
    def build(observations_of):
        records = [make_record(seed=seed, observations=observations_of(seed)) for seed in (0, 1)]
        for record in records:
            assert isinstance(record.spec, TrialSpec)
            write_record(tmp_path, record)
        return load_campaigns(tmp_path)[0][0]

    return build


def test_means_over_seeds_and_ratios_to_the_peak(campaign):
    found = campaign(lambda seed: [*rows("none"), *rows("half", peak_memory_bytes=2e6 + seed * 1e6)])
    table = cost_table(found).set_index("frozen")
    assert list(table.index) == ["none", "half"]
    assert table.loc["half", "peak_memory_bytes"] == 2.5e6
    assert list(table["n"]) == [2, 2]
    english, russian = cost_markdown(found, "en", ENGLISH), cost_markdown(found, "ru", RUSSIAN)
    assert "| none | 1.0 | 0.5 | 1.0 | 4.0 | 4.1 (1.0250) | 1.0 (0.2500) | 0.250 | — | 2 |" in english
    assert "| half | 1,0 | 0,5 | 1,0 | 2,5 | 4,1 (1,6400) | 1,0 (0,4000) | 0,250 | — | 2 |" in russian


def test_nothing_where_no_memory_was_measured(campaign):
    found = campaign(lambda seed: [{"value": 1.0, "arm": "raw"}])
    assert cost_table(found).empty
    assert cost_markdown(found, "en", ENGLISH) == ""


def test_trials_of_quality_that_note_their_peak_are_no_costs(campaign):
    quality = {"metric": "peak_memory_bytes", "unit": "bytes", "value": 9e9, "arm": "final"}
    assert cost_table(campaign(lambda seed: [quality])).empty
