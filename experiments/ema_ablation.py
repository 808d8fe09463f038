"""Does an exponential moving average of the weights lower held-out loss, and which decay does it best?

Serves the section «EMA» of THEORY.md (seeds 000, 001 and 003).

Design. All arms of a trial (raw weights, each decay, ``compute_optimal_decay``) lie on one training trajectory, so a
trial costs one training and its arms share initial weights, data order and dropout masks. Factors: learning-rate
schedule × seed; the schedule is a factor because an average of weights and a decay of the learning rate may do the
same work. Two tracks: ``main`` fine-tunes a pretrained model; ``length`` trains at several run lengths (a tiny model
where only a CPU is at hand) to ask whether the best decay grows with the length of the run.

Beside the decays, the whole curve of loss against averaging length: averages of power-function profile, put together
after the run from the snapshots of two (arms ``posthoc_…``, with the length ``sigma_rel`` as a share of the run). The
arm ``posthoc_chosen`` is the length that validation chose; ``posthoc_nearby`` the worst, on test, of those within a
factor of 2 of it. The error of putting together and the cost of the curve are outcomes with claims of their own, not
conditions on which a trial is thrown away.

A bad last batch: after the final evaluation of a fine-tuning run at a constant learning rate, one more optimizer step
on a batch of random tokens, and what it costs raw and averaged weights; everything else is measured as if it had not
been. Under cosine the last learning rate is 0, so that the last batch can do nothing at all, bad or good.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from experiments.harness.averaging import CHOSEN_LENGTH, SMOKE_CURVE, AveragingCurve, observe_choice
from experiments.harness.causal_lm import CausalLMRun, losses_on_test, observe, prepare
from experiments.harness.claims import (
    ArgBestShift,
    Claim,
    Difference,
    Estimand,
    ExactRatio,
    Ratio,
    Region,
    Regret,
    RelativeReduction,
)
from experiments.harness.experiment import Experiment, TrialContext, UserError
from experiments.harness.late_losses import LOG_SPREAD, late_steps, observe_late_losses
from experiments.harness.record import EVAL_LOSS, ManipulationCheck, Measurements, Metric, Observation, TrialSpec
from experiments.harness.training_run import unprefixed

if TYPE_CHECKING:
    from torch import nn

    from experiments.harness.evaluation import HeldOutLoss
    from experiments.harness.training import TrainingOutcome, TrainingPlan
    from forge.ema import EMAModel

Schedule = Literal["constant", "cosine"]

EMA_BYTES = Metric("ema_extra_bytes", "bytes", "minimize")
PARAMETER_BYTES = Metric("averaged_param_bytes", "bytes", "none")


@dataclass(frozen=True)
class Track(CausalLMRun):
    """One kind of training run; under lora and qlora the EMA averages the adapters."""

    steps: tuple[int, ...] = (200,)
    """Run lengths in optimizer steps."""
    decays: tuple[float, ...] = (0.99, 0.999, 0.9999)
    """EMA decays, followed beside compute_optimal_decay(steps)."""
    late_evaluations: int = 10
    """Evaluations on the validation split, evenly spread over the second half of the run; of fewer than 4 no spread of
    the losses is taken."""
    curve: AveragingCurve = field(default_factory=AveragingCurve)
    """The curve of loss against averaging length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for decay in self.decays:
            if not 0 < decay < 1:
                raise UserError(f"decay must be in (0, 1), got {decay}")
        if len(set(self.decays)) < len(self.decays):
            raise UserError(f"decays must differ, got {' '.join(map(str, self.decays))}")
        if self.late_evaluations < 1:
            raise UserError(f"late_evaluations must be at least 1, got {self.late_evaluations}")
        if not self.steps or min(self.steps) < 2 or len(set(self.steps)) < len(self.steps):
            raise UserError(f"steps must be different numbers of at least 2, got {self.steps}")
        self.curve.check_steps(min(self.steps))


@dataclass(frozen=True)
class Settings:
    """Options of one campaign; a scale is a set of defaults."""

    seeds: int
    """Number of seeds (0, 1, …), the unit of replication; at least 5 give useful intervals."""
    main: Annotated[Track, unprefixed()]
    """The fine-tuning run."""
    length: Track | None = None
    """Runs of several lengths for the claim that the best decay grows with the length."""
    length_seeds: int | None = None
    """Number of seeds of the runs of several lengths, where they are cheap; as ``seeds`` unless set."""
    schedules: tuple[Schedule, ...] = ("constant", "cosine")
    """Learning-rate schedules, each after the warm-up."""

    def __post_init__(self) -> None:
        for name, seeds in (("seeds", self.seeds), ("length_seeds", self.length_seeds)):
            if seeds is not None and seeds < 1:
                raise UserError(f"{name} must be at least 1, got {seeds}")
        if not self.schedules or len(set(self.schedules)) < len(self.schedules):
            raise UserError(f"schedules must be different ones, got {self.schedules}")


_TINY_LENGTH = Track(
    model="tiny-random",
    random_init=True,
    steps=(1_000, 10_000),
    batch_size=4,
    sequence_length=64,
    learning_rate=1e-3,
    precision="fp32",
    decays=(0.9, 0.97, 0.99, 0.997, 0.999, 0.9997, 0.9999),
    validation_blocks=64,
    test_blocks=256,
)

SCALES = {
    "smoke": Settings(
        seeds=2,
        main=Track(
            model="tiny-random", random_init=True, steps=(12,), batch_size=2, sequence_length=32,
            learning_rate=1e-3, precision="fp32", validation_blocks=4, test_blocks=8, curve=SMOKE_CURVE,
        ),
        length=dataclasses.replace(_TINY_LENGTH, steps=(4, 8), validation_blocks=4, test_blocks=8, curve=SMOKE_CURVE),
    ),
    "laptop": Settings(seeds=3, main=Track(steps=(40,), validation_blocks=6, test_blocks=24)),
    "cpu": Settings(seeds=5, main=Track(steps=(200,)), length=_TINY_LENGTH, length_seeds=12),
    "gpu": Settings(
        seeds=3,
        main=Track(steps=(10_000,), validation_blocks=64, test_blocks=230),
        length=Track(steps=(1_000, 10_000), decays=_TINY_LENGTH.decays, validation_blocks=64, test_blocks=230),
    ),
    "paper": Settings(
        seeds=5,
        main=Track(
            model="mistralai/Mistral-7B-v0.1", method="qlora", steps=(10_000,), sequence_length=1_024,
            learning_rate=2e-4, validation_blocks=64, test_blocks=512,
        ),
        length=_TINY_LENGTH,
    ),
}  # fmt: skip

COST = {
    "smoke": "under 1 min on 2 cores, no download",
    "laptop": "planned for 20 min on 2 cores; not yet measured",
    "cpu": "about 4.4 core-h (--workers 2 on 2 cores: 2 h 15 min)",
    "gpu": "planned for 30 min on one 80 GB GPU with --workers 3; not yet measured",
    "paper": "days on one 80 GB GPU; not yet measured",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """Track × run length × schedule × seed; seed by seed, so that an early stop leaves whole pairs."""
    shared = dataclasses.asdict(settings)
    for name in ("seeds", "length_seeds", "schedules"):
        del shared[name]
    seeds_of_length = settings.seeds if settings.length_seeds is None else settings.length_seeds
    tracks = {"main": (settings.main, settings.seeds), "length": (settings.length, seeds_of_length)}
    return [
        EXPERIMENT.spec(
            scale,
            seed,
            {"track": name, "schedule": schedule, "steps": steps},
            {**shared, "model": settings.main.model, "dataset": settings.main.dataset},
        )
        for seed in range(max(settings.seeds, seeds_of_length))
        for name, (track, seeds) in tracks.items()
        if track is not None and seed < seeds
        for steps in track.steps
        for schedule in settings.schedules
    ]


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Train once with all averages along the trajectory; evaluate every arm on the test split, then the curve."""
    from experiments.harness.bad_batch import observe_bad_batch
    from experiments.harness.memory import memory_by_component
    from experiments.harness.posthoc import CurveCallback, copy_of_weights, with_evaluation_batch
    from experiments.harness.training import train
    from forge.ema import EMACallback, compute_optimal_decay, decay_label

    began = time.monotonic()
    track, steps = _track(spec), _steps(spec)
    ingredients = prepare(track, spec.seed)
    model, initial = ingredients.model, copy_of_weights(ingredients.model)
    arms = {f"ema_{decay:g}": decay for decay in track.decays} | {"ema_optimal": compute_optimal_decay(steps)}
    ema = EMACallback(decay=tuple({decay_label(decay): decay for decay in arms.values()}.values()))
    curve = CurveCallback(track.curve, steps, context.work_dir, relative_to_start=False)

    tested = with_evaluation_batch(track)
    losses, before_sec = losses_on_test(tested, ingredients, {"initial": nullcontext})
    outcome = train(model, ingredients.train, ingredients.validation, _plan(spec, track), context, [curve, ema])
    context.report(steps, steps, phase="test evaluation")
    averaged = {arm: partial(ema.use_ema, decay) for arm, decay in arms.items()}
    final, after_sec = losses_on_test(tested, ingredients, {"raw": nullcontext, **averaged})
    losses |= final

    measurements = Measurements(
        checks=[*_checks(spec, track, model, ema.ema, outcome, losses), *curve.checks(model, steps)],
        tokens=steps * track.batch_size * track.sequence_length,
        memory_bytes={**memory_by_component(model, outcome.trainer.optimizer), "ema": ema.ema.extra_bytes},
        digests=ingredients.digests,
    )
    _observe(measurements, steps, arms, losses, outcome)
    _observe_memory(measurements, steps, model)
    curve.observe_error(measurements, steps, model, initial, ema, arms["ema_optimal"])
    training_sec, evaluation_sec = outcome.training_sec, before_sec + outcome.evaluation_sec + after_sec
    del initial
    if (spec.factors["track"], spec.factors["schedule"]) == ("main", "constant") and not measurements.diverged:
        # It needs the optimizer and the averages, so it comes before the curve, and nothing later reads either of them.
        evaluation_sec += observe_bad_batch(
            measurements, tested, ingredients, outcome.trainer, ema, arms["ema_optimal"], losses
        )
    del outcome, ema, averaged  # the averages of the curve take the room of these and of the optimizer
    gc.collect()
    observe_choice(measurements, curve.observe(measurements, track, ingredients, steps), steps)
    curve.observe_seconds(measurements, steps)
    measurements.seconds = {"training": training_sec, "evaluation": evaluation_sec + curve.evaluation_sec}
    measurements.seconds["overhead"] = max(0.0, time.monotonic() - began - sum(measurements.seconds.values()))
    return measurements


def _track(spec: TrialSpec) -> Track:
    settings: dict[str, Any] = spec.settings[str(spec.factors["track"])]
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return Track(**{**lists, "curve": AveragingCurve.of(settings["curve"])})


def _steps(spec: TrialSpec) -> int:
    return int(str(spec.factors["steps"]))


def _plan(spec: TrialSpec, track: Track) -> TrainingPlan:
    steps = _steps(spec)
    return track.plan(
        spec.seed,
        steps,
        str(spec.factors["schedule"]),
        evaluate_at=late_steps(steps, track.late_evaluations),
        checkpoint_every=steps // 4 if steps >= 1_000 else None,
    )


def _observe(
    into: Measurements,
    steps: int,
    arms: dict[str, float],
    losses: dict[str, HeldOutLoss],
    outcome: TrainingOutcome,
) -> None:
    """Test loss of every arm, by document too, and the validation losses of the late evaluations."""
    from forge.ema import decay_label

    conditions = {arm: _arm_conditions(arm, arms.get(arm), steps) for arm in losses}
    for arm, held_out in losses.items():
        observe(into, held_out, EVAL_LOSS, 0 if arm == "initial" else steps, **conditions[arm])
    keys = {"raw": "eval_loss"} | {arm: f"eval_ema_{decay_label(decay)}_loss" for arm, decay in arms.items()}
    observe_late_losses(into, outcome.evaluations, keys, conditions, steps)


def _arm_conditions(arm: str, decay: float | None, steps: int) -> dict[str, Any]:
    """Decay, averaging horizon 1/(1−β) and share of the initial weights β^T; raw weights have a horizon of one step."""
    from forge.ema import averaging_horizon, initial_weight_share

    if arm == "raw":
        return {"arm": arm, "horizon_steps": 1.0}
    if decay is None:
        return {"arm": arm}
    return {
        "arm": arm,
        "decay": decay,
        "horizon_steps": averaging_horizon(decay),
        "initial_weight_share": initial_weight_share(decay, steps),
    }


def _observe_memory(into: Measurements, steps: int, model: nn.Module) -> None:
    """Bytes of the averaged parameters as they are stored, and bytes that the allocator gives out for one average."""
    from experiments.harness.memory import allocated_bytes
    from forge.ema import EMAModel

    averaged = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    into.observations.append(Observation.of(PARAMETER_BYTES, averaged, steps))
    _, extra = allocated_bytes(lambda: EMAModel(model))
    into.observations.append(Observation.of(EMA_BYTES, extra, steps))


def _checks(
    spec: TrialSpec,
    track: Track,
    model: nn.Module,
    ema: EMAModel,
    outcome: TrainingOutcome,
    losses: dict[str, HeldOutLoss],
) -> list[ManipulationCheck]:
    """Every treatment took effect: steps, schedule, what is trainable, averages that differ from the raw weights."""
    parameters = dict(model.named_parameters())
    trainable = {name for name, p in parameters.items() if p.requires_grad}
    expected = {n for n in parameters if track.method == "full" or "lora_" in n}
    last_lr = outcome.trainer.lr_scheduler.get_last_lr()[0]
    expected_lr = 0.0 if spec.factors["schedule"] == "cosine" else track.learning_rate
    same = [d for d in ema.decays if all(bool((parameters[n] == t).all()) for n, t in ema.averages(d).items())]
    pairs = {
        "optimizer_steps": (spec.factors["steps"], outcome.trainer.state.global_step),
        "ema_updates": (spec.factors["steps"], ema.step),
        "wrongly_trainable_or_frozen": (0, len(expected ^ trainable)),
        "final_learning_rate": (f"{expected_lr:.3e}", f"{last_lr:.3e}"),
        "averages_equal_to_raw": ([], same),
        "training_moved_the_model": (True, losses["raw"].loss != losses["initial"].loss),
    }
    if track.method == "qlora":
        quantised = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
        pairs["quantised_modules_present"] = (True, quantised > 0)
    return ManipulationCheck.each(**pairs)


_LOSS, _RAW, _OPTIMAL = EVAL_LOSS.name, {"arm": "raw"}, {"arm": "ema_optimal"}
_GUIDE = tuple({"arm": f"ema_{decay}"} for decay in ("0.99", "0.999", "0.9999"))
_GAIN, _NO_WORSE, _AT_MOST_HALF = Region(low=0.01), Region(high=0.0), Region(high=0.005)
_CHOSEN, _TENTH = {"arm": "posthoc_chosen"}, Region(high=0.1)


def _claim(schedule: Schedule, id: str, statement: str, source: str, estimand: Estimand, region: Region) -> Claim:
    word = {"constant": "при постоянном learning rate", "cosine": "при cosine-расписании"}[schedule]
    return Claim(f"{id}-{schedule}", f"{statement} ({word})", "ema", source, estimand, region)


def _fine_tuning_claims(schedule: Schedule) -> list[Claim]:
    claim = partial(_claim, schedule)
    main, late = ({"track": "main", "schedule": schedule, "split": split} for split in ("test", "validation"))
    return [
        claim(
            "ema-0.999-lowers-loss",
            "EMA с decay = 0.999 снижает eval loss не менее чем на 1 %",
            "seed 003, «Типичное улучшение: +1–3 %»; seed 000, «Ожидаемое улучшение»",
            RelativeReduction(_LOSS, {"arm": "ema_0.999"}, _RAW, main),
            _GAIN,
        ),
        claim(
            "ema-optimal-lowers-loss",
            "EMA с compute_optimal_decay(T) снижает eval loss не менее чем на 1 %",
            "seed 003, «Типичное улучшение: +1–3 %», «Автоматический расчёт»",
            RelativeReduction(_LOSS, _OPTIMAL, _RAW, main),
            _GAIN,
        ),
        claim(
            "ema-optimal-near-best",
            "compute_optimal_decay(T) проигрывает лучшему из 0.99, 0.999, 0.9999 не более 0,5 %",
            "seed 003, «Автоматический расчёт»",
            Regret(_LOSS, _OPTIMAL, _GUIDE, main),
            _AT_MOST_HALF,
        ),
        claim(
            "ema-reduces-spread",
            "EMA с compute_optimal_decay(T) уменьшает разброс eval loss между поздними чекпоинтами",
            "seed 003, «Почему EMA работает?»; seed 000, «EMA усредняет эти колебания»",
            Difference(LOG_SPREAD.name, _OPTIMAL, _RAW, late),
            _NO_WORSE,
        ),
    ]


def _length_claims(schedule: Schedule) -> list[Claim]:
    claim = partial(_claim, schedule)
    length = {"track": "length", "schedule": schedule, "split": "test"}
    claims = [
        claim(
            "ema-best-decay-grows",
            "Чем длиннее обучение, тем ближе лучший decay к 1 (1 000 → 10 000 шагов)",
            "seed 003, «Выбор decay», «Правило»",
            ArgBestShift(_LOSS, "horizon_steps", {"steps": 1_000}, {"steps": 10_000}, length),
            Region(low=0.0),
        ),
        claim(
            "ema-reduces-spread-long",
            "EMA с compute_optimal_decay(T) уменьшает разброс eval loss между поздними чекпоинтами, 10 000 шагов",
            "seed 003, «Почему EMA работает?»; seed 000, «EMA усредняет эти колебания»",
            Difference(LOG_SPREAD.name, _OPTIMAL, _RAW, {**length, "split": "validation", "steps": 10_000}),
            _NO_WORSE,
        ),
    ]
    grid = tuple({"arm": f"ema_{decay:g}"} for decay in _TINY_LENGTH.decays)
    for steps, best in ((1_000, {"arm": "ema_0.99"}), (10_000, {"arm": "ema_0.999"})):
        decay, words = best["arm"].removeprefix("ema_"), f"{steps:_}".replace("_", " ")
        at = {**length, "steps": steps}
        claims += [
            claim(
                f"ema-{decay}-best-at-{steps}",
                f"При ~{words} шагов из 0.99, 0.999, 0.9999 лучший decay — {decay}",
                "seed 003, «Выбор decay», таблица",
                Regret(_LOSS, best, tuple(arm for arm in _GUIDE if arm != best), at),
                _NO_WORSE,
            ),
            claim(
                f"ema-optimal-near-best-at-{steps}",
                f"При {words} шагов compute_optimal_decay(T) проигрывает лучшему decay сетки не более 0,5 %",
                "seed 003, «Автоматический расчёт»",
                Regret(_LOSS, _OPTIMAL, grid, at),
                _AT_MOST_HALF,
            ),
        ]
    return claims


def _curve_claims(schedule: Schedule) -> list[Claim]:
    """What the whole curve says; the thresholds are those of the sentences above, and 10 % that the design promises."""
    claim = partial(_claim, schedule)
    main, longest = {"track": "main", "schedule": schedule}, {"track": "length", "schedule": schedule, "steps": 10_000}
    inside = [{"steps": steps, "inside": True} for steps in (10_000, 1_000)]
    claims = [
        claim(
            "ema-chosen-length-lowers-loss",
            "EMA с длиной, выбранной на validation из всей кривой, снижает eval loss не менее чем на 1 %",
            "seed 003, «Типичное улучшение: +1–3 %»",
            RelativeReduction(_LOSS, _CHOSEN, _RAW, {**main, "split": "test"}),
            _GAIN,
        ),
        claim(
            "ema-best-length-is-a-share-of-the-run",
            "Лучшая длина усреднения — одна и та же доля обучения (1 000 и 10 000 шагов: различие менее чем вдвое)",
            "seed 003, «Автоматический расчёт»: период полураспада — десятая часть обучения",
            Ratio(CHOSEN_LENGTH.name, *inside, {"track": "length", "schedule": schedule, **_CHOSEN}),
            Region(low=0.5, high=2.0),
        ),
        claim(
            "ema-posthoc-cost",
            "Вся кривая длин из одного обучения (без оценки на данных) стоит не более 10 % времени шагов",
            "собственное утверждение: arXiv:2312.02696, раздел 3.2",
            Ratio("run_part_sec", {"part": "curve"}, {"part": "steps"}, main),
            _TENTH,
        ),
    ]
    for name, words, where in (("tuning", "fine-tuning", main), ("long", "10 000 шагов", longest)):
        claims += [
            claim(
                f"ema-length-optimum-is-wide-{name}",
                f"Любая длина в пределах вдвое от выбранной теряет не более 0,5 %, {words}",
                "собственное утверждение: длину усреднения не нужно подбирать точно",
                RelativeReduction(_LOSS, {"arm": "posthoc_nearby"}, _CHOSEN, {**where, "split": "test"}),
                Region(low=-0.005),
            ),
            claim(
                f"ema-posthoc-error-{name}",
                f"Среднее, составленное после обучения, от прослеженного не дальше 10 % пути от него до весов, {words}",
                "собственное утверждение: arXiv:2312.02696, раздел 3.2",
                Ratio("distance_to_followed", {"arm": "posthoc"}, _RAW, where),
                _TENTH,
            ),
        ]
    return claims


_BAD_BATCH = Claim(
    "ema-survives-a-bad-last-batch",
    "Последний batch был плохой: сырые веса теряют больше, чем EMA с compute_optimal_decay(T), "
    "не менее чем на 0,5 процентного пункта eval loss (при постоянном learning rate)",
    "ema",
    "seed 003, «Почему EMA работает?»: «Последний batch был плохой», «EMA помнит всю историю»",
    Difference("bad_batch_loss_rise", _RAW, _OPTIMAL, {"track": "main", "schedule": "constant"}),
    Region(low=0.005),
)
"""Half a percentage point is what «больше» means in ``ema_conditions`` too."""

CLAIMS = (
    *(
        claim
        for schedule in ("constant", "cosine")
        for claim in (*_fine_tuning_claims(schedule), *_length_claims(schedule), *_curve_claims(schedule))
    ),
    _BAD_BATCH,
    Claim(
        "ema-extra-memory",
        "EMA требует дополнительно столько памяти, сколько занимают усредняемые веса (одна копия, веса в fp32)",
        "ema",
        "seed 003, «Память»",
        ExactRatio(EMA_BYTES.name, PARAMETER_BYTES.name, {"track": "main"}),
        Region(low=0.99, high=1.01),
    ),
)

EXPERIMENT = Experiment(
    name="ema_ablation",
    version=2,
    question="Does averaging the weights lower held-out loss, and which decay does it best?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
