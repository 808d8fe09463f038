"""Verdict blocks of THEORY.md, rendered from committed evidence: ``python -m analysis.theory [--check]``.

Serves every section of THEORY.md. People write its prose; what lies between the markers, and every tick in a list of
experiments, is written here, so that only evidence can move an entry from «Предстоит» to «Проверено».
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from analysis.arms import mechanics
from analysis.costs import cost_markdown
from analysis.evidence import Evidence, Finding, find, selectors
from analysis.formatting import (
    NOTHING,
    RUSSIAN,
    format_count,
    format_estimate,
    format_interval,
    format_region,
    format_span,
    markdown_table,
)
from analysis.load import Campaign, load_campaigns
from analysis.methods_table import methods_markdown
from analysis.statistics import MAX_SEEDS
from analysis.ticks import render_ticks
from analysis.verdicts import Verdict
from experiments.harness.claims import Claim, Proportion, Rate, is_exact
from experiments.harness.experiment import Experiment, UserError, load_experiments, unknown

ROOT = Path(__file__).resolve().parent.parent

PENDING = "🔴 **Предстоит**"
EXPLORATORY = "🔎 **Исследовательски**"
OUTCOMES = {
    "confirmed": ("✅", "✅ **Проверено: подтверждено**", "подтверждено"),
    "refuted": ("❌", "❌ **Проверено: опровергнуто**", "опровергнуто"),
    "insufficient": ("🟡", "🟡 **Недостаточно данных**", "недостаточно данных"),
}
HEADER = ("Статус", "Утверждение", "Условие", "Верно, если", "Оценка", "Интервал", "n", "Область")
AS_ABOVE = "″"
CALIBRATION = "verdict_calibration"
CALIBRATION_NOTE = (
    "В каждой клетке — утверждение «ложный вердикт — не чаще обещанного», его вывод (знаки те же, что в «Общем "
    "статусе») и частота ложных вердиктов при n сидах; интервалы — в таблице эксперимента."
)
PRESENT = "есть"
"""Of tests: that there are some. Whether they pass is not known here."""
NOTE = (
    "Интервалы одновременные: 95 % на все утверждения эксперимента вместе, у средних по сидам 97,5 % (запас на отличие "
    "исходов от нормальных); у точных величин — размах по запускам. "
    "n — число сидов; у точных величин — запусков, у частот и долей — попыток. «Хватило бы» — о плане новой версии "
    "эксперимента: к готовой кампании сиды не добавляют."
)


@dataclass(frozen=True)
class Section:
    """What a section of THEORY.md says where there is no evidence, and its row of the overall status."""

    module: str
    theory: str
    """What the theory rests on, in the words of the guide or by its sources; it is not checked here."""
    pending: str
    """What is still to be measured."""
    tests: str
    """The tests of its module, relative to the repository."""
    tested: str = ""
    """What the tests are about in the practice of the section, if the guide names them there."""


SECTIONS = {
    "ema": Section("EMA", "по гайду: доказано", "Собственные benchmarks на LLM fine-tuning", "tests/forge/test_ema.py"),
    "freezing": Section(
        "Layer Freezing", "по гайду: обосновано", "Benchmarks memory usage и quality", "tests/forge/test_freezing.py"
    ),
    "presets": Section(
        "Training Presets",
        "по гайду: best practices",
        "Сравнение presets на стандартных бенчмарках",
        "tests/forge/test_presets.py",
    ),
    "lecture": Section(
        "Adapters (лекция)", "статьи", "Утверждения лекции об адаптерах", "tests/forge/adapters/test_houlsby.py"
    ),
    "classic": Section(
        "Classic fine-tuning",
        "по гайду: практика",
        "Утверждения о классическом fine-tuning",
        "tests/forge/test_presets.py",
    ),
    "quantization": Section(
        "Quantization",
        "Dettmers et al. 2023",
        "Ошибка весов, активаций и качества по форматам",
        "tests/experiments/test_quantization.py",
    ),
    "monitor": Section(
        "Training Monitor",
        "по гайду: стандартные метрики",
        "Real-world monitoring во время обучения",
        "tests/forge/test_monitor.py",
        tested="Unit тесты на gradient detection",
    ),
    "memory": Section(
        "Memory Estimation", "арифметика", "Предсказание рядом с измеренным пиком", "tests/forge/test_memory.py"
    ),
    "engine": Section(
        "Verdict engine", "—", "Частота ложных выводов там, где правда известна", "tests/analysis/test_verdicts.py"
    ),
}


def render(text: str, experiments: Sequence[Experiment], campaigns: Sequence[Campaign], root: Path = ROOT) -> str:
    """THEORY.md with its blocks and ticks as the evidence has them.

    Args:
        text: THEORY.md as it stands.
        experiments: all experiments, with today's claims.
        campaigns: all campaigns, those that are no evidence included.
        root: the repository, where the tests of a module are looked for.

    Raises:
        UserError: if a marker is missing or repeated, or a claim names a section that does not exist.
    """
    for name, body in blocks(experiments, campaigns, root).items():
        start, end = block_span(text, name)
        text = f"{text[:start]}\n{body}\n{text[end:]}"
    return render_ticks(text, experiments, campaigns)


def blocks(experiments: Sequence[Experiment], campaigns: Sequence[Campaign], root: Path) -> dict[str, str]:
    """The text of each block by the name of its marker."""
    findings = [f for e in experiments for f in find(e, [c for c in campaigns if c.experiment == e.name])]
    for finding in findings:
        if finding.claim.section not in SECTIONS:
            where = f"claim {finding.claim.id} of {finding.experiment.name}: "
            raise UserError(where + unknown("section", finding.claim.section, SECTIONS))
    by_section = {name: [f for f in findings if f.claim.section == name] for name in SECTIONS}
    bodies = {f"verdicts:{name}": _section(SECTIONS[name], found, root) for name, found in by_section.items()}
    return {**bodies, "status": _status(by_section, root)}


def block_span(text: str, name: str) -> tuple[int, int]:
    """Where the body of a block begins and ends.

    Raises:
        UserError: unless the opening and the closing marker are there once each, in this order.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    counts = text.count(opening), text.count(closing)
    start, end = text.find(opening) + len(opening), text.find(closing)
    if counts != (1, 1) or end < start:
        raise UserError(
            f"THEORY.md needs one {opening} followed by one {closing}, got {counts[0]} and {counts[1]}; "
            "restore the two markers in the «Практика» that they belong to"
        )
    return start, end


def differences(text: str, rendered: str) -> list[str]:
    """One line per block, or ticked line outside the blocks, that differs from what would be rendered."""
    lines = []
    for name in [*(f"verdicts:{section}" for section in SECTIONS), "status"]:
        (start, end), (new_start, new_end) = block_span(text, name), block_span(rendered, name)
        if text[start:end] != rendered[new_start:new_end]:
            lines.append(f"block {name} differs from results/; run python -m analysis.theory")
    written = set(rendered.splitlines())
    ticks = [line.strip() for line in text.splitlines() if line.lstrip().startswith("- [") and line not in written]
    return lines + [f"tick differs from results/; run python -m analysis.theory: {line}" for line in ticks]


def _section(section: Section, findings: Sequence[Finding], root: Path) -> str:
    if findings and any(finding.evidence for finding in findings):
        by_experiment = [list(group) for _, group in groupby(findings, key=lambda f: f.experiment.name)]
        return "\n\n".join([*map(_experiment, by_experiment), NOTE])
    rows = [[PENDING, section.pending]]
    if section.tested:
        rows.insert(0, [_tests(section, root), section.tested])
    rows += [[PENDING, f"{_statement(f.claim)} ({_link(f.experiment)})"] for f in findings]
    return markdown_table(["Статус", "Описание"], rows, [False, False], padded=False)


def _experiment(findings: Sequence[Finding]) -> str:
    """The claims that one experiment tests, under its name; a sentence is written once, above all its conditions."""
    experiment = findings[0].experiment
    table = _calibration(findings) if experiment.name == CALIBRATION else _verdicts(findings)
    parts = [f"**Эксперимент {_link(experiment)}**", table, *_tables(findings), _sources(findings)]
    return "\n\n".join(part for part in parts if part)


def _verdicts(findings: Sequence[Finding]) -> str:
    """A row for each claim."""
    right = [name in ("Верно, если", "Оценка", "Интервал", "n") for name in HEADER]
    rows = [
        _row(finding, AS_ABOVE if index else _sentence(finding.claim))
        for _, conditions in groupby(findings, key=lambda finding: _sentence(finding.claim))
        for index, finding in enumerate(conditions)
    ]
    return markdown_table(HEADER, rows, right, padded=False)


def _calibration(findings: Sequence[Finding]) -> str:
    """Its hundreds of claims differ in four things alone: a row for three of them, a column for the number of seeds."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for finding in findings:
        claim, evidence = finding.claim, finding.evidence
        estimand, (family, outcomes, n) = claim.statement.rpartition(": ")[2], claim.condition.split(", ")
        rate = NOTHING if evidence is None else format_estimate(claim.estimand, evidence.verdict.estimate, RUSSIAN)
        row = estimand, family, format_region(claim.estimand, claim.region, RUSSIAN), outcomes
        rows.setdefault(row, {})[n] = f"{_sign(finding)} {rate}"
    seeds = list(dict.fromkeys(n for cells in rows.values() for n in cells))
    header = ["Величина", "Утверждений", "Обещано", "Исходы", *seeds]
    lines = [[*row, *(cells[n] for n in seeds)] for row, cells in rows.items()]
    return f"{CALIBRATION_NOTE}\n\n{markdown_table(header, lines, [False] * 4 + [True] * len(seeds), padded=False)}"


def _tables(findings: Sequence[Finding]) -> list[str]:
    """In the section on memory, prediction beside measurement; in that on the classic guide, its table of methods."""
    campaigns = {f.evidence.campaign.campaign_id: f.evidence.campaign for f in findings if f.evidence}
    section = findings[0].claim.section
    if section == "memory":
        return [cost_markdown(campaign, "ru", RUSSIAN) for campaign in campaigns.values()]
    return [methods_markdown(c, RUSSIAN) for c in campaigns.values()] if section == "classic" else []


def _sentence(claim: Claim) -> str:
    return f"{claim.statement} *({claim.source})*"


def _row(finding: Finding, statement: str) -> list[str]:
    claim, evidence = finding.claim, finding.evidence
    condition, true_if = claim.condition or NOTHING, format_region(claim.estimand, claim.region, RUSSIAN)
    if evidence is None:
        return [PENDING, statement, condition, true_if, *[NOTHING] * 4]
    verdict = evidence.verdict
    return [
        _outcome(verdict),
        statement + _mechanics(evidence),
        condition,
        true_if,
        format_estimate(claim.estimand, verdict.estimate, RUSSIAN),
        format_interval(claim.estimand, verdict.interval, RUSSIAN),
        NOTHING if verdict.n is None else str(verdict.n),
        evidence.verdict.scope,
    ]


def _outcome(verdict: Verdict) -> str:
    _, label, word = OUTCOMES[verdict.outcome]
    need = f" ({_need(verdict)})" if verdict.outcome == "insufficient" else ""
    return label + need if verdict.registered else f"{EXPLORATORY}: {word}{need}"


def _need(verdict: Verdict) -> str:
    """What would decide: the trials that are missing, or more seeds."""
    if missing := verdict.n_planned - verdict.n_ok:
        return f"нет результата у {missing} из {verdict.n_planned} запусков"
    if verdict.interval is None:
        return "оценить нельзя, причина — в таблице"
    estimand = verdict.claim.estimand
    if verdict.seeds_needed is not None:
        return f"хватило бы {'запусков' if isinstance(estimand, Rate) else 'сидов'}: ≈{verdict.seeds_needed}"
    if is_exact(estimand):
        return "размах пересекает границу"
    if isinstance(estimand, Proportion):
        return "интервал пересекает границу"
    return f"не хватило бы и {MAX_SEEDS} сидов"


def _mechanics(evidence: Evidence) -> str:
    """The averaging horizon and the share of initial weights of the arm under test, where they were recorded."""
    estimand = evidence.verdict.claim.estimand
    factors = {name for record in evidence.campaign.records for name in record.spec.factors}
    found = mechanics(evidence.campaign, {**estimand.where, **selectors(estimand)[0]})
    if selectors(estimand)[0].keys() <= factors or "initial_weight_share" not in found:
        return ""
    horizon = format_count(found["horizon_steps"], RUSSIAN)
    share = format_span(found["initial_weight_share"], RUSSIAN)
    return f" — горизонт усреднения, шагов: {horizon}; осталось исходных весов: {share}"


def _sources(findings: Iterable[Finding]) -> str:
    """One line per campaign that speaks in the block."""
    speaking = {f.evidence.campaign.campaign_id: f.evidence.campaign for f in findings if f.evidence}
    lines = [
        f"- Кампания `{c.campaign_id}`: {c.scope}; успешны {len(c.ok_records)} из {c.n_planned} запусков; "
        f"[все варианты](results/tables/{c.experiment}.md)."
        for c in speaking.values()
    ]
    return "\n".join(lines)


def _statement(claim: Claim) -> str:
    return f"{claim.statement} — {claim.condition}" if claim.condition else claim.statement


def _link(experiment: Experiment) -> str:
    return f"[{experiment.name}](experiments/{experiment.name}.py)"


def _status(by_section: Mapping[str, Sequence[Finding]], root: Path) -> str:
    rows = [
        [section.module, section.theory, _practice(by_section[name]), _tests(section, root)]
        for name, section in SECTIONS.items()
    ]
    return markdown_table(["Модуль", "Теория", "Практика", "Тесты"], rows, [False] * 4)


def _practice(findings: Sequence[Finding]) -> str:
    """Counts of the outcomes in a section; «Предстоит» where there is no evidence."""
    counts = Counter(_sign(finding) for finding in findings)
    if set(counts) <= {"🔴"}:
        return "🔴 Предстоит"
    return " · ".join(f"{sign} {counts[sign]}" for sign in ("✅", "❌", "🟡", "🔎", "🔴") if counts[sign])


def _sign(finding: Finding) -> str:
    if finding.evidence is None:
        return "🔴"
    verdict = finding.evidence.verdict
    return OUTCOMES[verdict.outcome][0] if verdict.registered else "🔎"


def _tests(section: Section, root: Path) -> str:
    """Whether there are tests; nothing but a run of them says whether they pass."""
    return PRESENT if (root / section.tests).exists() else PENDING


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 where THEORY.md agrees with the evidence (or was written), 1 where ``--check`` finds that not."""
    parser = argparse.ArgumentParser(prog="python -m analysis.theory", description="Verdict blocks of THEORY.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a block or a tick differs")
    parser.add_argument("--theory", type=Path, default=ROOT / "THEORY.md", help="the document")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    options = parser.parse_args(argv)
    text = options.theory.read_text(encoding="utf-8")
    campaigns, problems = load_campaigns(options.results)
    for problem in problems:
        print(problem, file=sys.stderr)
    try:
        rendered = render(text, load_experiments(), campaigns)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        lines = differences(text, rendered)
        print("\n".join(lines) or f"{options.theory.name} agrees with {options.results}")
        return 1 if lines else 0
    options.theory.write_text(rendered, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
