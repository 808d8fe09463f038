"""Tables: byte for byte from the records, with every planned trial accounted for."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.arms import arm_table, layout_of
from analysis.formatting import ENGLISH, RUSSIAN, format_count, format_estimate, format_region, format_span
from analysis.load import Campaign, load_campaigns
from analysis.tables import main, summary, write_tables
from experiments.harness.claims import ArgBestShift, ExactRatio, Region, RelativeReduction
from experiments.harness.record import write_record
from tests.analysis.fake_ema import plan, write_campaign

NAME = "ema_ablation"


def one_campaign(results: Path) -> Campaign:
    (campaign,), problems = load_campaigns(results)
    assert not problems
    return campaign


def three_seeds(results: Path, make_record: Any, **factors: Any) -> None:
    """Raw losses 2, 4 and 5; the arm is lower by 10 %, 20 % and 30 % of them."""
    for seed, (raw, share) in enumerate([(2.0, 0.1), (4.0, 0.2), (5.0, 0.3)]):
        rows = [
            {"arm": "raw", "split": "test", "value": raw},
            {"arm": "ema", "split": "test", "value": raw * (1 - share), "horizon_steps": 10.0},
            {"arm": "ema", "split": "test", "value": 99.0, "step": 1, "horizon_steps": 10.0},
            {"arm": "ema", "split": "validation", "value": 77.0},
        ]
        record = make_record(seed=seed, factors=factors, observations=rows)
        write_record(results, record)


def test_hand_worked_arm_table(tmp_path: Path, make_record: Any) -> None:
    three_seeds(tmp_path, make_record, schedule="cosine")
    table = arm_table(one_campaign(tmp_path), layout_of(NAME)).set_index("arm")
    assert table.loc["ema", "n"] == 3
    assert table.loc["ema", "eval_loss_mean"] == pytest.approx((1.8 + 3.2 + 3.5) / 3)
    assert table.loc["ema", "relative_reduction"] == pytest.approx(0.2)
    half = 4.302652729911275 * 0.1 / 3**0.5  # t(0.975, 2 degrees of freedom) · sd / √n
    assert table.loc["ema", "relative_reduction_high"] == pytest.approx(0.2 + half)
    assert table.loc["ema", "horizon_steps"] == 10
    assert pd.isna(table.loc["raw", "relative_reduction"])


def test_other_factors_need_no_code(tmp_path: Path, make_record: Any) -> None:
    for ratio in (0.0, 0.5):
        three_seeds(tmp_path, make_record, freeze_ratio=ratio, where="bottom")
    table = arm_table(one_campaign(tmp_path), layout_of("an_experiment_without_a_layout"))
    assert list(table.columns[:3]) == ["freeze_ratio", "where", "arm"]
    assert len(table) == 4


def test_factor_as_the_arm(tmp_path: Path, make_record: Any) -> None:
    layout = layout_of(NAME).__class__(arm="freeze_ratio", control=0.0)
    for seed in (0, 1):
        for ratio, value in ((0.0, 2.0), (0.5, 1.0 + 0.1 * seed)):
            rows = [{"split": "test", "value": value}]
            write_record(tmp_path, make_record(seed=seed, factors={"freeze_ratio": ratio}, observations=rows))
    table = arm_table(one_campaign(tmp_path), layout).set_index("freeze_ratio")
    assert table.loc[0.5, "relative_reduction"] == pytest.approx((0.5 + 0.45) / 2)


def test_without_a_control_there_are_no_reductions(tmp_path: Path, make_record: Any) -> None:
    rows = [{"metric": "detected", "value": 1.0}]
    record = make_record(experiment="monitor_detection", scale="cpu", factors={"fault": "nan_batch"}, observations=rows)
    write_record(tmp_path, record)
    page = write_tables("monitor_detection", tmp_path, tmp_path)[0].read_text(encoding="utf-8")
    assert "| nan_batch |" in page
    assert "reduction" not in page and "95% interval" not in page
    assert "| fault     |" in summary("monitor_detection", tmp_path)
    assert "reduction" not in summary("monitor_detection", tmp_path)


def test_one_seed_has_no_interval(tmp_path: Path, make_record: Any) -> None:
    rows = [{"arm": arm, "split": "test", "value": value} for arm, value in (("raw", 2.0), ("ema", 1.0))]
    write_record(tmp_path, make_record(observations=rows))
    table = arm_table(one_campaign(tmp_path), layout_of(NAME)).set_index("arm")
    assert table.loc["ema", "relative_reduction"] == 0.5
    assert pd.isna(table.loc["ema", "relative_reduction_low"])


def test_regenerates_byte_for_byte(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path / "results", make_record, "laptop")
    write_campaign(tmp_path / "results", make_record, "laptop", model="gpt2", drop=1)
    first = write_tables(NAME, tmp_path / "results", tmp_path / "a")
    copied = shutil.copytree(tmp_path / "results", tmp_path / "elsewhere")
    second = write_tables(NAME, copied, tmp_path / "b")
    assert [path.name for path in first] == [f"{NAME}.md", f"{NAME}.csv", f"{NAME}.tex"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_markdown_names_scope_fate_and_outcome(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "laptop", drop=2)
    text = write_tables(NAME, tmp_path, tmp_path)[0].read_text(encoding="utf-8")
    n = len(plan("laptop"))
    assert "## smollm2-135m · moby_dick · CPU ×2 · laptop · seeds 0–" in text
    assert f"{n - 2} of {n} planned trials succeeded (2 not run)." in text
    assert "not adjusted for the number of arms" in text
    assert "| ema-optimal-lowers-loss-constant | ≥\u00a01% | insufficient |" in text
    assert "Not measured at this scale: ema-best-decay-grows-constant" in text


def test_former_versions_are_named_and_not_shown(tmp_path: Path, make_record: Any) -> None:
    for version, value in ((1, 3.25), (2, 2.25)):
        rows = [{"arm": "raw", "split": "test", "value": value}]
        write_record(tmp_path, make_record(version=version, scale="cpu", observations=rows))
    page, csv, tex = (path.read_text(encoding="utf-8") for path in write_tables(NAME, tmp_path, tmp_path))
    assert all("2.25" in text and "3.25" not in text for text in (page, csv, tex))
    (line,) = page[page.index("## Former versions") :].strip().splitlines()[2:]
    assert "(version 1, campaign" in line
    assert line.endswith(f"1 of 1 planned trials succeeded. Records: `results/{NAME}/v1/`.")


def test_csv_is_tidy(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "laptop")
    text = write_tables(NAME, tmp_path, tmp_path)[1].read_text(encoding="utf-8")
    frame = pd.read_csv(io.StringIO(text))
    assert len(frame) == 2 * (6 + 12 + 2), "two schedules; six arms, twelve lengths, the chosen one, the worst near it"
    assert set(frame["scale"]) == {"laptop"}
    assert frame.loc[frame["arm"] == "raw", "relative_reduction"].isna().all()


def test_tex_escapes_what_is_reserved(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "laptop")
    text = write_tables(NAME, tmp_path, tmp_path)[2].read_text(encoding="utf-8")
    assert r"eval\_loss $\pm$ sd" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert not any(character in "\n".join(lines).replace(r"\%", "") for character in "%−±·×")


def test_smoke_has_no_table_but_a_summary(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "smoke")
    assert write_tables(NAME, tmp_path, tmp_path / "tables") == []
    text = summary(NAME, tmp_path)
    assert "It is not evidence" in text
    assert "| arm" in text


def test_summary_of_one_campaign(tmp_path: Path, make_record: Any) -> None:
    records = write_campaign(tmp_path, make_record, "laptop")
    write_campaign(tmp_path, make_record, "laptop", model="gpt2")
    text = summary(NAME, tmp_path, records[0].spec.campaign_id)
    assert "gpt2" not in text
    assert "- ema-optimal-lowers-loss-constant: confirmed; +1.9" in text
    assert "no records of ema_ablation" in summary(NAME, tmp_path / "nowhere")


def test_campaign_without_successful_trials_says_so(tmp_path: Path, make_record: Any) -> None:
    write_record(tmp_path, make_record(status="oom", error="out of memory"))
    text = summary(NAME, tmp_path)
    assert "0 of 1 planned trials succeeded (1 oom)." in text
    assert "No arm table: no trial that succeeded" in text


def test_exploratory_is_marked(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "laptop", claims={})
    assert "exploratory (confirmed)" in write_tables(NAME, tmp_path, tmp_path)[0].read_text(encoding="utf-8")


def test_scope_names_only_the_trials_that_a_claim_reads(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "cpu")
    campaign = one_campaign(tmp_path)
    assert campaign.scope_of({"track": "main", "split": "test"}).startswith("smollm2-135m · moby_dick · ")
    assert campaign.scope_of({"track": "length"}).startswith("tiny-random · moby_dick · ")
    assert campaign.scope.startswith("smollm2-135m, tiny-random · moby_dick · ")
    text = write_tables(NAME, tmp_path, tmp_path)[0].read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("| ema-best-decay-grows-constant |")]
    assert "tiny-random · moby_dick · CPU ×2 · cpu · seeds 0–11" in line
    assert "smollm2" not in line


def test_command_line(tmp_path: Path, make_record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_campaign(tmp_path, make_record, "laptop")
    assert main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "tables" / f"{NAME}.md").exists()
    assert main(["ema_ablatoin", "--results", str(tmp_path)]) == 2
    assert "did you mean ema_ablation" in capsys.readouterr().err


def test_number_formats() -> None:
    reduction = RelativeReduction("eval_loss", {}, {})
    assert format_estimate(reduction, 0.01234, RUSSIAN) == "+1,23\u00a0%"
    assert format_estimate(reduction, -0.00001, ENGLISH) == "0.00%"
    assert format_estimate(ExactRatio("a", "b"), 1.0, ENGLISH) == "1.000"
    assert format_estimate(ArgBestShift("a", "b", {}, {}), 0.5, RUSSIAN) == "×\u00a03,16"
    assert format_region(reduction, Region(low=0.01), RUSSIAN) == "≥\u00a01\u00a0%"
    assert format_region(ExactRatio("a", "b"), Region(0.99, 1.01), RUSSIAN) == "[0,99; 1,01]"
    assert format_count(10_000, RUSSIAN) == "10\u00a0000"
    assert format_count(99.99999999999999, ENGLISH) == "100"
    assert format_span(0.97044, ENGLISH) == "97.0%"
    assert format_span(1e-9, ENGLISH) == "<\u00a00.1%"
    assert ENGLISH.number(float("nan"), 2) == "NaN"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (1234.5, "1,234.50"),
        (0.1, "0.10"),
        (0.0123, "0.012"),
        (-0.0004, "−0.00040"),
        (0.00001, "0.000010"),
        (1.23e-7, "1.2e-07"),
        (-4.4e-16, "0.00"),
        (-1.23e-7, "−1.2e-07"),
        (float("nan"), "NaN"),
        (float("-inf"), "−∞"),
    ],
)
def test_a_figure_has_two_significant_digits(value: float, text: str) -> None:
    assert ENGLISH.figure(value, 2) == text
    assert RUSSIAN.figure(value, 2) == text.replace(",", "\u00a0").replace(".", ",")
