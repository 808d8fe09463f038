"""THEORY.md: only committed evidence of today's claims, at the scale's own settings, moves a status."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis import theory
from analysis.evidence import find, planned
from analysis.load import load_campaigns
from experiments.harness.claims import ArgBestShift, Claim, Region
from experiments.harness.experiment import UserError, load_experiment, load_experiments
from experiments.harness.record import ManipulationCheck, write_record
from tests.analysis.fake_ema import EXPERIMENT, plan, write_campaign

TEXT = theory.ROOT.joinpath("THEORY.md").read_text(encoding="utf-8")
MARKERS = ["verdicts:ema", "verdicts:freezing", "verdicts:presets", "verdicts:monitor", "verdicts:engine", "status"]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A copy of THEORY.md that agrees with an empty ``results`` beside it."""
    path = tmp_path / "THEORY.md"
    path.write_text(TEXT, encoding="utf-8")
    assert run(path) == 0
    return path


def run(document: Path, *options: str) -> int:
    return theory.main(["--theory", str(document), "--results", str(document.parent / "results"), *options])


def block(document: Path, name: str = "verdicts:ema") -> str:
    text = document.read_text(encoding="utf-8")
    start, end = theory.block_span(text, name)
    return text[start:end]


def row(document: Path, words: str) -> str:
    """The one table row of the EMA block that contains the words."""
    (found,) = [line for line in block(document).splitlines() if line.startswith("|") and words in line]
    return found


@pytest.mark.parametrize("marker", MARKERS)
def test_every_marker_is_there_once(marker: str) -> None:
    assert TEXT.count(f"<!-- {marker} -->") == TEXT.count(f"<!-- /{marker} -->") == 1


def test_each_block_lies_in_the_practice_of_its_section() -> None:
    for title, marker in zip(
        ("EMA (", "Layer Freezing", "Training Presets", "Training Monitor", "Движок вердиктов"), MARKERS, strict=False
    ):
        section = re.search(rf"^## \S+ {re.escape(title)}.*?(?=^## )", TEXT, re.MULTILINE | re.DOTALL)
        assert section is not None
        assert f"<!-- {marker} -->" in section[0].split("### 🧪 Практика")[1]


def test_committed_document_agrees_with_committed_results() -> None:
    assert theory.main(["--check"]) == 0


def test_without_evidence_every_claim_is_pending(document: Path) -> None:
    assert block(document).count("🔴 **Предстоит**") == 1 + sum(
        claim.section == "ema" for experiment in load_experiments() for claim in experiment.claims
    )
    assert "✅" not in block(document)
    assert block(document, "status").count("🔴 Предстоит") >= 4
    assert "- [x]" not in document.read_text(encoding="utf-8")


def test_what_was_not_run_here_has_no_tick(document: Path) -> None:
    """A test file proves no more than that it is there, and a guide's word is the guide's."""
    status = block(document, "status")
    assert "✅" not in status
    assert status.count("| есть") == len(theory.SECTIONS)
    assert re.search(r"\| EMA +\| по гайду: доказано +\| 🔴 Предстоит +\| есть +\|", status)
    assert "| есть | Unit тесты на gradient detection |" in block(document, "verdicts:monitor")


def test_missing_tests_are_pending(tmp_path: Path) -> None:
    assert theory.blocks([], [], tmp_path)["status"].count("🔴 **Предстоит**") == len(theory.SECTIONS)


def test_the_note_says_what_n_counts(document: Path, make_record: Any) -> None:
    write_campaign(document.parent / "results", make_record, "laptop")
    run(document)
    assert "n — число сидов; у точных величин — запусков, у частот и долей — попыток." in block(document)


def test_hand_edited_status_fails_the_check(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = document.read_text(encoding="utf-8")
    start, end = theory.block_span(text, "verdicts:ema")
    edited = text[start:end].replace("🔴 **Предстоит**", "✅ **Проверено: подтверждено**", 1)
    document.write_text(text[:start] + edited + text[end:], encoding="utf-8")
    capsys.readouterr()
    assert run(document, "--check") == 1
    assert capsys.readouterr().out.splitlines() == [
        "block verdicts:ema differs from results/; run python -m analysis.theory"
    ]
    assert run(document) == 0
    assert document.read_text(encoding="utf-8") == text


def test_hand_ticked_experiment_fails_the_check(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = document.read_text(encoding="utf-8")
    document.write_text(text.replace("- [ ] Memory profiling", "- [x] Memory profiling"), encoding="utf-8")
    capsys.readouterr()
    assert run(document, "--check") == 1
    assert "tick differs" in capsys.readouterr().out


def test_every_planned_experiment_names_the_command_that_ticks_it() -> None:
    entries = [line for line in TEXT.splitlines() if line.startswith("- [")]
    names = {experiment.name for experiment in load_experiments()}
    assert len(entries) == 9
    for entry in entries:
        command = re.search(r"`python -m experiments\.run (\w+)", entry)
        assert command and command[1] in names, entry


def test_new_records_make_the_document_stale(document: Path, make_record: Any) -> None:
    assert run(document, "--check") == 0
    write_campaign(document.parent / "results", make_record, "laptop")
    assert run(document, "--check") == 1
    assert run(document) == 0
    assert run(document, "--check") == 0


def test_rendering_twice_gives_the_same_bytes(document: Path, make_record: Any) -> None:
    write_campaign(document.parent / "results", make_record, "cpu")
    assert run(document) == 0
    once = document.read_bytes()
    assert run(document) == 0
    assert document.read_bytes() == once


def test_outcomes_estimate_scope_and_link_are_shown(document: Path, make_record: Any) -> None:
    write_campaign(document.parent / "results", make_record, "cpu")
    run(document)
    gain = row(document, "compute_optimal_decay(T) снижает eval loss не менее чем на 1 % (при постоянном")
    assert "✅ **Проверено: подтверждено**" in gain
    assert re.search(r"\| \+1,8\d\u00a0% \| \[\+1,\d\d\u00a0%; \+\d,\d\d\u00a0%\] \| 5 \|", gain)
    assert "smollm2-135m · moby_dick · CPU ×2 · cpu · seeds 0–4" in gain
    assert block(document).count("**Эксперимент [ema_ablation](experiments/ema_ablation.py)**") == 1
    lost = row(document, "EMA с decay = 0.999 снижает eval loss не менее чем на 1 % (при постоянном")
    assert "❌ **Проверено: опровергнуто**" in lost
    assert "осталось исходных весов: 81,9\u00a0%" in lost, "a mechanical outcome is named as such"
    assert re.search(r"EMA .*✅ \d+ · ❌ \d+", block(document, "status"))
    assert "- [x] Ablation study" in document.read_text(encoding="utf-8")


def test_rows_follow_the_order_of_declaration(document: Path, make_record: Any) -> None:
    write_campaign(document.parent / "results", make_record, "cpu")
    run(document)
    positions = [block(document).index(claim.statement) for claim in EXPERIMENT.claims]
    assert positions == sorted(positions)


def test_the_calibration_has_a_column_for_each_number_of_seeds(document: Path, make_record: Any) -> None:
    calibration = load_experiment("verdict_calibration")
    for spec in calibration.trials(calibration.scales["cpu"], "cpu"):
        lies = spec.factors == {"estimand": "ratio", "outcomes": "skewed"}
        rows = [
            {"metric": metric, "n_seeds": n, "family": family, "side": "worse", "position": "edge", "value": value}
            for n in (3, 5, 10, 20)
            for family in (1, 40)
            for metric, value in (("simulations", 1e6), ("false_verdicts", 2e5 if lies and n == 5 else 100.0))
        ]
        record = make_record(
            experiment=calibration.name, version=calibration.version, scale="cpu", seed=spec.seed,
            factors=spec.factors, settings=spec.settings, observations=rows,
            claims={claim.id: claim.digest for claim in calibration.claims},
        )  # fmt: skip
        write_record(document.parent / "results", record)
    run(document)
    table = [line for line in block(document, "verdicts:engine").splitlines() if line.startswith("| ")]
    assert table[0].split(" | ")[-4:] == ["n = 3", "n = 5", "n = 10", "n = 20 |"]
    assert len(table) == 2 + len(calibration.claims) // 4
    (lying,) = (line for line in table if "❌" in line and "| m = 1 |" in line)
    assert lying.startswith(
        "| отношение | m = 1 | ≤\u00a05\u00a0% | асимметричные исходы | ✅ 0,01\u00a0% | ❌ 20,00\u00a0% | ✅"
    )


def test_claim_edited_after_its_data_is_exploratory(document: Path, make_record: Any) -> None:
    digests = {claim.id: "edited since" for claim in EXPERIMENT.claims}
    write_campaign(document.parent / "results", make_record, "cpu", claims=digests)
    run(document)
    assert block(document).count("🔎 **Исследовательски**") == len(EXPERIMENT.claims)
    assert "Проверено:" not in block(document)
    assert f"🔎 {len(EXPERIMENT.claims)}" in block(document, "status")


def test_smoke_never_feeds(document: Path, make_record: Any) -> None:
    before = document.read_bytes()
    write_campaign(document.parent / "results", make_record, "smoke")
    assert run(document) == 0
    assert document.read_bytes() == before


def test_campaign_with_settings_of_ones_own_never_feeds_a_verdict(document: Path, make_record: Any) -> None:
    before = block(document)
    write_campaign(document.parent / "results", make_record, "cpu", model="gpt2")
    assert run(document) == 0
    assert block(document) == before
    assert "- [x] GPT-2 fine-tuning" in document.read_text(encoding="utf-8"), "yet its list entry is ticked"


@pytest.mark.parametrize("seeds", [2, 4])
def test_campaign_of_fewer_or_more_seeds_never_feeds(document: Path, make_record: Any, seeds: int) -> None:
    """Its settings, and so its campaign id, are those of the scale; its design is not."""
    before = document.read_bytes()
    assert EXPERIMENT.scales["laptop"].seeds == 3
    records = write_campaign(document.parent / "results", make_record, "laptop", seeds=seeds)
    assert records[0].spec.campaign_id == plan("laptop")[0].campaign_id
    assert run(document) == 0
    assert document.read_bytes() == before


def test_another_version_never_feeds(document: Path, make_record: Any) -> None:
    before = document.read_bytes()
    for spec in plan("cpu"):
        record = make_record(scale="cpu", version=999, seed=spec.seed, factors=spec.factors, settings=spec.settings)
        path = document.parent / "results" / "ema_ablation" / "v999" / f"{record.trial_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.model_dump_json(), encoding="utf-8")
    assert run(document) == 0
    assert document.read_bytes() == before


def test_highest_scale_that_measured_a_claim_speaks(tmp_path: Path, make_record: Any) -> None:
    for scale in ("laptop", "cpu"):
        write_campaign(tmp_path, make_record, scale)
    findings = find(EXPERIMENT, load_campaigns(tmp_path)[0])
    assert {f.evidence.campaign.scale for f in findings if f.evidence} == {"cpu"}
    write_campaign(tmp_path, make_record, "gpu", gain={"constant": 0.0, "cosine": 0.0})
    findings = find(EXPERIMENT, load_campaigns(tmp_path)[0])
    assert {f.evidence.campaign.scale for f in findings if f.evidence and planned(f.claim, plan("gpu"))} == {"gpu"}


def test_scale_that_does_not_measure_a_claim_leaves_it_to_a_lower_one(tmp_path: Path, make_record: Any) -> None:
    write_campaign(tmp_path, make_record, "laptop")
    findings = {f.claim.id: f for f in find(EXPERIMENT, load_campaigns(tmp_path)[0])}
    assert findings["ema-best-decay-grows-constant"].evidence is None, "laptop has no length track"
    assert findings["ema-extra-memory"].evidence is not None


def test_claim_is_planned_only_where_all_its_arms_are() -> None:
    shift = ArgBestShift("eval_loss", "horizon_steps", {"steps": 40}, {"steps": 10_000}, {"track": "main"})
    claim = Claim("a", "b", "ema", "c", shift, Region(low=0))
    assert not planned(claim, plan("laptop"))


def test_missing_trials_are_named_and_nothing_is_proven(document: Path, make_record: Any) -> None:
    write_campaign(document.parent / "results", make_record, "cpu", drop=1)
    run(document)
    n = len(plan("cpu"))
    assert f"🟡 **Недостаточно данных** (нет результата у 1 из {n} запусков)" in block(document)
    assert "Проверено:" not in block(document)
    assert "- [ ] Ablation study" in document.read_text(encoding="utf-8")


def test_failed_manipulation_check_proves_nothing(document: Path, make_record: Any) -> None:
    def failing(**fields: Any) -> Any:
        check = ManipulationCheck(name="averages_equal_to_raw", expected="[]", observed="[0.99]", passed=False)
        return make_record(**fields, checks=[check])

    write_campaign(document.parent / "results", failing, "laptop")
    run(document)
    assert "Проверено:" not in block(document)


@pytest.mark.parametrize("marker", ["<!-- verdicts:freezing -->", "<!-- /status -->"])
def test_missing_marker_is_named(document: Path, capsys: pytest.CaptureFixture[str], marker: str) -> None:
    document.write_text(TEXT.replace(marker, ""), encoding="utf-8")
    assert run(document) == 2
    error = capsys.readouterr().err
    assert marker in error
    assert "restore the two markers" in error


def test_repeated_marker_is_an_error() -> None:
    with pytest.raises(UserError, match="got 2 and 1"):
        theory.block_span("<!-- status --> <!-- status --> <!-- /status -->", "status")


def test_invalid_record_is_reported_and_left_alone(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = document.parent / "results" / "ema_ablation" / "v1" / "broken.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}", encoding="utf-8")
    assert run(document) == 0
    assert "broken.json: not a valid trial record" in capsys.readouterr().err


def test_imports_no_torch() -> None:
    code = (
        "import sys, analysis.theory, analysis.tables, analysis.figures, analysis.documents\n"
        "analysis.theory.load_experiments()\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=theory.ROOT)
