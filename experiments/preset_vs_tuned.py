"""How far are the defaults of a preset from what a sweep over its options finds, and which option matters?

Serves the section «Training Presets» of THEORY.md (seed 000, «Preset defaults vs custom tuning»).

Design. Factors: preset × task × seed. A trial takes one preset as its user would: ``get_preset``, ``prepare``,
``get_training_args``, ``Trainer``. First a TPE study with pruning (Optuna's median rule, at three looks on validation)
of a fixed number of runs searches the preset's recipe: learning rate, warm-up, schedule, weight decay, and LoRA's rank,
α, dropout and target modules. Its first run has the defaults. Epochs, batch and clipping stay the preset's own, so that
the tuned setting trains on as many examples as the defaults, and for as many steps. Then defaults and the best setting
on validation are trained once more, on a seed that no study used, with the same data order and the same random head,
and are judged on test. The *regret* of a preset is the share by which its defaults' test loss exceeds the tuned one; so
choosing among runs does not count as a gain, and a study that overfits validation has a negative regret.

A study is a part of its trial: the trial is the unit of replication, and its spread holds that of tuning. A study
resumes with the run at which it was stopped and ends as if it had not been; ``--workers N`` (and ``--storage``, over
machines) shares the studies of a campaign.

Two things follow from the design, not from the data. The 500 steps of warm-up of ``classic`` are longer than a whole
run at ``cpu`` (at ``gpu`` they are a sixth of one), so that its rate is never reached there. And importances hold for
the space that is searched: the wider the interval of the learning rate, the more it matters.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.claims import Claim, Estimand, Interaction, Ratio, Region, Regret, RelativeReduction, Selector
from experiments.harness.classification import CLASSIFIER_LOSS, ClassificationRun
from experiments.harness.experiment import Experiment, TrialContext, UserError, unknown
from experiments.harness.record import Measurements, TrialSpec
from experiments.harness.sweep import IMPORTANCE, RATE_DISTANCE, Rates
from experiments.harness.training_run import hidden
from experiments.harness.tuning import FIRST_TUNING_SEED

LM, SENTIMENT = "language_modelling", "classification"
PRESETS = ("sft", "classic", "lora", "lora-all-linear", "qlora")
"""Those whose recipe a sweep knows how to search."""
LOOKS = 3
"""Looks at validation in a run of a study."""


@dataclass(frozen=True)
class _OfThePreset:
    """What the preset decides: these fields of a run are not used."""

    method: Annotated[Literal["full"], hidden()] = "full"
    """Unused."""
    learning_rate: Annotated[float, hidden()] = 5e-5
    """Unused."""
    warmup_ratio: Annotated[float, hidden()] = 0.1
    """Unused."""
    weight_decay: Annotated[float, hidden()] = 0.0
    """Unused."""
    precision: Annotated[Literal["fp32", "bf16"], hidden()] = "bf16"
    """Unused."""


@dataclass(frozen=True)
class LanguageModelling(_OfThePreset, CausalLMRun):
    """Fine-tuning of a language model."""

    presets: tuple[str, ...] = ("sft", "lora")
    """What is tuned; none: the task is left out."""
    train_blocks: int = 1_000
    """Blocks of an epoch, evenly spread over the training text (at most all)."""
    tuning_runs: int = 12
    """Training runs of every study, the defaults and pruned ones among them."""
    batch_size: int = 8
    """Blocks at a time in evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("train_blocks")
        _check(self)


@dataclass(frozen=True)
class Sentiment(_OfThePreset, ClassificationRun):
    """Fine-tuning of an encoder with a head of random weights."""

    presets: tuple[str, ...] = ("sft", "classic", "lora", "qlora")
    """What is tuned; none: the task is left out."""
    tuning_runs: int = 12
    """Training runs of every study, the defaults and pruned ones among them."""
    batch_size: int = 8
    """Examples at a time in evaluation."""
    sequence_length: int = 32
    """Tokens of an example at most (the mean has 26); batches are padded to their longest one."""
    train_examples: int | None = 480
    """Examples of an epoch, a subset drawn by the seed; None: all. With far fewer no setting learns anything, and any
    one is as good as the best."""
    validation_examples: int = 128
    """Examples of each look (at most all), the same for every seed."""
    test_examples: int = 600
    """Examples of the final evaluation (at most all), the same for every seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


Run = LanguageModelling | Sentiment


def _check(run: Run) -> None:
    """What both tasks require (UserError)."""
    if run.tuning_runs < 3:
        raise UserError(f"tuning_runs must be at least 3 (the defaults, and two to compare), got {run.tuning_runs}")
    for name in run.presets:
        if name not in PRESETS:
            raise UserError(unknown("preset", name, PRESETS))
    if len(set(run.presets)) < len(run.presets):
        raise UserError(f"presets must be named once each, got {' '.join(run.presets)}")
    if run.random_init and "qlora" in run.presets:
        raise UserError("qlora quantises pretrained weights, got random ones; leave it out of --presets")


@dataclass(frozen=True)
class Settings:
    """Options of one campaign."""

    seeds: int
    """Seeds of both tasks, the unit of replication."""
    language_modelling: LanguageModelling
    """The language model."""
    classification: Sentiment
    """The classifier."""
    lowest_rate: float = 2e-6
    """Lowest learning rate that is searched, in every preset."""
    highest_rate: float = 3e-2
    """Highest learning rate that is searched, in every preset."""

    def __post_init__(self) -> None:
        if not 1 <= self.seeds < FIRST_TUNING_SEED:
            raise UserError(f"seeds must be at least 1 and below {FIRST_TUNING_SEED}, got {self.seeds}")
        if not 0 < self.lowest_rate < self.highest_rate:
            raise UserError(
                f"learning rates must be an interval above 0, got {self.lowest_rate} to {self.highest_rate}; "
                "lower the first or raise the second"
            )
        if not (self.language_modelling.presets or self.classification.presets):
            raise UserError("presets must be named for one task at least, got none")


_NO_LM = LanguageModelling(presets=())

SCALES = {
    "smoke": Settings(
        seeds=1,
        language_modelling=LanguageModelling(
            model="tiny-random", dataset="state_of_the_union", random_init=True, sequence_length=32, train_blocks=16,
            validation_blocks=2, test_blocks=2, tuning_runs=3,
        ),
        classification=Sentiment(
            model="tiny-random-encoder", random_init=True, presets=("sft", "lora"), sequence_length=16,
            train_examples=24, validation_examples=8, test_examples=8, tuning_runs=4,
        ),
    ),
    "laptop": Settings(
        seeds=2, language_modelling=_NO_LM,
        classification=Sentiment(presets=("sft", "lora"), tuning_runs=8),
    ),
    "cpu": Settings(seeds=5, language_modelling=_NO_LM, classification=Sentiment()),
    "gpu": Settings(
        seeds=5,
        language_modelling=LanguageModelling(
            train_blocks=2_000, sequence_length=256, validation_blocks=64, test_blocks=128, tuning_runs=24,
        ),
        classification=Sentiment(
            presets=PRESETS, train_examples=None, sequence_length=64, validation_examples=512, test_examples=1_000,
            tuning_runs=32,
        ),
    ),
    "paper": Settings(
        seeds=3,
        language_modelling=LanguageModelling(
            model="mistralai/Mistral-7B-v0.1", presets=("lora", "qlora"), train_blocks=400, sequence_length=1_024,
            validation_blocks=32, test_blocks=64, batch_size=2, tuning_runs=10,
        ),
        classification=Sentiment(train_examples=None, sequence_length=64, tuning_runs=24),
    ),
}  # fmt: skip

COST = {
    "smoke": "about 1 min on 2 cores, no download",
    "laptop": "planned for 10 min on 2 cores with --workers 2; not yet measured",
    "cpu": "about 3.4 core-h (--workers 2 on 2 cores: 1 h 45 min)",
    "gpu": "planned for 2 days on one 80 GB GPU; not yet measured",
    "paper": "planned for 2 days on one 80 GB GPU; not yet measured",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """Every task × preset, seed by seed."""
    shared = dataclasses.asdict(settings)
    del shared["seeds"]
    return [
        EXPERIMENT.spec(scale, seed, {"track": task, "preset": preset}, shared)
        for seed in range(settings.seeds)
        for task, run in ((LM, settings.language_modelling), (SENTIMENT, settings.classification))
        for preset in run.presets
    ]


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Sweep over a preset's recipe, then train its defaults and the best setting for test."""
    from experiments.harness.swept import measure_swept, space_of
    from experiments.harness.tasks import prepare
    from experiments.harness.tuned import Subject

    began = time.monotonic()
    track, preset = str(spec.factors["track"]), str(spec.factors["preset"])
    kind: type[Run] = LanguageModelling if track == LM else Sentiment
    run = kind(**spec.settings[track])
    rates = Rates(spec.settings["lowest_rate"], spec.settings["highest_rate"])
    space = space_of(preset, rates, run.tuning_runs, LOOKS)
    ingredients: Any = prepare(run, spec.seed)
    if isinstance(run, LanguageModelling):
        ingredients = dataclasses.replace(ingredients, train=ingredients.train.spread(run.train_blocks))
    into = Measurements(digests=ingredients.digests, seconds={"training": 0.0, "evaluation": 0.0})
    measure_swept(into, Subject(preset, run, ingredients), space, spec.seed, context)
    into.seconds["overhead"] = max(0.0, time.monotonic() - began - sum(into.seconds.values()))
    return into


_TASKS = {LM: "языковое моделирование", SENTIMENT: "классификация"}
_DEFAULTS: Selector = {"arm": "defaults"}
_TUNED: Selector = {"arm": "tuned"}
_SEED = "seed 000, "


def _claim(id: str, statement: str, source: str, estimand: Estimand, region: Region, condition: str) -> Claim:
    return Claim(f"preset-{id.replace('_', '-')}", statement, "presets", source, estimand, region, condition=condition)


def _gain(**where: str) -> RelativeReduction:
    """By which share tuning lowers the test loss of the defaults."""
    return RelativeReduction(CLASSIFIER_LOSS.name, _TUNED, _DEFAULTS, {"track": SENTIMENT, "split": "test", **where})


def _regret_claims() -> Iterator[Claim]:
    source = _SEED + "«Готовые конфигурации основаны на best practices» (порог 5 % наш)"
    for task, presets in ((SENTIMENT, ("sft", "classic", "lora", "qlora")), (LM, ("sft", "lora"))):
        for preset in presets:
            long = ", warm-up 500 шагов длиннее короткого обучения" if preset == "classic" else ""
            where: Selector = {"track": task, "preset": preset, "split": "test"}
            yield _claim(
                f"{preset}-defaults-near-tuned-{task}",
                "Значения preset по умолчанию близки к подобранным: их loss больше не более чем на 5 %",
                source, Regret(CLASSIFIER_LOSS.name, _DEFAULTS, (_TUNED,), where), Region(high=0.05),
                f"{preset}, {_TASKS[task]}{long}",
            )  # fmt: skip


def _tuning_claims() -> Iterator[Claim]:
    source = _SEED + "«Preset defaults vs custom tuning»"
    for preset in ("sft", "lora"):
        where = {"track": SENTIMENT, "preset": preset}
        yield _claim(
            f"{preset}-tuning-pays", "Подбор окупается: loss не менее чем на 1 % меньше, чем у preset",
            f"{source} (порог наш)", _gain(preset=preset), Region(low=0.01), f"{preset}, {_TASKS[SENTIMENT]}",
        )  # fmt: skip
        yield _claim(
            f"{preset}-rate-matters-most",
            "Скорость обучения — самая важная опция preset: её важность (PED-ANOVA) не меньше, чем у следующей",
            "собственное утверждение",
            Ratio(IMPORTANCE.name, {"option": "learning_rate"}, {"option": "learning_rate + next"}, where),
            Region(low=0.5), f"{preset}, {_TASKS[SENTIMENT]}, скорость обучения от 2e-6 до 3e-2",
        )  # fmt: skip
    yield _claim(
        "lora-tuning-pays-more-than-sft", "Подбор даёт LoRA больше, чем SFT: loss уменьшается на большую долю",
        "собственное утверждение", Interaction(_gain(), {"preset": "lora"}, {"preset": "sft"}), Region(low=0.0),
        _TASKS[SENTIMENT],
    )  # fmt: skip
    yield _claim(
        "sft-rate-is-standard", "2e-5 — стандарт для BERT-подобных моделей: подобранная скорость отличается от неё не "
        "более чем втрое, в среднем по логарифму", _SEED + "«Learning rate: 2e-5» (порог наш)",
        Ratio(RATE_DISTANCE.name, {"rate": "chosen"}, {"rate": "threefold"}, {"track": SENTIMENT, "preset": "sft"}),
        Region(high=1.0), f"sft, {_TASKS[SENTIMENT]}; оценка — |log₃| отношения скоростей",
    )  # fmt: skip


CLAIMS = (*_regret_claims(), *_tuning_claims())

EXPERIMENT = Experiment(
    name="preset_vs_tuned",
    version=1,
    question="How far are a preset's defaults from a tuned setting, and which option matters most?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
