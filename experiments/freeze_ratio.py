"""What does freezing the lower layers save, what does it cost in quality, and is it the lower layers that matter?

Serves the sections «Layer Freezing» and «Memory Estimation» of THEORY.md (seeds 000 and 001).

Design. Factors: share of the layers frozen × {all weights, LoRA} × task × seed. Tasks: language modelling (a pretrained
decoder, loss) and sentiment (a pretrained encoder with a fresh head, accuracy). Two controls make the story causal:
the *upper* half frozen instead of the lower one (embeddings frozen in both, so that as many parameters train), and the
lower half frozen with the embeddings left trainable. Trials that measure ``quality`` train one arm each; arms of a seed
share weights, head, adapters and data order. Trials that measure ``cost`` hold all arms of a seed: the peak memory of a
real step by component beside its prediction, and step times that are taken in turn on one model. Learning rates are
those of the method and the same in every arm: nothing is tuned again for a frozen model, as nobody who follows the
guide would.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.claims import (
    ArgBestShift,
    Claim,
    Estimand,
    Exact,
    ExactRatio,
    Ratio,
    Region,
    RelativeReduction,
    Selector,
)
from experiments.harness.classification import ACCURACY, ClassificationRun
from experiments.harness.experiment import Experiment, TrialContext, UserError
from experiments.harness.freezing import (
    EMBEDDINGS_TRAINED,
    HALF,
    NONE,
    UPPER_HALF,
    arms_of,
    embeddings_frozen,
    freeze,
    frozen,
    frozen_layers,
    share_level,
)
from experiments.harness.record import (
    EVAL_LOSS,
    GRADIENT_MEMORY,
    OPTIMIZER_MEMORY,
    OTHER_LOSS,
    PEAK_MEMORY,
    PREDICTED_PEAK,
    STEP_TIME,
    TRAINABLE_PARAMS,
    ManipulationCheck,
    Measurements,
    Metric,
    Observation,
    TrialSpec,
)
from experiments.harness.tasks import collator_of, prepare

LM, SENTIMENT = "language_modelling", "classification"
METHODS = ("full", "lora")

SEED_FORMULA = Metric("seed_formula_bytes", "bytes", "none")


@dataclass(frozen=True)
class LanguageModelling(CausalLMRun):
    """Fine-tuning of a language model on one domain; another one is only looked at."""

    learning_rate: float = 1e-4
    """Peak learning rate where all weights train."""
    lora_learning_rate: float = 5e-4
    """Peak learning rate of LoRA."""
    steps: int = 40
    """Optimizer steps."""
    other_dataset: str = "state_of_the_union"
    """The domain on which forgetting is measured."""
    test_blocks: int = 48
    """Blocks of each domain in the final evaluation."""


@dataclass(frozen=True)
class Sentiment(ClassificationRun):
    """Fine-tuning of an encoder with a head of random weights."""

    learning_rate: float = 5e-5
    """Peak learning rate where all weights train."""
    lora_learning_rate: float = 5e-4
    """Peak learning rate of LoRA and of the head beside it."""
    steps: int = 150
    """Optimizer steps."""
    batch_size: int = 8
    """Examples per optimizer step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast over fp32 weights."""
    test_examples: int = 600
    """Examples of the final evaluation (at most all), the same for every seed."""


Run = LanguageModelling | Sentiment


@dataclass(frozen=True)
class Settings:
    """Options of one campaign."""

    seeds: int
    """Seeds of language modelling, the unit of replication."""
    classification_seeds: int
    """Seeds of classification, whose accuracy varies more."""
    cost_seeds: int
    """Seeds of the trials that measure memory and step time."""
    language_modelling: LanguageModelling
    """The language model."""
    classification: Sentiment
    """The classifier."""
    shares: tuple[int, ...] = (0, 25, 50, 75, 90)
    """Percent of the layers that are frozen, from the bottom; 0 is the control."""
    timed_rounds: int = 6
    """Steps of each arm that are timed, after one that is not."""

    def __post_init__(self) -> None:
        for name in ("seeds", "classification_seeds", "cost_seeds", "timed_rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not {0, 50} <= set(self.shares) or len(set(self.shares)) < len(self.shares):
            raise UserError(f"shares must differ and hold 0 and 50, got {' '.join(map(str, self.shares))}")
        if wrong := [share for share in self.shares if not 0 <= share < 100]:
            raise UserError(f"shares must be percent in [0, 100), got {wrong[0]}; with all frozen nothing trains")
        for run in (self.language_modelling, self.classification):
            for name in ("steps", "lora_learning_rate"):
                if not getattr(run, name) > 0:
                    raise UserError(f"{name} must be positive, got {getattr(run, name)}")


SCALES = {
    "smoke": Settings(
        seeds=1, classification_seeds=1, cost_seeds=1,
        language_modelling=LanguageModelling(
            model="tiny-random", random_init=True, steps=3, batch_size=2, sequence_length=32, precision="fp32",
            validation_blocks=2, test_blocks=4,
        ),
        classification=Sentiment(
            model="tiny-random-encoder", random_init=True, steps=3, batch_size=2, sequence_length=16,
            validation_examples=4, test_examples=8,
        ),
        shares=(0, 50),
        timed_rounds=2,
    ),
    "laptop": Settings(
        seeds=1, classification_seeds=3, cost_seeds=1,
        language_modelling=LanguageModelling(steps=20, test_blocks=16),
        classification=Sentiment(steps=60, test_examples=200),
        timed_rounds=3,
    ),
    "cpu": Settings(
        seeds=5, classification_seeds=8, cost_seeds=5,
        language_modelling=LanguageModelling(), classification=Sentiment(),
    ),
    "gpu": Settings(
        seeds=5, classification_seeds=10, cost_seeds=5,
        language_modelling=LanguageModelling(steps=1_000, batch_size=8, sequence_length=512, test_blocks=128),
        classification=Sentiment(steps=1_000, batch_size=16, test_examples=1_000),
        timed_rounds=30,
    ),
}  # fmt: skip

COST = {
    "smoke": "about 1 min on 2 cores, no download",
    "laptop": "about 30 min on 2 cores with --workers 2",
    "cpu": "about 2 h 10 min on 2 cores with --workers 2",
    "gpu": "planned for 1 h on one 80 GB GPU; not yet measured",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """Quality of every task × method × arm, then cost of every task × method; seed by seed."""
    seeds = {LM: settings.seeds, SENTIMENT: settings.classification_seeds}
    shared = dataclasses.asdict(settings) | {"paired_seeds": min(seeds.values())}
    for name in ("seeds", "classification_seeds", "cost_seeds"):
        del shared[name]
    quality = [
        EXPERIMENT.spec(scale, seed, {"measure": "quality", "track": task, "method": method, "frozen": arm}, shared)
        for seed in range(max(seeds.values()))
        for task in (LM, SENTIMENT)
        if seed < seeds[task]
        for method in METHODS
        for arm in arms_of(method, settings.shares)
    ]
    cost = [
        EXPERIMENT.spec(scale, seed, {"measure": "cost", "track": task, "method": method}, shared)
        for seed in range(settings.cost_seeds)
        for task in (LM, SENTIMENT)
        for method in METHODS
    ]
    return quality + cost


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Train one arm and evaluate it, or measure what a step of every arm costs."""
    began = time.monotonic()
    measurements = (_quality if spec.factors["measure"] == "quality" else _cost)(spec, context)
    rest = time.monotonic() - began - sum(measurements.seconds.values())
    measurements.seconds["overhead"] = max(0.0, rest)
    return measurements


def _run(spec: TrialSpec) -> Run:
    """The settings of a trial's task and method."""
    track, method = str(spec.factors["track"]), str(spec.factors["method"])
    kind: type[Run] = LanguageModelling if track == LM else Sentiment
    run = kind(**{**spec.settings[track], "method": method})
    return dataclasses.replace(run, learning_rate=run.lora_learning_rate) if method == "lora" else run


def _quality(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Test loss and accuracy of one arm, and of the other domain, before and after training."""
    from experiments.harness.training import train

    run, arm = _run(spec), str(spec.factors["frozen"])
    ingredients: Any = prepare(run, spec.seed)
    model = ingredients.model
    report = freeze(model, arm)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    measurements = Measurements(
        tokens=round(run.steps * run.batch_size * ingredients.train.tokens / len(ingredients.train)),
        digests=ingredients.digests,
    )
    observe: Any = _observe_lm if isinstance(run, LanguageModelling) else _observe_classes
    # The best share is compared between the tasks, so only seeds that both tasks have carry the level.
    level = share_level(model, arm) if spec.seed < spec.settings["paired_seeds"] else {}
    observe = partial(observe, measurements, run, ingredients, conditions=level)
    evaluation_sec = observe(0, "initial")
    plan = run.plan(spec.seed, run.steps, "cosine")
    outcome = train(model, ingredients.train, ingredients.validation, plan, context, collator=collator_of(ingredients))
    context.report(run.steps, run.steps, phase="test evaluation")
    evaluation_sec += observe(run.steps, "trained")
    measurements.observations.append(Observation.of(TRAINABLE_PARAMS, report.trainable_params, run.steps))
    moved = {name for name, p in model.named_parameters() if not bool((p == before[name]).all())}
    held = {name for name, p in model.named_parameters() if not p.requires_grad}
    measurements.checks = ManipulationCheck.each(
        optimizer_steps=(run.steps, outcome.trainer.state.global_step),
        frozen_layers=frozen_layers(model, arm),
        embeddings_frozen=embeddings_frozen(model, arm, str(spec.factors["method"])),
        frozen_weights_that_moved=([], sorted(held & moved)),
        something_moved=(True, bool(moved)),
    )
    measurements.seconds = {"training": outcome.training_sec, "evaluation": evaluation_sec}
    return measurements


def _observe_lm(
    into: Measurements, run: LanguageModelling, ingredients: Any, step: int, arm: str, conditions: dict[str, Any]
) -> float:
    """Test losses on the domain that is trained on and on the other one; returns the seconds that it took."""
    from experiments.harness.causal_lm import observe_domains

    return observe_domains(into, run, ingredients, run.other_dataset, step, arm, **conditions)


def _observe_classes(
    into: Measurements, run: Sentiment, ingredients: Any, step: int, arm: str, conditions: dict[str, Any]
) -> float:
    """Test accuracy, F1 and loss of the classifier; returns the seconds that it took."""
    from experiments.harness.classification import observe, outcomes_on_test

    outcomes, seconds = outcomes_on_test(run, ingredients, {arm: nullcontext})
    observe(into, outcomes[arm], step, arm, per_example=(ACCURACY,) if arm == "trained" else (), **conditions)
    return seconds


def _cost(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Memory of a real step of every arm beside its prediction, and step times taken in turn."""
    from experiments.harness.cost import MEASURED_STEP, observe_memory, observe_times, stop_between_parts

    run, arms = _run(spec), arms_of(str(spec.factors["method"]), spec.settings["shares"])
    measurements = Measurements()
    began = time.monotonic()
    for done, arm in enumerate(arms):
        stop_between_parts(context)
        context.report(done, len(arms) + 1, phase=f"memory of {arm}")
        ingredients: Any = prepare(run, spec.seed)
        report = freeze(ingredients.model, arm)
        observe_memory(measurements, run, ingredients, spec.seed, context.work_dir / arm, frozen=arm)
        total = sum(p.numel() for p in ingredients.model.parameters())
        formula = 4 * total + 12 * report.trainable_params
        measurements.observations.append(Observation.of(SEED_FORMULA, formula, MEASURED_STEP, frozen=arm))
        measurements.checks += ManipulationCheck.each(**{f"frozen_layers {arm}": frozen_layers(ingredients.model, arm)})
    stop_between_parts(context)
    context.report(len(arms), len(arms) + 1, phase="step times")
    ingredients = prepare(run, spec.seed)
    measurements.digests = ingredients.digests
    held = {arm: partial(frozen, ingredients.model, arm) for arm in arms}
    observe_times(measurements, run, ingredients, held, spec.settings["timed_rounds"], "frozen")
    measurements.seconds = {"training": time.monotonic() - began, "evaluation": 0.0}
    return measurements


_TRAINED: Selector = {"measure": "quality", "split": "test", "arm": "trained"}
_TASKS = {LM: "языковое моделирование", SENTIMENT: "классификация"}
_HOW = {"full": "все веса", "lora": "LoRA"}
_NO_LESS = Region(low=0.0)
_SAME_LOSS, _SAME_ACCURACY = Region(low=-0.01, high=0.01), Region(low=-0.02, high=0.02)
_WITHIN_1_PERCENT, _WITHIN_20_PERCENT = Region(low=0.99, high=1.01), Region(low=0.8, high=1.2)


def _claim(
    id: str, statement: str, source: str, estimand: Estimand, region: Region, condition: str, section: str = "freezing"
) -> Claim:
    return Claim(id.replace("_", "-"), statement, section, source, estimand, region, condition=condition)


def _reduction(metric: Metric, treatment: str, control: str, where: Selector) -> RelativeReduction:
    return RelativeReduction(metric.name, {"frozen": treatment}, {"frozen": control}, where)


def _quality_claims() -> Iterator[Claim]:
    for share, task, method in itertools.product((50, 75), _TASKS, METHODS):
        metric, same = (EVAL_LOSS, _SAME_LOSS) if task == LM else (ACCURACY, _SAME_ACCURACY)
        yield _claim(
            f"freeze-{share}-same-quality-{task}-{method}",
            f"Качество с {share} % замороженных слоёв такое же, как без заморозки (loss ±1 %, accuracy ±2 %)",
            "seed 000, «Quality comparison: frozen vs full fine-tuning»; seed 001, «LP-LoRA даёт хорошие результаты»",
            _reduction(metric, f"lower_{share}", NONE, {**_TRAINED, "track": task, "method": method}),
            same,
            f"{_TASKS[task]}, {_HOW[method]}",
        )
    for task, method in itertools.product(_TASKS, METHODS):
        yield _claim(
            f"freeze-lower-beats-upper-{task}-{method}",
            "Замораживать надо нижние слои: loss меньше, чем с замороженной верхней половиной",
            "seed 000, «Нижние слои уже хорошо обучены на pretrain»",
            _reduction(EVAL_LOSS, HALF, UPPER_HALF, {**_TRAINED, "track": task, "method": method}),
            _NO_LESS,
            f"{_TASKS[task]}, {_HOW[method]}",
        )
    yield _claim(
        "freeze-embeddings-do-not-matter",
        "При 50 % замороженных слоёв всё равно, обучаются ли эмбеддинги (loss ±1 %)",
        "собственное утверждение: seed 000 об эмбеддингах не говорит",
        _reduction(EVAL_LOSS, HALF, EMBEDDINGS_TRAINED, {**_TRAINED, "track": LM, "method": "full"}),
        _SAME_LOSS,
        f"{_TASKS[LM]}, {_HOW['full']}",
    )
    for method in METHODS:
        shared = {**_TRAINED, "method": method}
        yield _claim(
            f"freeze-best-share-differs-{method}",
            "Лучшая доля замороженных слоёв зависит от задачи: у классификации она больше, чем у языкового "
            "моделирования (обучаемых слоёв меньше не менее чем в 1,25 раза)",
            "seed 000, «Optimal freeze ratio для разных задач»",
            ArgBestShift(EVAL_LOSS.name, "layers_per_trained_layer", {"track": LM}, {"track": SENTIMENT}, shared),
            Region(low=math.log10(1.25)),
            _HOW[method],
        )


def _forgetting_claims() -> Iterator[Claim]:
    where: Selector = {"measure": "quality", "split": "test", "track": LM}
    for method in METHODS:
        yield _claim(
            f"finetuning-forgets-{method}",
            "Fine-tuning без заморозки забывает: loss на домене, на котором не обучали, растёт",
            "seed 000, «catastrophic forgetting» (предпосылка)",
            RelativeReduction(
                OTHER_LOSS.name, {"arm": "initial"}, {"arm": "trained"}, {**where, "method": method, "frozen": NONE}
            ),
            _NO_LESS,
            _HOW[method],
        )
    for share, method in ((50, "full"), (75, "full"), (50, "lora")):
        yield _claim(
            f"freeze-{share}-forgets-less-{method}",
            "Заморозка уменьшает забывание: loss на домене, на котором не обучали, меньше, чем без заморозки",
            "seed 000, «Заморозка предотвращает catastrophic forgetting»",
            _reduction(OTHER_LOSS, f"lower_{share}", NONE, {**_TRAINED, "track": LM, "method": method}),
            _NO_LESS,
            f"{share} %, {_HOW[method]}",
        )


def _saving_claims() -> Iterator[Claim]:
    """Exact: bytes of one real step, 50 % on both tasks, 25 and 75 % where the layers divide finely (30 of them)."""
    words = {
        GRADIENT_MEMORY: "градиентов",
        OPTIMIZER_MEMORY: "состояния оптимизатора",
        PEAK_MEMORY: "пиковой памяти шага",
    }
    cases = [(25, LM), (50, LM), (75, LM), (50, SENTIMENT)]
    for (metric, word), (share, task) in itertools.product(words.items(), cases):
        hoped = metric is PEAK_MEMORY
        saved = f"не менее {share - 5} % {word}" if hoped else f"{share} % {word} (±5 п. п.)"
        yield _claim(
            f"freeze-{share}-saves-{metric.name.removesuffix('_bytes')}-{task}",
            f"Заморозка {share} % слоёв экономит {saved}",
            "seed 000, «Теоретическая экономия памяти»" + (" (на что надеется читатель, без 5 п. п.)" if hoped else ""),
            Exact(_reduction(metric, f"lower_{share}", NONE, _cost_of(task, "full"))),
            Region(low=share / 100 - 0.05, high=math.inf if hoped else share / 100 + 0.05),
            f"{_TASKS[task]}, все веса, эмбеддинги заморожены",
        )
    yield _claim(
        "freeze-50-saves-gradient-embeddings-trained",
        "Заморозка 50 % слоёв экономит 50 % градиентов (±5 п. п.)",
        "seed 000, «Теоретическая экономия памяти»",
        Exact(_reduction(GRADIENT_MEMORY, EMBEDDINGS_TRAINED, NONE, _cost_of(LM, "full"))),
        Region(low=0.45, high=0.55),
        f"{_TASKS[LM]}, все веса, эмбеддинги обучаются",
    )
    for task, metric in itertools.product(_TASKS, (GRADIENT_MEMORY, PEAK_MEMORY)):
        hoped = metric is PEAK_MEMORY
        saved = f"не менее 45 % {words[metric]}" if hoped else f"50 % {words[metric]} (±5 п. п.)"
        yield _claim(
            f"lp-lora-50-saves-{metric.name.removesuffix('_bytes')}-{task}",
            f"LP-LoRA с 50 % замороженных слоёв экономит {saved} по сравнению с LoRA",
            "seed 000, «Результат: экономия 50% памяти на градиенты»"
            + (" (на что надеется читатель, без 5 п. п.)" if hoped else ""),
            Exact(_reduction(metric, HALF, NONE, _cost_of(task, "lora"))),
            Region(low=0.45, high=math.inf if hoped else 0.55),
            _TASKS[task],
        )


def _cost_of(task: str, method: str) -> dict[str, str]:
    return {"measure": "cost", "track": task, "method": method}


def _time_claims() -> Iterator[Claim]:
    for (slower, faster), (task, method) in itertools.product(
        ((NONE, HALF), (HALF, "lower_75")), ((LM, "full"), (LM, "lora"), (SENTIMENT, "full"))
    ):
        percent = [arm.removeprefix("lower_") for arm in (faster, slower)]
        yield _claim(
            f"freeze-{percent[0]}-faster-than-{percent[1]}-{task}-{method}",
            "Чем больше слоёв заморожено, тем быстрее шаг",
            "собственное утверждение: seed 000 о времени не говорит",
            Ratio(STEP_TIME.name, {"frozen": faster}, {"frozen": slower}, _cost_of(task, method)),
            Region(high=1.0),
            f"{percent[0]} % против {percent[1]} %, {_TASKS[task]}, {_HOW[method]}",
        )


def _memory_claims() -> Iterator[Claim]:
    rivals = (
        (
            SEED_FORMULA,
            _WITHIN_20_PERCENT,
            "seed-formula-near-peak",
            "Формула «параметры + градиенты + 2 × градиенты (Adam)» даёт пиковую память шага с точностью 20 %",
            "seed 000, «Memory Estimation»",
        ),
        (
            PREDICTED_PEAK,
            _WITHIN_1_PERCENT,
            "profile-near-peak",
            "profile_training_memory предсказывает пиковую память шага с точностью 1 %",
            "собственное утверждение: forge.memory.profile_training_memory",
        ),
    )
    for (metric, region, id, statement, source), task, method, arm in itertools.product(
        rivals, _TASKS, METHODS, (NONE, HALF)
    ):
        yield _claim(
            f"{id}-{task}-{method}-{arm}",
            statement,
            source,
            ExactRatio(metric.name, PEAK_MEMORY.name, {**_cost_of(task, method), "frozen": arm}),
            region,
            f"{_TASKS[task]}, {_HOW[method]}, заморожено {arm.removeprefix('lower_')} %",
            section="memory",
        )


CLAIMS = (*_quality_claims(), *_forgetting_claims(), *_saving_claims(), *_time_claims(), *_memory_claims())

EXPERIMENT = Experiment(
    name="freeze_ratio",
    version=1,
    question="What does freezing lower layers save, and what does it cost in quality?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
