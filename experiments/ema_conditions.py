"""When does an average of the weights help most, and does it do more than a decay of the learning rate?

Serves the section «EMA» of THEORY.md: «Когда EMA помогает больше всего» (seed 003).

Design. A cell differs from the base cell in one thing: little data, a high learning rate, a long run, a large batch.
The gain of a cell is the relative reduction of test loss by the best of many averages against raw weights, both at
their best checkpoint, chosen on the validation split: on little data a very long average merely shrinks back towards
the start, and against raw weights at the end that looks like a gain. The averages are those of the post-hoc curve:
two are followed and stored, and at every checkpoint averages of many lengths (shares of the run so far) are put
together from them afterwards. The guides' sentences are interactions: the gain of a cell minus that of the base cell,
within seed. The gain is relative: for data size, absolute and relative gains disagree in sign. The schedule is a
factor throughout, since an average of the weights and a decay of the learning rate may do the same work; that
sentence is a claim of our own. A large batch has less gradient noise, and nothing else changes: if weights go round
an optimum because of that noise, there is less for an average to gain. Generative against other models: pretrained
SmolLM2 on text, MiniLM on sentiment. Seeds 0 to 4 are those of version 1, whose outcomes were known when the curve was
added; here all are new. Version 2 was stopped after a few trials, before anyone had looked at them: it rounded what the
curve is put together from, and fine-tuning would have drowned in that (claim ``ema-posthoc-error-tuning``).
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from experiments.harness.averaging import LENGTHS, SMOKE_CURVE, AveragingCurve
from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.claims import Claim, Interaction, Region, SelectedReduction, Selector
from experiments.harness.classification import ACCURACY, CLASSIFIER_LOSS, ClassificationRun, compute_metrics
from experiments.harness.experiment import Experiment, TrialContext, UserError
from experiments.harness.record import EVAL_LOSS, ManipulationCheck, Measurements, Metric, Observation, TrialSpec
from experiments.harness.tasks import collator_of, prepare

if TYPE_CHECKING:
    from experiments.harness.posthoc import CurveCallback
    from experiments.harness.training import TrainingOutcome

Schedule = Literal["constant", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")
CONDITIONS = ("base", "small_data", "high_lr", "long", "large_batch")
FIRST_SEED = 5
PRETRAINED_LENGTHS = LENGTHS[1::2]
"""Every other length, where an evaluation is dear."""


def _curve() -> AveragingCurve:
    return AveragingCurve(snapshots=20)


def _pretrained_curve() -> AveragingCurve:
    return AveragingCurve(PRETRAINED_LENGTHS)


@dataclass(frozen=True)
class Cells(CausalLMRun):
    """The base cell, and what each of the others changes in it."""

    steps: int = 2_000
    """Optimizer steps."""
    small_data_blocks: int = 384
    """Training blocks of the cell with little data; the others have the whole corpus."""
    high_learning_rate: float = 5e-3
    """Learning rate of the cell with a high one."""
    long_steps: int = 8_000
    """Optimizer steps of the long cell."""
    large_batch_size: int = 16
    """Blocks per optimizer step of the cell with a large batch."""
    evaluations: int = 10
    """Evaluations on validation and test, evenly spread over the run: the checkpoints to choose from."""
    curve: AveragingCurve = field(default_factory=_curve)
    """The averages to choose from at each checkpoint."""


@dataclass(frozen=True)
class Generative(CausalLMRun):
    """Fine-tuning of a pretrained language model."""

    steps: int = 1_000
    """Optimizer steps."""
    evaluations: int = 10
    """As in the other cells."""
    curve: AveragingCurve = field(default_factory=_pretrained_curve)
    """As in the other cells."""


@dataclass(frozen=True)
class Classifier(ClassificationRun):
    """Fine-tuning of a pretrained encoder."""

    steps: int = 1_000
    """Optimizer steps."""
    evaluations: int = 10
    """As in the other cells."""
    curve: AveragingCurve = field(default_factory=_pretrained_curve)
    """As in the other cells."""


@dataclass(frozen=True)
class Settings:
    """Options of one campaign."""

    seeds: int
    """Number of seeds, the unit of replication."""
    cells: Cells
    """The cells of a small model that is trained from random weights."""
    generative: Generative | None = None
    """The generative model, where it is run."""
    classifier: Classifier | None = None
    """The classifier, where it is run."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        for run in (self.cells, self.generative, self.classifier):
            if run is None:
                continue
            run.curve.check_steps(run.steps)
            most = len(run.curve.snapshot_steps(run.steps))
            if not 1 <= run.evaluations <= most:
                raise UserError(f"evaluations must be in [1, snapshots of the run = {most}], got {run.evaluations}")


_TINY = Cells(
    model="tiny-random",
    random_init=True,
    batch_size=4,
    sequence_length=64,
    learning_rate=1e-3,
    precision="fp32",
    validation_blocks=128,
    test_blocks=256,
)

SCALES = {
    "smoke": Settings(
        seeds=2,
        cells=dataclasses.replace(
            _TINY, steps=6, long_steps=9, small_data_blocks=8, large_batch_size=8, evaluations=3, validation_blocks=4,
            test_blocks=4, curve=SMOKE_CURVE,
        ),
    ),
    "laptop": Settings(
        seeds=3, cells=dataclasses.replace(_TINY, steps=600, long_steps=2_000, validation_blocks=64, test_blocks=64)
    ),
    "cpu": Settings(
        seeds=5,
        cells=_TINY,
        generative=Generative(steps=160, evaluations=3, test_blocks=32),
        classifier=Classifier(steps=160, sequence_length=32, evaluations=3, test_examples=512),
    ),
    "gpu": Settings(seeds=8, cells=_TINY, generative=Generative(test_blocks=230), classifier=Classifier()),
}  # fmt: skip

COST = {
    "smoke": "under 1 min on 2 cores, no download",
    "laptop": "planned for 12 min on 2 cores; not yet measured",
    "cpu": "about 3.1 core-h (--workers 2 on 2 cores: 1 h 35 min)",
    "gpu": "planned for 30 min on one 80 GB GPU with --workers 4; not yet measured",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """Cell × schedule × seed; seed by seed, so that an early stop leaves whole pairs."""
    shared = {key: value for key, value in dataclasses.asdict(settings).items() if key != "seeds"}
    cells = [("cells", condition) for condition in CONDITIONS]
    cells += [(name, "base") for name in ("generative", "classifier") if shared[name] is not None]
    return [
        EXPERIMENT.spec(scale, seed, {"track": track, "condition": condition, "schedule": schedule}, shared)
        for seed in range(FIRST_SEED, FIRST_SEED + settings.seeds)
        for track, condition in cells
        for schedule in SCHEDULES
    ]


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Train one cell while its curve is followed; evaluate every length at every checkpoint afterwards."""
    from experiments.harness.posthoc import CurveCallback
    from experiments.harness.training import train

    began, run = time.monotonic(), _run(spec)
    ingredients: Any = prepare(run, spec.seed)
    data = ingredients.train
    if spec.factors["condition"] == "small_data":
        assert isinstance(run, Cells)
        data = data.spread(run.small_data_blocks)
    plan = run.plan(
        spec.seed,
        run.steps,
        str(spec.factors["schedule"]),
        evaluate_at=run.curve.spread(run.evaluations, run.steps),
        checkpoint_every=run.steps // 4 if run.steps >= 1_000 else None,
    )
    held_out = {"validation": ingredients.validation, "test": ingredients.test}
    curve = CurveCallback(run.curve, run.steps, context.work_dir)
    metrics = compute_metrics if isinstance(run, Classifier) else None
    outcome = train(
        ingredients.model,
        data,
        held_out,
        plan,
        context,
        [curve],
        collator=collator_of(ingredients),
        compute_metrics=metrics,
    )
    measurements = Measurements(
        tokens=round(run.steps * run.batch_size * data.tokens / len(data)), digests=ingredients.digests
    )
    _observe_raw(measurements, outcome, CLASSIFIER_LOSS if isinstance(run, Classifier) else EVAL_LOSS)
    for step in plan.evaluate_at:
        context.report(run.steps, run.steps, phase=f"curve at step {step}")
        curve.observe(measurements, run, ingredients, step)
    curve.observe_seconds(measurements, run.steps)
    measurements.checks = _checks(spec, run, outcome, curve, measurements, len(data))
    evaluation_sec = outcome.evaluation_sec + curve.evaluation_sec
    measurements.seconds = {"training": outcome.training_sec, "evaluation": evaluation_sec}
    measurements.seconds["overhead"] = max(0.0, time.monotonic() - began - sum(measurements.seconds.values()))
    return measurements


def _run(spec: TrialSpec) -> Cells | Generative | Classifier:
    """The settings of a trial's cell."""
    kinds = {"cells": Cells, "generative": Generative, "classifier": Classifier}
    track = str(spec.factors["track"])
    settings = spec.settings[track]
    run = kinds[track](**{**settings, "curve": AveragingCurve.of(settings["curve"])})
    changed = {"high_lr": "learning_rate", "long": "steps", "large_batch": "batch_size"}
    by = {"high_lr": "high_learning_rate", "long": "long_steps", "large_batch": "large_batch_size"}
    condition = str(spec.factors["condition"])
    return dataclasses.replace(run, **{changed[condition]: settings[by[condition]]}) if condition in changed else run


def _observe_raw(into: Measurements, outcome: TrainingOutcome, metric: Metric) -> None:
    """Losses of the raw weights on both splits, at every checkpoint, and the accuracy where there is one."""
    for row in outcome.evaluations:
        step = int(row["step"])
        for split in ("validation", "test"):
            for key, of in ((f"eval_{split}_loss", metric), (f"eval_{split}_accuracy", ACCURACY)):
                if key not in row:
                    continue
                if not math.isfinite(row[key]):
                    into.diverged = f"the {split} loss of arm raw at step {step} is {row[key]}"
                    continue
                into.observations.append(Observation.of(of, row[key], step, split=split, arm="raw"))


def _checks(
    spec: TrialSpec,
    run: Cells | Generative | Classifier,
    outcome: TrainingOutcome,
    curve: CurveCallback,
    measured: Measurements,
    sequences: int,
) -> list[ManipulationCheck]:
    """Every treatment took effect: steps, batch, averages, schedule, data, and a complete set of losses."""
    state = outcome.trainer.state
    last_lr = 0.0 if spec.factors["schedule"] == "cosine" else run.learning_rate
    small = isinstance(run, Cells) and spec.factors["condition"] == "small_data"
    losses = sum(observation.metric == EVAL_LOSS.name for observation in measured.observations)
    wanted = 2 * run.evaluations * (1 + len(run.curve.sigma_rel))
    pairs: dict[str, tuple[object, object]] = {
        "optimizer_steps": (run.steps, state.global_step),
        "batch_size": (run.batch_size, outcome.trainer.args.train_batch_size),
        "final_learning_rate": (f"{last_lr:.3e}", f"{outcome.trainer.lr_scheduler.get_last_lr()[0]:.3e}"),
        "losses_recorded": (wanted, wanted if measured.diverged else losses),
        "little_data": (small, isinstance(run, Cells) and sequences <= run.small_data_blocks),
    }
    return [*ManipulationCheck.each(**pairs), *curve.checks(outcome.trainer.model, run.steps)]


_WORDS = {"constant": "постоянный learning rate", "cosine": "cosine до нуля"}
_AVERAGES: tuple[Selector, ...] = AveragingCurve().arms
_RAW: tuple[Selector, ...] = ({"arm": "raw"},)
_MORE = Region(low=0.005)
"""«Помогает больше»: by at least half a percentage point."""


def _more_claims(schedule: Schedule) -> list[Claim]:
    def claim(
        id: str,
        statement: str,
        source: str,
        first: Selector,
        second: Selector,
        lengths: tuple[Selector, ...] = _AVERAGES,
    ) -> Claim:
        gain = SelectedReduction(EVAL_LOSS.name, lengths, _RAW, {"schedule": schedule})
        estimand = Interaction(gain, first, second)
        told = f"{statement} (разность относительных выигрышей — не менее 0,5 процентного пункта)"
        return Claim(f"{id}-{schedule}", told, "ema", source, estimand, _MORE, condition=_WORDS[schedule])

    def cell(condition: str) -> Selector:
        return {"track": "cells", "condition": condition}

    base = cell("base")
    said = "seed 003, «Когда EMA помогает больше всего»"
    return [
        claim("ema-helps-small-data", "На малых данных EMA помогает больше", said, cell("small_data"), base),
        claim("ema-helps-high-lr", "При высоком learning rate EMA помогает больше", said, cell("high_lr"), base),
        claim("ema-helps-long-runs", "При длинном обучении EMA помогает больше", said, cell("long"), base),
        claim(
            "ema-helps-generative",
            "Генеративным моделям EMA помогает больше, чем классификатору",
            said,
            {"track": "generative"},
            {"track": "classifier"},
            AveragingCurve(PRETRAINED_LENGTHS).arms,
        ),
        claim(
            "ema-gains-from-gradient-noise",
            "SGD колеблется вокруг оптимума из-за шума градиентов: с вчетверо большим батчем среднее даёт меньше",
            "seed 000, «SGD прыгает вокруг оптимума из-за шума градиентов»",
            base,
            cell("large_batch"),
        ),
    ]


_INSTEAD = {"base": "базовые условия", "small_data": "мало данных", "high_lr": "высокий learning rate", "long": "долго"}


def _instead_of_decay(condition: str) -> Claim:
    """The sentence of our own: averaging under a constant rate does what a decay of the rate does."""
    averages = tuple({"schedule": "constant", **arm} for arm in _AVERAGES)
    return Claim(
        f"ema-instead-of-cosine-{condition}".replace("_", "-"),
        "EMA при постоянном learning rate не хуже, чем cosine без EMA (потеря не более 0,5 %)",
        "ema",
        "собственное утверждение: среднее весов и спад learning rate делают одну работу",
        SelectedReduction(
            EVAL_LOSS.name,
            averages,
            ({"schedule": "cosine", "arm": "raw"},),
            {"track": "cells", "condition": condition},
        ),
        Region(low=-0.005),
        condition=_INSTEAD[condition],
    )


CLAIMS = (
    *(claim for told in zip(*(_more_claims(schedule) for schedule in SCHEDULES), strict=True) for claim in told),
    *map(_instead_of_decay, _INSTEAD),
)

EXPERIMENT = Experiment(
    name="ema_conditions",
    version=3,
    question="When does averaging the weights help most, and more than a decay of the learning rate?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
