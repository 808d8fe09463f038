"""Full fine-tuning, LoRA, QLoRA and nine other methods, each tuned with the same budget: quality, memory, time.

Serves the sections «Training Presets» (seed 000), the lecture's (seed 002) and the classic guide's (seed 004) of
THEORY.md.

Design. Factors: method × task × seed. Tasks: language modelling (a pretrained decoder, loss) and sentiment (a
pretrained encoder with a fresh head, accuracy). Tuning is part of a method: a trial that measures ``quality`` runs a
study over the learning rate (one wide range for all methods of a task) and the method's own size (rank, bottleneck,
learned positions), with a number of training runs that is the same for every method, scored by the loss on validation;
then it trains once more with the chosen setting, on a seed that no study used, and reads the test split. So the trial
is the unit of replication, and its spread holds that of tuning. Model, head and data order of a seed are the same in
every method; so are schedule (cosine after 10 % warm-up), batch, number of steps and clipping: this compares methods,
not the other defaults of presets. ``sft`` and the adapters run in bf16 autocast; ``classic`` is fp32 with weight decay
0.01. QLoRA differs from LoRA in the stored weights alone. Baselines without an update are those of
``harness.baselines``. Trials that measure ``cost`` hold all methods at their middle size: peak memory of a real step by
component, and step times taken in turn.

The embedded language model comes from a 4-bit file (Q4_1): what NF4 costs there is no measure of what it costs weights
that have not been quantised before; those of the encoder have not.

Fixed quality, stated before the data of this version: validation accuracy 0.7; a validation loss 1 % below the
untrained model's.

Version 1 trained the encoder for 40 steps, after which no method was far from chance, and searched on one side of the
best common rate alone: full fine-tuning of the language model tried nothing between 5e-5, where its loss was still
falling, and 1e-3. Now the encoder sees as many examples as in ``lora_scaling``, each task has its range of rates, a
Gaussian process searches it, and all seeds are new.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.claims import (
    Claim,
    Estimand,
    Exact,
    ExactRatio,
    Ratio,
    Region,
    RelativeReduction,
    SelectedReduction,
    Selector,
)
from experiments.harness.classification import ACCURACY, CLASSIFIER_LOSS, ClassificationRun
from experiments.harness.experiment import Experiment, TrialContext, UserError, unknown
from experiments.harness.methods import METHODS
from experiments.harness.record import (
    EVAL_LOSS,
    OTHER_LOSS,
    PEAK_MEMORY,
    STEP_TIME,
    TRAINABLE_PARAMS,
    Measurements,
    Metric,
    TrialSpec,
)
from experiments.harness.training_run import hidden
from experiments.harness.tuning import BASE_PARAMS, FIRST_TUNING_SEED, RANK_BUDGET, RANK_SUM, RATE_MEAN, Space

LM, SENTIMENT = "language_modelling", "classification"
ZERO_SHOT, FEW_SHOT = "zero-shot", "few-shot"
FIRST_SEED = 5
"""Those before it are of version 1, whose outcomes were known when this one was designed."""


@dataclass(frozen=True)
class LanguageModelling(CausalLMRun):
    """Fine-tuning of a language model on one domain; another one is only looked at."""

    method: Annotated[Literal["full"], hidden()] = "full"
    """Unused: ``methods`` are presets."""
    methods: tuple[str, ...] = tuple(METHODS)
    """What is compared, beside the baselines."""
    learning_rate: float = 1e-4
    """Of the steps whose time and memory are measured; all others are tuned."""
    steps: int = 15
    """Optimizer steps of every training run."""
    tuning_runs: int = 5
    """Training runs of every study."""
    target: float = 0.01
    """The fixed quality: share by which the validation loss falls below the untrained model's."""
    validation_blocks: int = 8
    """Blocks of each evaluation on validation."""
    test_blocks: int = 24
    """Blocks of each domain in the final evaluation."""
    other_dataset: str = "state_of_the_union"
    """The domain on which forgetting is measured."""
    shots: int = 2
    """Blocks of training text in the prompt of the few-shot baseline."""
    lowest_rate: float = 3e-5
    """Lowest learning rate that is tried, by every method."""
    highest_rate: float = 1e-2
    """Highest learning rate that is tried, by every method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


@dataclass(frozen=True)
class Sentiment(ClassificationRun):
    """Fine-tuning of an encoder with a head of random weights."""

    method: Annotated[Literal["full"], hidden()] = "full"
    """Unused: ``methods`` are presets."""
    methods: tuple[str, ...] = tuple(METHODS)
    """What is compared, beside the baselines."""
    learning_rate: float = 1e-4
    """Of the steps whose time and memory are measured; all others are tuned."""
    steps: int = 96
    """Optimizer steps of every training run."""
    tuning_runs: int = 5
    """Training runs of every study."""
    target: float = 0.7
    """The fixed quality: validation accuracy."""
    batch_size: int = 8
    """Examples per optimizer step."""
    sequence_length: int = 32
    """Tokens of an example at most (the mean has 26), special tokens among them."""
    validation_examples: int = 200
    """Examples of each evaluation on validation (at most all), the same for every seed."""
    test_examples: int = 800
    """Examples of the final evaluation (at most all), the same for every seed."""
    shots: int = 16
    """Labelled examples of each class that the few-shot baseline sees."""
    lowest_rate: float = 3e-5
    """Lowest learning rate that is tried, by every method."""
    highest_rate: float = 1e-1
    """Highest learning rate that is tried, by every method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


Run = LanguageModelling | Sentiment


def _check(run: Run) -> None:
    """What both tasks require (UserError)."""
    for name, least in (("steps", 3), ("tuning_runs", 1), ("shots", 1)):
        if getattr(run, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(run, name)}")
    if not 0 < run.target < 1:
        raise UserError(f"target must be in (0, 1), got {run.target}")
    for name in run.methods:
        if name not in METHODS:
            raise UserError(unknown("method", name, METHODS))
    if not run.methods or len(set(run.methods)) < len(run.methods):
        raise UserError(f"methods must be named once each, got {' '.join(run.methods) or 'none'}")
    if run.random_init and "qlora" in run.methods:
        raise UserError("qlora quantises pretrained weights, got random ones; leave it out of --methods")


@dataclass(frozen=True)
class Settings:
    """Options of one campaign."""

    seeds: int
    """Seeds of both tasks, the unit of replication."""
    cost_seeds: int
    """Seeds of the trials that measure memory and step time."""
    language_modelling: LanguageModelling
    """The language model."""
    classification: Sentiment
    """The classifier."""
    common_rates: int = 3
    """Learning rates with which every study begins, evenly spread in logarithms."""
    timed_rounds: int = 4
    """Steps of each method that are timed."""

    def __post_init__(self) -> None:
        most = FIRST_TUNING_SEED - FIRST_SEED
        for name in ("seeds", "cost_seeds", "timed_rounds"):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} must be in [1, {most}], got {getattr(self, name)}")
        for run in (self.language_modelling, self.classification):
            Space(run.lowest_rate, run.highest_rate, self.common_rates, run.tuning_runs)


_SMOKE: dict[str, Any] = {"random_init": True, "steps": 4, "tuning_runs": 2, "batch_size": 2, "precision": "fp32"}
_SMOKE_METHODS = ("sft", "lora", "adalora", "weightlora", "houlsby", "prefix-tuning", "prompt-tuning")
"""One of each kind; QLoRA needs pretrained weights."""

SCALES = {
    "smoke": Settings(
        seeds=1, cost_seeds=1, common_rates=2, timed_rounds=1,
        language_modelling=LanguageModelling(
            model="tiny-random", sequence_length=32, validation_blocks=2, test_blocks=2,
            methods=("sft", "lora"), dataset="state_of_the_union", other_dataset="moby_dick", **_SMOKE,
        ),
        classification=Sentiment(
            model="tiny-random-encoder", sequence_length=16, train_examples=32, validation_examples=8, test_examples=8,
            methods=_SMOKE_METHODS, **_SMOKE,
        ),
    ),
    "laptop": Settings(
        seeds=2, cost_seeds=1, timed_rounds=2,
        language_modelling=LanguageModelling(methods=("sft", "lora", "qlora"), steps=10, tuning_runs=4),
        classification=Sentiment(tuning_runs=4, methods=("sft", "lora", "qlora", "houlsby", "prompt-tuning")),
    ),
    "cpu": Settings(
        seeds=8, cost_seeds=10,
        language_modelling=LanguageModelling(methods=("sft", "lora", "qlora")),
        classification=Sentiment(),
    ),
    "gpu": Settings(
        seeds=5, cost_seeds=5, common_rates=4, timed_rounds=30,
        language_modelling=LanguageModelling(
            steps=2_000, tuning_runs=8, batch_size=8, sequence_length=512, validation_blocks=64, test_blocks=128,
        ),
        classification=Sentiment(
            steps=1_000, tuning_runs=16, batch_size=16, sequence_length=64, validation_examples=512,
            test_examples=1_000,
        ),
    ),
    "paper": Settings(
        seeds=3, cost_seeds=3, timed_rounds=10,
        language_modelling=LanguageModelling(
            model="mistralai/Mistral-7B-v0.1", methods=("lora", "qlora"), steps=500, tuning_runs=6,
            sequence_length=1_024, validation_blocks=32, test_blocks=64,
        ),
        classification=Sentiment(steps=1_000, tuning_runs=8, sequence_length=64),
    ),
}  # fmt: skip

COST = {
    "smoke": "about 1 min on 2 cores, no download",
    "laptop": "planned for 15 min on 2 cores with --workers 2; not yet measured",
    "cpu": "about 4.7 core-h (--workers 2 on 2 cores: 2 h 20 min)",
    "gpu": "planned for 3 days on one 80 GB GPU; not yet measured",
    "paper": "planned for a day on one 80 GB GPU; not yet measured",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """Quality of every task × method seed by seed, the baselines first; then cost of every task."""
    shared = dataclasses.asdict(settings)
    for name in ("seeds", "cost_seeds"):
        del shared[name]
    quality = [
        EXPERIMENT.spec(scale, seed, {"measure": "quality", "track": task, "method": method}, shared)
        for seed in range(FIRST_SEED, FIRST_SEED + settings.seeds)
        for task, run in ((LM, settings.language_modelling), (SENTIMENT, settings.classification))
        for method in (ZERO_SHOT, FEW_SHOT, *run.methods)
    ]
    cost = [
        EXPERIMENT.spec(scale, seed, {"measure": "cost", "track": task}, shared)
        for seed in range(FIRST_SEED, FIRST_SEED + settings.cost_seeds)
        for task in (LM, SENTIMENT)
    ]
    return quality + cost


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Tune a method and train it once more, or look at a baseline, or measure what a step of every method costs."""
    from experiments.harness.tasks import prepare

    began = time.monotonic()
    run = _run(spec)
    ingredients: Any = prepare(run, spec.seed)
    into = Measurements(digests=ingredients.digests, seconds={"training": 0.0, "evaluation": 0.0})
    measure = _cost if spec.factors["measure"] == "cost" else _quality
    if spec.factors.get("method") in (ZERO_SHOT, FEW_SHOT):
        measure = _baseline
    measure(spec, context, run, ingredients, into)
    into.seconds["overhead"] = max(0.0, time.monotonic() - began - sum(into.seconds.values()))
    return into


def _run(spec: TrialSpec) -> Run:
    """The settings of a trial's task, with what the method's recipe changes."""
    track, method = str(spec.factors["track"]), spec.factors.get("method")
    kind: type[Run] = LanguageModelling if track == LM else Sentiment
    recipe = METHODS[str(method)].recipe if method in METHODS else {}
    return kind(**{**spec.settings[track], **recipe})


def _baseline(spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements) -> None:
    """The model as it is, and with a few examples."""
    from experiments.harness.baselines import observe_baseline

    context.report(0, 1, phase="test evaluation")
    began = time.monotonic()
    observe_baseline(into, run, ingredients, run.shots if spec.factors["method"] == FEW_SHOT else 0, spec.seed)
    into.seconds["evaluation"] = time.monotonic() - began


def _quality(spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements) -> None:
    """A study of one method, and its final run."""
    from experiments.harness.tuned import Subject, measure_tuned

    method = str(spec.factors["method"])
    common = spec.settings["common_rates"]
    space = Space(run.lowest_rate, run.highest_rate, common, run.tuning_runs, METHODS[method].sizes)
    measure_tuned(into, Subject(method, run, ingredients), space, spec.seed, context)


def _cost(spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements) -> None:
    """Memory and time of a step of every method."""
    from experiments.harness.method_cost import observe_costs

    observe_costs(into, run, ingredients, run.methods, spec.seed, spec.settings["timed_rounds"], context)


_FINAL: Selector = {"measure": "quality", "split": "test", "arm": "final"}
_TASKS = {LM: "языковое моделирование", SENTIMENT: "классификация"}
_CLASSES = _TASKS[SENTIMENT]
_LESS, _FASTER = Region(low=0.0), Region(high=1.0)
_SAME = {LM: Region(low=-0.01, high=0.01), SENTIMENT: Region(low=-0.02, high=0.02)}
_NEARLY_AS_ACCURATE, _LESS_ACCURATE = Region(high=0.02), Region(low=0.02)

Row = tuple[str, str, str, Estimand, Region, str]
"""Id, statement, source, estimand, region and condition of a claim."""


def _claims(section: str, seed: str, rows: Iterable[Row]) -> Iterator[Claim]:
    for id, statement, source, estimand, region, condition in rows:
        name = f"methods-{id.replace('_', '-')}"
        yield Claim(name, statement, section, f"seed {seed}, {source}", estimand, region, condition=condition)


def _lower(metric: Metric, treatment: str, control: str, task: str = SENTIMENT) -> RelativeReduction:
    """By which share a method's test figure is lower than another's."""
    return RelativeReduction(metric.name, {"method": treatment}, {"method": control}, {**_FINAL, "track": task})


def _cost_of(task: str, **method: str) -> Selector:
    return {"measure": "cost", "track": task, **method}


def _less_memory(less: str, more: str, task: str) -> Exact:
    return Exact(RelativeReduction(PEAK_MEMORY.name, {"method": less}, {"method": more}, _cost_of(task)))


def _faster(fast: str, slow: str, task: str) -> Ratio:
    return Ratio(STEP_TIME.name, {"method": fast}, {"method": slow}, _cost_of(task))


def _preset_rows() -> Iterator[Row]:
    tradeoff, memory = "«SFT vs LoRA vs QLoRA: quality/speed tradeoff»", "«Memory usage comparison» (порог наш)"
    for task, where in _TASKS.items():
        metric, words = (EVAL_LOSS, "loss ±1 %") if task == LM else (ACCURACY, "accuracy ±2 %")
        on_nf4 = f"{where}; веса уже были квантованы (Q4_1), цена NF4 занижена" if task == LM else where
        yield (
            f"lora-equals-sft-{task}", f"LoRA с рангом около 16 (подбор из 8, 16, 32) не хуже и не лучше SFT ({words})",
            "«r=16: баланс качество/эффективность»", _lower(metric, "lora", "sft", task), _SAME[task], where,
        )  # fmt: skip
        yield (
            f"qlora-equals-lora-{task}", f"QLoRA не хуже и не лучше LoRA ({words})",
            tradeoff, _lower(metric, "qlora", "lora", task), _SAME[task], on_nf4,
        )  # fmt: skip
        yield (
            f"lora-faster-than-sft-{task}", "Шаг LoRA быстрее шага SFT",
            tradeoff, _faster("lora", "sft", task), _FASTER, where,
        )  # fmt: skip
        yield (
            f"qlora-slower-than-lora-{task}", "Шаг QLoRA медленнее шага LoRA",
            tradeoff, _faster("lora", "qlora", task), _FASTER, where,
        )  # fmt: skip
        yield (
            f"lora-less-memory-than-sft-{task}", "Пиковая память шага LoRA не менее чем на 25 % меньше, чем у SFT",
            memory, _less_memory("lora", "sft", task), Region(low=0.25), where,
        )  # fmt: skip
        yield (
            f"qlora-less-memory-than-lora-{task}", "Пиковая память шага QLoRA не менее чем на 10 % меньше, чем у LoRA",
            memory, _less_memory("qlora", "lora", task), Region(low=0.1), where,
        )  # fmt: skip


def _lecture_rows() -> Iterator[Row]:
    adalora: Selector = {"measure": "quality", "track": SENTIMENT, "method": "adalora"}
    tuning: Selector = {"measure": "quality", "track": SENTIMENT, "arm": "tuning"}
    yield (
        "lora-behind-sft-on-harder-task", "На сложных задачах SFT лучше LoRA: loss меньше",
        "«На сложных задачах SFT лучше»", _lower(EVAL_LOSS, "sft", "lora", LM), _LESS,
        f"{_TASKS[LM]}, сложная из двух наших задач",
    )  # fmt: skip
    yield (
        "adalora-beats-lora", "AdaLoRA при том же бюджете лучше LoRA: loss меньше",
        "«оптимизировать ранги под каждый слой отдельно»", _lower(CLASSIFIER_LOSS, "adalora", "lora"), _LESS,
        f"{_CLASSES}; средний ранг и ранг LoRA подобраны из одного списка",
    )  # fmt: skip
    yield (
        "adalora-keeps-budget", "AdaLoRA сохраняет бюджет: сумма рангов равна ему",
        "«Общий бюджет параметров сохраняется»", ExactRatio(RANK_SUM.name, RANK_BUDGET.name, adalora),
        Region(low=1.0, high=1.0), _CLASSES,
    )  # fmt: skip
    yield (
        "weightlora-top-k-keeps-quality",
        "WeightLoRA с половиной адаптеров сохраняет качество LoRA: accuracy ниже не более чем на 2 %",
        "«Выбираем топ-К адаптеров по s_i»", _lower(ACCURACY, "weightlora", "lora"), _NEARLY_AS_ACCURATE, _CLASSES,
    )  # fmt: skip
    for reparametrised, direct in (("p-tuning", "prompt-tuning"), ("prefix-tuning", "p-tuning-v2")):
        yield (
            f"{reparametrised}-more-stable-than-{direct}",
            "Репараметризация делает обучение промптов устойчивее к выбору скорости: accuracy, средняя по общим "
            "скоростям (1e-4, 2e-3, 3e-2), выше",
            "«обучение векторов p_i напрямую даёт нестабильные результаты»",
            RelativeReduction(RATE_MEAN.name, {"method": direct}, {"method": reparametrised}, tuning),
            _LESS, f"{_CLASSES}, {reparametrised} против {direct}",
        )  # fmt: skip
    yield (
        "p-tuning-v2-beats-p-tuning", "P-tuning v2 лучше P-tuning: loss меньше",
        "«доработали, добавив обучаемые токены к каждому слою»", _lower(CLASSIFIER_LOSS, "p-tuning-v2", "p-tuning"),
        _LESS, _CLASSES,
    )  # fmt: skip
    yield (
        "p-tuning-v2-equals-sft", "P-tuning v2 сравним с SFT: accuracy ниже не более чем на 2 %",
        "«P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning»", _lower(ACCURACY, "p-tuning-v2", "sft"),
        _NEARLY_AS_ACCURATE, _CLASSES,
    )  # fmt: skip
    yield (
        "few-shot-equals-sft", "Few-shot в промпте сопоставим с SFT: loss больше не более чем на 1 %",
        "«сопоставимо с полным обучением SFT»", _lower(EVAL_LOSS, FEW_SHOT, "sft", LM), Region(low=-0.01), _TASKS[LM],
    )  # fmt: skip
    yield (
        "few-shot-beats-zero-shot", "Модель «учится на лету»: примеры в промпте уменьшают loss",
        "«Модель “учится на лету”, не обновляя веса»", _lower(EVAL_LOSS, FEW_SHOT, ZERO_SHOT, LM), _LESS, _TASKS[LM],
    )  # fmt: skip


def _classic_rows() -> Iterator[Row]:
    table, better = "«Отличия от других методов адаптации»", "«улучшая метрики»"
    cases = [(method, task) for task in _TASKS for method in ("lora", "qlora")] + [("lora-all-linear", SENTIMENT)]
    for method, task in cases:
        yield (
            f"{method}-trains-half-to-two-percent-{task}", "LoRA / QLoRA (r = 16) обучает 0,5–2 % параметров",
            table, ExactRatio(TRAINABLE_PARAMS.name, BASE_PARAMS.name, _cost_of(task, method=method)),
            Region(low=0.005, high=0.02), f"{method}, {_TASKS[task]}",
        )  # fmt: skip
    rivals = tuple({"method": name} for name in METHODS if name not in ("classic", "sft"))
    where: Selector = {"measure": "quality", "track": SENTIMENT, "arm": "final"}
    yield (
        "full-has-best-quality",
        "Полный fine-tuning даёт лучшее качество: у лучшего из других методов (выбран на валидации) loss меньше не "
        "более чем на 1 %",
        "«Когда требуется максимальное качество»",
        SelectedReduction(CLASSIFIER_LOSS.name, ({"method": "sft"},), rivals, where), Region(low=-0.01),
        f"{_CLASSES}, полный fine-tuning — sft: та же точность вычислений, что у других",
    )  # fmt: skip
    for method in ("lora", "prompt-tuning"):
        yield (
            f"{method}-less-accurate-than-full", f"У {method} качество ниже, чем у полного fine-tuning: accuracy не "
            "менее чем на 2 %", table, _lower(ACCURACY, method, "sft"), _LESS_ACCURATE, _CLASSES,
        )  # fmt: skip
    yield (
        "prompt-tuning-less-memory-than-lora", "Память prompt-tuning очень низкая: пик шага не больше, чем у LoRA",
        table, _less_memory("prompt-tuning", "lora", SENTIMENT), _LESS, _CLASSES,
    )  # fmt: skip
    yield (
        "prompt-tuning-faster-than-full", "Prompt-tuning: быстрая адаптация, шаг быстрее, чем у полного fine-tuning",
        table, _faster("prompt-tuning", "classic", SENTIMENT), _FASTER, _CLASSES,
    )  # fmt: skip
    yield (
        f"full-beats-zero-shot-{LM}", "Fine-tuning улучшает метрики: loss меньше, чем zero-shot",
        better, _lower(EVAL_LOSS, "sft", ZERO_SHOT, LM), _LESS, _TASKS[LM],
    )  # fmt: skip
    for baseline, words in ((ZERO_SHOT, "сходство с названием класса"), (FEW_SHOT, "16 примеров на класс")):
        yield (
            f"full-beats-{baseline}-{SENTIMENT}", f"Fine-tuning улучшает метрики: accuracy выше, чем {baseline}",
            f"{better}; «Обязательно сравнение с zero-shot и few-shot baseline»",
            _lower(ACCURACY, baseline, "classic"), _LESS, f"{_CLASSES}, {baseline}: {words}",
        )  # fmt: skip
    for method in ("sft", "lora"):
        yield (
            f"tuned-{method}-forgets", "Fine-tuning на маленьком датасете забывает: loss на чужом домене растёт",
            "«Catastrophic forgetting»", _lower(OTHER_LOSS, ZERO_SHOT, method, LM), _LESS,
            f"{method} с подобранной скоростью обучения",
        )  # fmt: skip


CLAIMS = (
    *_claims("presets", "000", _preset_rows()),
    *_claims("lecture", "002", _lecture_rows()),
    *_claims("classic", "004", _classic_rows()),
)

EXPERIMENT = Experiment(
    name="sft_vs_lora_vs_qlora",
    version=2,
    question="At an equal tuning budget, what do LoRA, QLoRA and nine other methods give up and save?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
