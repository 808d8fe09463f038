"""Do adapters start at the base model, merge exactly, and what do accumulation, checkpointing, offload and caches cost?

Serves the section on the lecture (seed 002) in THEORY.md: what it says of adapters, of training with little memory, and
of generation.

Design. Nothing is trained to an end: every trial compares two ways to compute the same thing, or what they cost.
``start``: logits of every untrained adapter against the plain model's. ``merge``: logits with drawn LoRA adapters
beside the weights, merged, and switched off, in fp32 arithmetic whatever the storage (fp32, bf16, NF4); forward time.
``accumulation``: the gradient with which the Trainer steps, full batch against micro-batches, without dropout: by the
lecture's formula, by the Trainer alone, and on a model from ``preset.prepare``. ``checkpointing``: operations, time and
peak memory of a training step with and without. ``generation``: operations (counted without weights, so once),
time and logits of one token with and without a KV cache. ``offload``: peak memory and time, where there is a GPU; that
of parameters needs a distributed launch and is not measured here. Arms of a time take turns within a trial.

«Equal» is a relative difference (2-norm) of at most 1e-5: some hundred roundings of fp32, 1/200 of one of bf16.
«About a third» is nearer to 1/3 than to 1/4 or 1/2, and «less memory» is at least 10 % less: both our reading.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.claims import Claim, Estimand, Exact, ExactRatio, LogLogSlope, Ratio, Region, RelativeReduction
from experiments.harness.classification import ClassificationRun
from experiments.harness.experiment import Experiment, TrialContext, UserError
from experiments.harness.record import PEAK_MEMORY, STEP_TIME, Measurements, TrialSpec
from experiments.harness.tasks import prepare

LM, SENTIMENT = "language_modelling", "classification"
TACTICS = ("activations", "optimizer")


@dataclass(frozen=True)
class Settings:
    """Options of one campaign."""

    seeds: int
    """Seeds of what is timed, the unit of replication."""
    language_modelling: CausalLMRun
    """The language model."""
    classification: ClassificationRun
    """The classifier."""
    exact_seeds: int = 3
    """Seeds of what is not timed."""
    micro_batches: int = 4
    """Into how many a batch is cut by accumulation."""
    large_batch: int = 4
    """How many batches make the one whose peak memory accumulation lowers: activations have to count beside weights."""
    timed_rounds: int = 5
    """Timed steps of each arm."""
    counted_context: int = 256
    """Longest text at which operations are counted."""
    timed_contexts: tuple[int, ...] = (64, 512)
    """Lengths of the text at which a token is generated."""
    offload: tuple[str, ...] = ()
    """Tactics of offload; they save memory on a GPU alone."""

    def __post_init__(self) -> None:
        for name in ("seeds", "exact_seeds", "micro_batches", "large_batch", "timed_rounds", "counted_context"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.timed_contexts or min(self.timed_contexts) < 2:
            raise UserError(
                f"timed_contexts must be at least 2 each, got {' '.join(map(str, self.timed_contexts)) or 'none'}"
            )
        if wrong := sorted(set(self.offload) - set(TACTICS)):
            raise UserError(f"offload must be of {', '.join(TACTICS)}, got {wrong[0]}; leave it out")
        for run in (self.language_modelling, self.classification):
            if run.batch_size % self.micro_batches:
                raise UserError(
                    f"batch_size must be a multiple of micro_batches, got {run.batch_size} and {self.micro_batches}"
                )
            if run.method != "full":
                raise UserError(f"method must be full (what is measured has its own), got {run.method}; leave it out")


_LM, _SENTIMENT = partial(CausalLMRun, dataset="movie_sentiment", batch_size=8, sequence_length=64), ClassificationRun
SCALES = {
    "smoke": Settings(
        seeds=1,
        language_modelling=_LM(model="tiny-random", random_init=True, sequence_length=128, precision="fp32"),
        classification=_SENTIMENT(
            model="tiny-random-encoder", random_init=True, batch_size=8, sequence_length=32, precision="fp32",
        ),
        exact_seeds=1, timed_rounds=2, counted_context=64, timed_contexts=(8, 512), offload=("activations",),
    ),
    "laptop": Settings(seeds=3, language_modelling=_LM(), classification=_SENTIMENT(), timed_rounds=3),
    "cpu": Settings(seeds=10, language_modelling=_LM(), classification=_SENTIMENT(), timed_rounds=10),
    "gpu": Settings(
        seeds=10,
        language_modelling=_LM(sequence_length=512),
        classification=_SENTIMENT(batch_size=64),
        timed_rounds=50,
        offload=TACTICS,
    ),
}  # fmt: skip

COST = {
    "smoke": "under 1 min on 1 core, no download",
    "laptop": "planned for 17 core-min; not yet measured",
    "cpu": "about 40 min on 2 cores with --workers 2 (beside other work), 7 GB a worker",
    "gpu": "planned for 30 min on one 80 GB GPU; not yet measured",
}
# cpu, core-s a trial (language model + classifier) in version 1: start 28 + 4, accumulation 101 + 13, operations 156,
# merge 60 + 8, checkpointing 50 + 11, generation 13; five more timed rounds add 35, the large batch 30 + 5. So
# 3 × 32 + 3 × 149 + 156 + 10 × (68 + 61 + 13 + 35) ≈ 2,470.


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """What is timed has more seeds than what is not; operations are counted once."""
    shared = dataclasses.asdict(settings)
    del shared["seeds"], shared["exact_seeds"]
    both, lm = (LM, SENTIMENT), (LM,)
    plan = [
        ("start", both, settings.exact_seeds),
        ("accumulation", both, settings.exact_seeds),
        ("generation_flops", lm, 1),
        ("merge", both, settings.seeds),
        ("checkpointing", both, settings.seeds),
        ("generation", lm, settings.seeds),
        ("offload", lm if settings.offload else (), settings.seeds),
    ]
    return [
        EXPERIMENT.spec(scale, seed, {"measure": measure, "track": track}, shared)
        for measure, tracks, seeds in plan
        for seed in range(seeds)
        for track in tracks
    ]


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Measure one thing on one model."""
    import torch

    from experiments.harness import generation, mechanics, step_mechanics

    began = time.monotonic()
    measure = {
        "start": mechanics.measure_start,
        "merge": mechanics.measure_merge,
        "accumulation": step_mechanics.measure_accumulation,
        "checkpointing": step_mechanics.measure_checkpointing,
        "offload": step_mechanics.measure_offload,
        "generation_flops": generation.measure_generation_flops,
        "generation": generation.measure_generation,
    }[str(spec.factors["measure"])]
    kind: Any = CausalLMRun if spec.factors["track"] == LM else ClassificationRun
    run = kind(**spec.settings[str(spec.factors["track"])])
    ingredients: Any = prepare(run, spec.seed)
    ingredients.model.to("cuda" if torch.cuda.is_available() else "cpu")
    into = Measurements(digests=ingredients.digests)
    measure(spec, context, run, ingredients, into)
    into.seconds = {"training": time.monotonic() - began, "evaluation": 0.0, "overhead": 0.0}
    return into


_EQUAL, _SAME = Region(high=1e-5), Region(low=0.0, high=0.0)
_THIRD = ((1 / 4 + 1 / 3) / 2, (1 / 3 + 1 / 2) / 2)
_LESS_MEMORY = Region(low=0.1)
_TASKS = {LM: "языковое моделирование", SENTIMENT: "классификация"}
_ACCUMULATION = "seed 002, «Формула итогового градиента: g = 1/N Σ ∇L_i»"
_MICRO = "seed 002, «Когда GPU не помещает большой batch, можно разбить его на несколько микробатчей»"
_RECOMPUTE = "seed 002, «хранение только части активаций и пересчет их во время обратного прохода»"
_OFFLOAD = "seed 002, «Не все тензоры обязаны храниться в GPU-памяти»"
_STEP = "seed 002, «Стоимость одного шага: O(kd)»"
_TOTAL = "seed 002, «за k шагов генерации сложность O(k²d). Асимптотика та же»"


def _claim(id: str, statement: str, source: str, estimand: Estimand, region: Region, condition: str = "") -> Claim:
    return Claim(f"mechanics-{id}", statement, "lecture", source, estimand, region, condition=condition)


def _difference(measure: str, **where: Any) -> ExactRatio:
    return ExactRatio("difference_norm", "reference_norm", {"measure": measure, **where})


def _saved_memory(measure: str, treatment: str, control: str) -> Exact:
    return Exact(RelativeReduction(PEAK_MEMORY.name, {"arm": treatment}, {"arm": control}, {"measure": measure}))


def _adapter_claims() -> Iterator[Claim]:
    starts = (
        (
            "lora",
            "LoRA и её варианты начинают",
            "одна из матриц A или B инициируется нулями",
            "LoRA, AdaLoRA, WeightLoRA",
        ),
        ("houlsby", "Bottleneck-адаптер начинает", "near-identity инициализация", ""),
    )
    for group, words, source, condition in starts:
        yield _claim(
            f"{group}-starts-at-base",
            f"{words} с функции базовой модели: логиты те же (побитово)",
            f"seed 002, «{source}»",
            _difference("start", group=group),
            _SAME,
            condition,
        )
    yield _claim(
        "prompts-start-elsewhere",
        "Обучаемые промпты начинают не с функции базовой модели: логиты другие (≥ 1 %)",
        "собственное утверждение",
        _difference("start", group="prompts"),
        Region(low=0.01),
        "prefix-tuning, P-tuning, P-tuning v2, prompt tuning",
    )
    yield _claim(
        "adapter-switches-off",
        "LoRA можно отключить «на лету»: логиты снова те, что у базовой модели (побитово)",
        "seed 002, «LoRA можно подключать и менять “на лету”»",
        _difference("merge", arm="switched_off"),
        _SAME,
    )
    storage = {"fp32": "веса fp32", "bf16": "веса bf16", "nf4": "веса NF4, после слияния снова квантованные"}
    for kind, words in storage.items():
        yield _claim(
            f"merge-exact-{kind}",
            "Слияние LoRA с весами точно: логиты меняются не более чем на 1e-5",
            "seed 002, «дообучение никак не влияет на архитектуру модели»; arXiv:2106.09685 §4.1",
            _difference("merge", arm="merged", weights=kind),
            _EQUAL,
            f"{words}, счёт в fp32",
        )
    for task, words in _TASKS.items():
        where = {"measure": "merge", "track": task}
        yield _claim(
            f"merged-as-fast-{task.replace('_', '-')}",
            "После слияния модель так же быстра, как базовая (±3 %)",
            "seed 002, «дообучение никак не влияет на архитектуру модели»; arXiv:2106.09685 §4.1",
            Ratio("forward_time_sec", {"arm": "merged"}, {"arm": "base"}, where),
            Region(0.97, 1.03),
            words,
        )


def _accumulation_claims() -> Iterator[Claim]:
    same = "Градиент, накопленный по микробатчам, равен градиенту полного batch (до 1e-5)"
    cases = (
        (
            "formula-equal",
            "формула лекции, языковая модель, примеры равной длины",
            {"way": "formula", "lengths": "equal", "track": LM},
        ),
        ("formula-ragged", "формула лекции, языковая модель, примеры разной длины", {"way": "formula", "track": LM}),
        ("trainer-classifier", "только Trainer, BERT-классификатор", {"way": "trainer", "track": SENTIMENT}),
        ("prepared", "Trainer и preset.prepare, обе модели, примеры разной длины", {"way": "prepared"}),
    )
    for id, condition, where in cases:
        estimand = _difference("accumulation", **{"lengths": "ragged", **where})
        yield _claim(f"accumulation-{id}", same, _ACCUMULATION, estimand, _EQUAL, condition)
    yield _claim(
        "accumulation-saves-memory",
        "Накопление по микробатчам уменьшает пиковую память шага (не менее чем на 10 %)",
        _MICRO,
        _saved_memory("accumulation", "accumulated", "full"),
        _LESS_MEMORY,
        "обе модели, 4 микробатча, batch 32 и 64 × 64 токена",
    )


def _cost_claims() -> Iterator[Claim]:
    third = "Checkpointing добавляет около трети "
    kept, again = {"arm": "kept"}, {"arm": "checkpointed"}
    for task, words in _TASKS.items():
        id, where = task.replace("_", "-"), {"measure": "checkpointing", "track": task}
        yield _claim(
            f"checkpointing-third-compute-{id}",
            f"{third}вычислений шага (29–42 %)",
            _RECOMPUTE,
            Exact(RelativeReduction("training_step_flops", again, kept, where)),
            Region(-_THIRD[1], -_THIRD[0]),
            words,
        )
        yield _claim(
            f"checkpointing-third-time-{id}",
            f"{third}времени шага (29–42 %)",
            _RECOMPUTE,
            Ratio(STEP_TIME.name, again, kept, where),
            Region(1 + _THIRD[0], 1 + _THIRD[1]),
            words,
        )
    yield _claim(
        "checkpointing-saves-memory",
        "Checkpointing уменьшает пиковую память шага (не менее чем на 10 %)",
        _RECOMPUTE,
        _saved_memory("checkpointing", "checkpointed", "kept"),
        _LESS_MEMORY,
        "обе модели",
    )
    for tactic, words, least, quote in (
        ("activations", "активаций", 1.2, "seed 002, «Activation Offload — активации (редко, дорого)»"),
        ("optimizer", "состояния оптимизатора", 1.0, "seed 002, «Optimizer Offload — моменты оптимизатора на CPU»"),
    ):
        yield _claim(
            f"offload-{tactic}-saves-memory",
            f"Offload {words} уменьшает пиковую память GPU (не менее чем на 10 %)",
            _OFFLOAD,
            _saved_memory("offload", tactic, "none"),
            _LESS_MEMORY,
        )
        more = f"не менее чем на {least - 1:.0%}".replace("%", " %") if least > 1 else "не быстрее, чем без него"
        yield _claim(
            f"offload-{tactic}-costs-time",
            f"Offload {words} замедляет шаг ({more})",
            quote,
            Ratio(STEP_TIME.name, {"arm": tactic}, {"arm": "none"}, {"measure": "offload"}),
            Region(low=least),
        )


def _generation_claims() -> Iterator[Claim]:
    def slope(arm: str, part: str, span: str) -> Exact:
        where = {"measure": "generation_flops", "part": part, "span": span}
        return Exact(LogLogSlope("decoding_flops", {"arm": arm}, where, agree_within=0.5, min_forgetting=None))

    linear, quadratic = Region(0.9, 1.1), Region(1.9, 2.1)
    step, both = "С KV-кэшем стоимость шага растёт линейно по длине k (показатель 0,9–1,1)", "операции внимания"
    yield _claim("cache-step-linear-attention", step, _STEP, slope("cached", "attention", "one"), linear, both)
    yield _claim("cache-step-linear-whole", step, _STEP, slope("cached", "step", "one"), linear, "все операции шага")
    yield _claim(
        "cache-total-quadratic",
        "С KV-кэшем k шагов стоят O(k²) (показатель 1,9–2,1)",
        _TOTAL,
        slope("cached", "attention", "all"),
        quadratic,
        both,
    )
    yield _claim(
        "no-cache-total-quadratic",
        "Без кэша асимптотика k шагов та же, O(k²) (показатель 1,9–2,1)",
        _TOTAL,
        slope("uncached", "attention", "all"),
        quadratic,
        both,
    )
    yield _claim(
        "cache-speeds-up",
        "KV-кэш сильно ускоряет шаг генерации (не менее чем вдвое)",
        "seed 002, «вычисления на каждом шаге сильно ускоряются»",
        Ratio("decoding_time_sec", {"arm": "uncached"}, {"arm": "cached"}, {"measure": "generation", "context": 512}),
        Region(low=2.0),
        "k = 512",
    )
    yield _claim(
        "cache-same-logits",
        "KV-кэш не меняет логитов (до 1e-5)",
        "seed 002, «Сохраняем K, V»",
        _difference("generation", context=512),
        _EQUAL,
        "k = 512, fp32",
    )


CLAIMS = (*_adapter_claims(), *_accumulation_claims(), *_cost_claims(), *_generation_claims())

EXPERIMENT = Experiment(
    name="training_mechanics",
    version=2,
    question="Do adapters start at the base and merge exactly? What do accumulation, checkpointing and caches cost?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
