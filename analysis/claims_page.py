"""``docs/claims.md``: every sentence of the sources that can be checked, and what became of it.

Serves all sections of THEORY.md: ``python -m analysis.claims_page`` writes the page from the claims that the
experiments declare and from committed evidence. The list of sentences below is by hand, with the line of the source;
their verdicts are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from analysis.evidence import Finding, find
from analysis.formatting import ENGLISH, NOTHING, format_estimate, format_interval, format_region, markdown_table
from analysis.load import load_campaigns
from experiments.harness.experiment import load_experiments

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "claims.md"
OPEN = "open"

Kind = Literal["definition", "history", "advice", "tested"]


@dataclass(frozen=True)
class Sentence:
    """A sentence of a source document."""

    seed: str
    line: int
    text: str
    claims: tuple[str, ...] = ()
    """Patterns of the ids of the claims that judge it."""
    kind: Kind | None = None
    """Why it is no claim: a definition, history, advice that asserts nothing, or a property that tests decide."""


SENTENCES = (
    Sentence("000", 13, "EMA основан на работе Polyak & Juditsky (1992)", ("ema-rate-*", "ema-tenth-rate-*")),
    Sentence("000", 17, "θ_ema(t) = β × θ_ema(t-1) + (1-β) × θ(t)", kind="definition"),
    Sentence("000", 21, "Стандартный SGD сходится как O(1/√t)", ("sgd-root-rate-*",)),
    Sentence("000", 22, "SGD с Polyak averaging сходится как O(1/t)", ("polyak-rate-*",)),
    Sentence("000", 25, "SGD «прыгает» вокруг оптимума из-за шума градиентов", ("ema-gains-from-gradient-noise-*",)),
    Sentence("000", 26, "EMA усредняет эти колебания", ("ema-reduces-spread-*",)),
    Sentence("000", 27, "Меньшая дисперсия → лучшая generalization", ("ema-optimal-lowers-loss-*",)),
    Sentence("000", 32, "Variance: O(σ²/t) без EMA, O(σ²/t²) с EMA", ("variance-*",)),
    Sentence("000", 33, "Convergence: O(1/√t) без EMA, O(1/t) с EMA", ("sgd-root-rate-*", "ema-rate-*")),
    Sentence("000", 41, "SOTA-модели, использующие EMA", kind="history"),
    Sentence("000", 50, "Ожидаемое улучшение: +1–3 % на eval метриках", ("ema-*-lowers-loss-*",)),
    Sentence("000", 69, "Нижние слои содержат более общие представления", ("freeze-lower-beats-upper-*",)),
    Sentence("000", 72, "Clark et al. (2019), Kovaleva et al. (2019), Guo et al. (2023)", kind="history"),
    Sentence("000", 77, "Нижние слои уже хорошо обучены на pretrain", ("freeze-lower-beats-upper-*",)),
    Sentence(
        "000",
        78,
        "Заморозка предотвращает «catastrophic forgetting»",
        ("finetuning-forgets-*", "freeze-*-forgets-less-*"),
    ),
    Sentence("000", 79, "Меньше параметров = меньше памяти на градиенты", ("freeze-*-saves-gradient-*",)),
    Sentence("000", 84, "LP-LoRA: экономия 50 % памяти на градиенты", ("lp-lora-50-saves-*",)),
    Sentence(
        "000",
        89,
        "25 % заморозки: 25 % градиентов и optimizer",
        ("freeze-25-saves-gradient-*", "freeze-25-saves-optimizer-*"),
    ),
    Sentence(
        "000",
        90,
        "50 % заморозки: 50 % градиентов и optimizer",
        ("freeze-50-saves-gradient-*", "freeze-50-saves-optimizer-*"),
    ),
    Sentence(
        "000",
        91,
        "75 % заморозки: 75 % градиентов и optimizer",
        ("freeze-75-saves-gradient-*", "freeze-75-saves-optimizer-*"),
    ),
    Sentence("000", 102, "Memory profiling: 0 % vs 50 % vs 75 % frozen", ("freeze-*-saves-peak-memory-*",)),
    Sentence("000", 103, "Quality comparison: frozen vs full fine-tuning", ("freeze-*-same-quality-*",)),
    Sentence("000", 104, "Optimal freeze ratio для разных задач", ("freeze-best-share-differs-*",)),
    Sentence("000", 121, "Warmup: 10 % предотвращает destabilization в начале", ("lora-warmup-*",)),
    Sentence("000", 122, "Cosine schedule", ("lora-cosine-beats-*",)),
    Sentence(
        "000",
        125,
        "r=16: баланс качество/эффективность",
        ("lora-rank-16-near-best", "lora-rank-64-gains-little", "methods-lora-equals-sft-*"),
    ),
    Sentence("000", 126, "lora_alpha=32: рекомендуемый alpha=2*r", ("lora-alpha-*",)),
    Sentence("000", 127, "target_modules: q,k,v,o projections (максимальный эффект)", ("lora-attention-beats-*",)),
    Sentence("000", 130, "NF4 quantization: лучше, чем INT4, для weights", ("quant-nf4-beats-int4-*",)),
    Sentence("000", 131, "Double quantization: дополнительная экономия памяти", ("quant-double-saves-0.37-bit",)),
    Sentence("000", 132, "BF16 compute: лучшая точность, чем FP16", ("quant-bf16-beats-fp16-*",)),
    Sentence(
        "000",
        143,
        "SFT vs LoRA vs QLoRA: quality/speed tradeoff",
        ("methods-qlora-equals-lora-*", "methods-lora-faster-than-sft-*", "methods-qlora-slower-*"),
    ),
    Sentence("000", 144, "Preset defaults vs custom tuning", ("preset-*",)),
    Sentence("000", 145, "Memory usage comparison", ("methods-*lora-less-memory-than-*",)),
    Sentence(
        "000",
        155,
        "Мониторинг для раннего обнаружения проблем",
        ("monitor-detects-at-once-*", "monitor-detects-*-by-any-finding"),
    ),
    Sentence(
        "000",
        158,
        "Vanishing gradients: norm < 1e-7",
        ("monitor-detects-dead-layer", "monitor-detects-vanishing-depth", "monitor-vanishing-threshold-*"),
    ),
    Sentence(
        "000",
        159,
        "Exploding gradients: norm > 1e3",
        ("monitor-detects-high-lr", "monitor-exploding-threshold-*"),
    ),
    Sentence("000", 160, "NaN/Inf: критическая ошибка", ("monitor-detects-nan-batch", "monitor-detects-fp16-overflow")),
    Sentence("000", 163, "Parameters: 4 bytes × num_params (FP32) или 2 bytes (FP16)", ("seed-formula-near-peak-*",)),
    Sentence("000", 164, "Gradients: такой же размер, как parameters (для trainable)", ("seed-formula-near-peak-*",)),
    Sentence("000", 165, "Optimizer: 2x gradients для Adam/AdamW", ("seed-formula-near-peak-*",)),
    Sentence("000", 173, "Unit тесты на gradient detection", kind="tested"),
    Sentence("000", 174, "Real-world monitoring во время обучения", ("monitor-quiet-*",)),
    Sentence("001", 299, "Замораживайте слои: LP-LoRA даёт хорошие результаты", ("freeze-*-same-quality-*-lora",)),
    Sentence("002", 52, "Сохраняем K, V для уже сгенерированных токенов", ("mechanics-cache-same-logits",)),
    Sentence("002", 54, "Стоимость одного шага с KV-кэшем: O(kd)", ("mechanics-cache-step-linear-*",)),
    Sentence(
        "002",
        56,
        "За k шагов генерации O(k²d), асимптотика без кэша та же",
        ("mechanics-cache-total-quadratic", "mechanics-no-cache-total-quadratic"),
    ),
    Sentence("002", 56, "С KV-кэшем вычисления на каждом шаге сильно ускоряются", ("mechanics-cache-speeds-up",)),
    Sentence("002", 100, "Модель «учится на лету», не обновляя веса", ("methods-few-shot-beats-zero-shot",)),
    Sentence("002", 104, "Few-shot сопоставим с полным обучением SFT", ("methods-few-shot-equals-sft",)),
    Sentence("002", 157, "Bottleneck-адаптер: near-identity инициализация", ("mechanics-houlsby-starts-at-base",)),
    Sentence(
        "002", 171, "Обучение векторов p_i напрямую даёт нестабильные результаты", ("methods-*-more-stable-than-*",)
    ),
    Sentence("002", 179, "P-tuning v2: обучаемые токены к каждому слою", ("methods-p-tuning-v2-beats-p-tuning",)),
    Sentence("002", 183, "P-tuning v2 сравним с fine-tuning", ("methods-p-tuning-v2-equals-sft",)),
    Sentence("002", 200, "Одна из матриц A или B инициализируется нулями", ("mechanics-lora-starts-at-base",)),
    Sentence(
        "002",
        203,
        "Дообучение никак не влияет на архитектуру модели",
        ("mechanics-merge-exact-*", "mechanics-merged-as-fast-*"),
    ),
    Sentence("002", 205, "AdaLoRA: ранги под каждый слой отдельно", ("methods-adalora-beats-lora",)),
    Sentence("002", 213, "AdaLoRA: общий бюджет параметров сохраняется", ("methods-adalora-keeps-budget",)),
    Sentence("002", 241, "Double quantization: 20–30 % памяти", ("quant-double-saves-20-to-30-percent",)),
    Sentence("002", 241, "Double quantization: при почти неизменной точности", ("quant-double-keeps-*",)),
    Sentence(
        "002",
        251,
        "LoRA хорошо при достаточном r, но на сложных задачах SFT лучше",
        (
            "lora-rank-1-behind-*",
            "lora-rank-64-not-behind-sft",
            "lora-behind-on-harder-task",
            "methods-lora-behind-sft-on-harder-task",
        ),
    ),
    Sentence("002", 252, "LoRA полезна и для MLP-слоёв", ("lora-mlp-beats-attention-*", "lora-all-beats-attention-*")),
    Sentence("002", 253, "LoRA устойчива при большем LR, чем SFT", ("lora-best-rate-above-sft-*", "lora-usable-*")),
    Sentence(
        "002", 254, "При больших batch size точность немного снижается", ("lora-accuracy-falls-*", "lora-loses-more-*")
    ),
    Sentence("002", 255, "LoRA можно подключать и менять «на лету»", ("mechanics-adapter-switches-off",)),
    Sentence("002", 270, "WeightLoRA: топ-К адаптеров, остальные отключаем", ("methods-weightlora-*",)),
    Sentence(
        "002", 281, "Большой batch можно разбить на несколько микробатчей", ("mechanics-accumulation-saves-memory",)
    ),
    Sentence(
        "002",
        285,
        "g = 1/N Σ∇L_i по микробатчам",
        (
            "mechanics-accumulation-formula-*",
            "mechanics-accumulation-trainer-*",
            "mechanics-accumulation-prepared",
        ),
    ),
    Sentence(
        "002", 296, "Checkpointing: хранение части активаций и пересчёт остальных", ("mechanics-checkpointing-*",)
    ),
    Sentence("002", 302, "Не все тензоры обязаны храниться в памяти GPU", ("mechanics-offload-*-saves-memory",)),
    Sentence("002", 307, "Optimizer offload: моменты оптимизатора на CPU", ("mechanics-offload-optimizer-*",)),
    Sentence("002", 308, "Activation offload: редко, дорого", ("mechanics-offload-activations-*",)),
    Sentence("003", 9, "EMA поддерживает сглаженную версию весов модели", kind="definition"),
    Sentence("003", 15, "EMA веса обычно дают лучшее качество на eval, чем финальные", ("ema-*-lowers-loss-*",)),
    Sentence("003", 23, "Веса «прыгают» между batch'ами: EMA усредняет изменения", ("ema-reduces-spread-*",)),
    Sentence("003", 24, "Шум в градиентах: сглаживание убирает шум", ("ema-reduces-spread-*",)),
    Sentence("003", 25, "Последний batch был плохой: EMA помнит всю историю", ("ema-survives-a-bad-last-batch",)),
    Sentence("003", 27, "Типичное улучшение: +1–3 % на eval метриках", ("ema-*-lowers-loss-*",)),
    Sentence("003", 104, "~1 000 шагов: 0.99", ("ema-0.99-best-at-1000-*", "guide-decay-0.99-*")),
    Sentence("003", 105, "~10 000 шагов: 0.999", ("ema-0.999-best-at-10000-*", "guide-decay-0.999-*")),
    Sentence("003", 106, "~100 000 шагов: 0.9999", ("guide-decay-0.9999-*",)),
    Sentence(
        "003", 108, "Чем длиннее обучение, тем ближе decay к 1", ("ema-best-decay-grows-*", "best-horizon-grows-*")
    ),
    Sentence("003", 115, "compute_optimal_decay(total_steps=10000) # ~0.9993", kind="tested"),
    Sentence(
        "003",
        111,
        "Автоматический расчёт decay",
        ("ema-optimal-near-best*", "optimal-decay-at-*", "ema-best-length-is-a-share-*"),
    ),
    Sentence("003", 146, "EMA требует дополнительную память: ~размер модели", ("ema-extra-memory",)),
    Sentence("003", 156, "Когда применять EMA: после обучения, на eval", kind="advice"),
    Sentence("003", 162, "Работает с любыми моделями, LoRA/QLoRA, distributed, checkpointing", kind="tested"),
    Sentence("003", 171, "EMA помогает больше на малых датасетах", ("ema-helps-small-data-*",)),
    Sentence("003", 172, "EMA помогает больше при высоком learning rate", ("ema-helps-high-lr-*",)),
    Sentence("003", 173, "EMA помогает больше при длинном обучении", ("ema-helps-long-runs-*",)),
    Sentence("003", 174, "EMA помогает больше генеративным моделям", ("ema-helps-generative-*",)),
    Sentence("003", 180, "EMA основан на работе Polyak (1990)", kind="history"),
    Sentence("003", 187, "Используется в Stable Diffusion, DALL-E 2, Imagen", kind="history"),
    Sentence("003", 199, "3 строки кода: +1–3 % качества", ("ema-*-lowers-loss-*",)),
    Sentence("004", 14, "Full fine-tuning: максимальное качество", ("methods-full-has-best-quality",)),
    Sentence("004", 21, "Fine-tuning улучшает метрики", ("methods-full-beats-zero-shot-*",)),
    Sentence("004", 75, "learning_rate: 2e-5 – 5e-5", ("lora-sft-usual-rate-near-best",)),
    Sentence(
        "004",
        81,
        "Catastrophic forgetting на маленьком датасете",
        ("methods-tuned-*-forgets", "forgetting-on-small-data-*", "forgetting-more-on-small-data-*"),
    ),
    Sentence(
        "004",
        82,
        "Overfitting, особенно если мало данных",
        ("forgetting-overfits-on-small-data-*", "forgetting-small-data-harms-test-*"),
    ),
    Sentence(
        "004",
        83,
        "Слишком высокий LR может привести к дестабилизации",
        ("lora-sft-too-high-rate-*", "forgetting-more-at-high-rate-*"),
    ),
    Sentence("004", 89, "Обязательно сравнение с zero-shot и few-shot baseline", ("methods-full-beats-*",)),
    Sentence(
        "004",
        102,
        "LoRA / QLoRA: 0,5–2 % параметров, качество среднее",
        ("methods-*-trains-half-*", "methods-lora-less-accurate-*"),
    ),
    Sentence(
        "004",
        103,
        "Prompt-tuning: память очень низкая, качество низкое/среднее, быстрая адаптация",
        ("methods-prompt-tuning-*",),
    ),
)


def status(finding: Finding) -> str:
    """The outcome in one word; ``open`` without evidence, ``exploratory`` where the rule came after the data."""
    if finding.evidence is None:
        return OPEN
    verdict = finding.evidence.verdict
    return verdict.outcome if verdict.registered else f"exploratory ({verdict.outcome})"


def matching(sentence: Sentence, findings: Mapping[str, Finding]) -> list[str]:
    """Ids of the claims that judge a sentence, in the order of their declaration."""
    return [claim for claim in findings if any(fnmatchcase(claim, pattern) for pattern in sentence.claims)]


def page(findings: Sequence[Finding]) -> str:
    """The whole page."""
    by_id = {finding.claim.id: finding for finding in findings}
    unclaimed = [s for s in SENTENCES if not s.claims and s.kind is None]
    pending = [f for f in findings if f.evidence is None]
    judged, neither = sum(bool(s.claims) for s in SENTENCES), sum(s.kind is not None for s in SENTENCES)
    rows = [_sentence(sentence, by_id) for sentence in SENTENCES]
    return "\n\n".join(
        [
            "# Claims",
            "Written by `python -m analysis.claims_page` from the experiments and `results/`; do not edit.",
            f"{len(SENTENCES)} sentences of the sources that an experiment is about: "
            f"{judged} are judged by claims, {neither} assert nothing that an experiment could decide, "
            f"**{len(unclaimed)} without a claim yet**. "
            f"{len(findings)} claims: {len(findings) - len(pending)} have evidence, **{len(pending)} are open**.",
            "## Sentences",
            "A sentence without conditions may be true under some and false under others: all its claims count.",
            markdown_table(("source", "sentence", "judged by"), rows, [False] * 3, padded=False),
            "## Claims by experiment",
            markdown_table(
                ("claim", "section", "source", "experiment", "true if", "outcome", "estimate", "interval"),
                [_claim(finding) for finding in findings],
                [False, False, False, False, True, False, True, True],
                padded=False,
            ),
        ]
    ) + "\n"  # fmt: skip


def _sentence(sentence: Sentence, findings: Mapping[str, Finding]) -> list[str]:
    ids = matching(sentence, findings)
    outcomes = [status(findings[claim]) for claim in ids]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(sorted(outcomes)))
    judged = f"{counts}: {', '.join(f'`{p}`' for p in sentence.claims)}" if ids else sentence.kind or "**no claim yet**"
    return [f"seed {sentence.seed}, line {sentence.line}", sentence.text, judged]


def _claim(finding: Finding) -> list[str]:
    claim, evidence = finding.claim, finding.evidence
    estimate = None if evidence is None else evidence.verdict.estimate
    interval = None if evidence is None else evidence.verdict.interval
    return [
        f"`{claim.id}`",
        claim.section,
        claim.source,
        finding.experiment.name,
        format_region(claim.estimand, claim.region, ENGLISH),
        status(finding),
        NOTHING if estimate is None else format_estimate(claim.estimand, estimate, ENGLISH),
        NOTHING if interval is None else format_interval(claim.estimand, interval, ENGLISH),
    ]


def all_findings(results: Path) -> tuple[list[Finding], list[str]]:
    """Findings of all experiments, and one line for each file that is not a valid record."""
    campaigns, problems = load_campaigns(results)
    experiments = load_experiments()
    return [f for e in experiments for f in find(e, [c for c in campaigns if c.experiment == e.name])], problems


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: writes the page."""
    parser = argparse.ArgumentParser(prog="python -m analysis.claims_page", description="The list of all claims.")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    options = parser.parse_args(argv)
    findings, problems = all_findings(options.results)
    for problem in problems:
        print(problem, file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(findings), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
