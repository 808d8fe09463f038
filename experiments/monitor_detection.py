"""Does the gradient monitor notice what breaks a training run, and is it quiet on healthy ones?

Serves the section «Training Monitor» of THEORY.md: «Gradient Health» and «Real-world monitoring» (seed 000).

Design. Real training of a small language model through the ``Trainer``; in the middle of it one fault is injected, or
none: a learning rate a thousand times too high, a batch whose loss is NaN, a layer that dies (the weights of its
feed-forward part become 0 and stay so), gradients that overflow fp16, and, from the start, a deep network without
residual connections, whose gradients vanish. ``MonitorCallback`` watches with the thresholds of the guide (norm of a
parameter's gradient below 1e-7, above 1e3, NaN, Inf) and only warns. A run is the unit.

Detected means that a finding on the gradients that fits the fault is reported from the first step on whose gradient
can show it (``Fault.visible_from``); an alarm on the steps before, or in a healthy run, is false. Both are counted a
second time with every kind of finding, spikes of the loss included.

Separation: by how much does a norm tell the first steps of a lasting fault from the healthy ones before, the global
norm or the norm of the layer that deviates most? Score of a step: |log10 of the norm − its median over the ``window``
steps before|, as a monitor could compute it during training. The area under the ROC curve is of the first window / 2
steps of the fault (so that the median is one of healthy steps) against the last window before it: near in time, since
norms drift without any fault. A learning rate × 1000 would leave the global norm nothing to be surpassed in. The factor
of the milder one was chosen by the area of the *global* norm alone: its means over seeds 1000–1003 were 0.40 without a
fault, 0.66 at × 30, 0.82 at × 50, 0.95 at × 100, and 0.61 with a dead layer; × 50 leaves room on both sides.

Thresholds: a threshold should keep its distance from both sides. In a run with a learning rate × 1000, 1e3 is compared
with the largest norm of a parameter's gradient on the healthy steps, on the steps after, and with their geometric
middle. 1e-7 is compared with the smallest norm in the healthy run of a seed and in its network without residual
connections. Norms of exactly 0 lie below every threshold, and Inf above: they say nothing of its place and are left
out, as is the dead layer, whose gradients are 0.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.claims import Claim, Difference, Rate, Region
from experiments.harness.experiment import Experiment, TrialContext, UserError
from experiments.harness.record import ManipulationCheck, Measurements, Metric, Observation, TrialSpec

if TYPE_CHECKING:
    from forge.monitor import GradientReport, MonitorRecord

DETECTED = Metric("detected", "1", "maximize")
DETECTED_BY_ANY = Metric("detected_by_any_finding", "1", "maximize")
AT_ONCE = Metric("detected_at_once", "1", "maximize")
FALSE_ALARM = Metric("false_alarm", "1", "minimize")
ANY_FALSE_ALARM = Metric("any_false_alarm", "1", "minimize")
"""Spikes of the loss included."""
DELAY = Metric("detection_delay_steps", "steps", "minimize")
SEPARATION = Metric("separation_auc", "1", "maximize")
EXTREME_NORM = Metric("log10_extreme_norm", "decades", "none")
"""Of a parameter's gradient: the largest beside the threshold for exploding, the smallest beside that for vanishing."""

FITTING = {
    "high_lr": ("exploding", "nan", "inf"),
    "raised_lr": ("exploding", "nan", "inf"),
    "nan_batch": ("nan",),
    "dead_layer": ("vanishing",),
    "fp16_overflow": ("inf", "nan"),
    "vanishing_depth": ("vanishing",),
}
"""Fault → kinds of finding on the gradients that fit it."""
SEPARATED = ("raised_lr", "dead_layer")
"""Faults that last and leave finite norms before and after: only there a separation can be measured."""
FAULTS = ("healthy", *FITTING)


@dataclass(frozen=True)
class Settings(CausalLMRun):
    """The run that is watched, and when its fault comes."""

    model: str = "tiny-random"
    """Embedded model, local folder, or hub id; the deep network has its shape, but more layers."""
    random_init: bool = True
    """Build the model from its config alone."""
    batch_size: int = 4
    """Blocks per optimizer step."""
    sequence_length: int = 64
    """Tokens per block."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    precision: Any = "fp32"
    """bf16 is autocast over fp32 weights."""
    seeds: int = 44
    """Runs of each fault, the unit of replication."""
    steps: int = 120
    """Optimizer steps."""
    fault_step: int = 80
    """Optimizer step at which the fault comes (the deep network is broken from the start)."""
    window: int = 20
    """Steps whose median a norm is compared with, for the separation."""
    depth: int = 24
    """Layers of the deep network."""
    vanishing_below: float = 1e-7
    """Threshold of the monitor, as the guide has it."""
    exploding_above: float = 1e3
    """Threshold of the monitor, as the guide has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        if not 2 <= self.fault_step < self.steps:
            raise UserError(f"fault_step must be in [2, steps), got {self.fault_step} of {self.steps}")
        if not 2 <= self.window <= (self.fault_step - 1) // 2:
            raise UserError(
                f"window must be in [2, (fault_step - 1) / 2], got {self.window} with fault_step {self.fault_step}"
            )
        if not 0 < self.vanishing_below < self.exploding_above:
            raise UserError(
                f"thresholds must satisfy 0 < vanishing_below < exploding_above, got {self.vanishing_below} and "
                f"{self.exploding_above}"
            )


SCALES = {
    "smoke": Settings(seeds=2, steps=8, fault_step=5, window=2, depth=4),
    "laptop": Settings(seeds=12),
    "cpu": Settings(),
    "gpu": Settings(model="smollm2-135m", random_init=False, learning_rate=5e-5, precision="bf16", sequence_length=128),
}

COST = {
    "smoke": "under 1 min on 2 cores, no download",
    "laptop": "about 7 min on 2 cores",
    "cpu": "about 33 core-min (--workers 2 on 2 cores: 20 min)",
    "gpu": "planned for 30 min on one 80 GB GPU; not yet measured",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """Fault × seed; seed by seed, so that an early stop leaves whole groups."""
    shared = {key: value for key, value in dataclasses.asdict(settings).items() if key != "seeds"}
    return [
        EXPERIMENT.spec(scale, seed, {"fault": fault}, shared) for seed in range(settings.seeds) for fault in FAULTS
    ]


@dataclass
class _Norms:
    """Gradient norms of every step before clipping: of the whole model, of each layer and parameter."""

    layers: list[str]
    total: list[float] = field(default_factory=list)
    by_layer: list[list[float]] = field(default_factory=list)
    of_parameters: list[list[float]] = field(default_factory=list)
    """Of each parameter, apart from 0, Inf and NaN."""

    def keep(self, step: int, report: GradientReport) -> None:
        self.total.append(report.total_norm)
        self.by_layer.append(
            [
                math.hypot(*(n for name, n in report.norms.items() if name.startswith(layer + ".")))
                for layer in self.layers
            ]
        )
        self.of_parameters.append([norm for norm in report.norms.values() if 0 < norm < math.inf])


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Train with the monitor and one fault, and say when the monitor noticed what."""
    from experiments.harness.causal_lm import prepare
    from experiments.harness.cost import Whole
    from experiments.harness.training import train
    from experiments.worlds.faults import Fault, without_residuals
    from forge.layers import find_layers
    from forge.monitor import MonitorCallback

    began, fault = time.monotonic(), str(spec.factors["fault"])
    settings = Settings(**spec.settings)
    ingredients = prepare(settings, spec.seed)
    model: Any = ingredients.model
    if fault == "vanishing_depth":
        model = without_residuals(model, settings.depth, spec.seed)
    norms = _Norms([layer.name for layer in find_layers(model)])
    thresholds = {"vanishing_below": settings.vanishing_below, "exploding_above": settings.exploding_above}
    monitor = MonitorCallback(history=settings.steps, on_report=norms.keep, **thresholds)
    injected = Fault(fault, settings.fault_step, model)
    plan = settings.plan(spec.seed, settings.steps, "constant")
    whole = Whole(context.work_dir, context)  # the norms of a trial that was resumed would begin in its middle
    outcome = train(model, ingredients.train, ingredients.validation, plan, whole, [injected, monitor])
    measurements = Measurements(
        tokens=settings.steps * settings.batch_size * settings.sequence_length, digests=ingredients.digests
    )
    _observe(measurements, fault, injected.visible_from, settings.steps, list(monitor.history))
    _observe_thresholds(measurements, fault, injected.visible_from, settings, norms.of_parameters)
    if fault in SEPARATED:
        for arm, table in (("global_norm", [[n] for n in norms.total]), ("layer_norm", norms.by_layer)):
            auc = _separation(table, injected.visible_from, settings.window)
            measurements.observations.append(Observation.of(SEPARATION, auc, settings.steps, arm=arm))
    measurements.checks = ManipulationCheck.each(
        checks=(settings.steps, len(monitor.history)),
        norms=(settings.steps, len(norms.total)),
        fault_injected=(True, injected.done),
        optimizer_steps=(settings.steps, outcome.trainer.state.global_step),
    )
    measurements.seconds = {"training": outcome.training_sec, "evaluation": outcome.evaluation_sec}
    measurements.seconds["overhead"] = max(0.0, time.monotonic() - began - sum(measurements.seconds.values()))
    return measurements


def _observe(into: Measurements, fault: str, visible_from: int, steps: int, history: list[MonitorRecord]) -> None:
    """Whether and when the fault was noticed, and whether there was an alarm without one."""

    def add(metric: Metric, value: float) -> None:
        into.observations.append(Observation.of(metric, float(value), steps))

    healthy = fault == "healthy"
    if quiet := [record for record in history if healthy or record.step < visible_from]:
        add(FALSE_ALARM, any(set(record.counts) - {"loss_spike"} for record in quiet))
        add(ANY_FALSE_ALARM, any(record.counts for record in quiet))
    if healthy:
        return
    after = [record for record in history if record.step >= visible_from]
    noticed = [record.step for record in after if set(record.counts) & set(FITTING[fault])]
    add(DETECTED, bool(noticed))
    add(DETECTED_BY_ANY, any(record.counts for record in after))
    add(AT_ONCE, visible_from in noticed)
    if noticed:
        add(DELAY, noticed[0] - visible_from)


def _observe_thresholds(
    into: Measurements, fault: str, visible_from: int, settings: Settings, of_parameters: list[list[float]]
) -> None:
    """Where the norms lie that a threshold should tell apart, beside the threshold itself.

    A side that has no usable norm is not recorded.
    """
    before, after = (
        [norm for step in part for norm in step]
        for part in (of_parameters[: visible_from - 1], of_parameters[visible_from - 1 :])
    )
    arms: dict[str, float] = {}
    if fault == "healthy":
        arms["healthy"] = min(before + after, default=math.nan)
    elif fault == "vanishing_depth":
        arms |= {"faulty": min(after, default=math.nan), "threshold": settings.vanishing_below}
    elif fault == "high_lr":
        healthy, faulty = max(before, default=math.nan), max(after, default=math.nan)
        arms |= {"healthy": healthy, "faulty": faulty, "threshold": settings.exploding_above}
        arms["middle"] = math.sqrt(healthy) * math.sqrt(faulty)
    for arm, norm in arms.items():
        if not math.isnan(norm):
            into.observations.append(Observation.of(EXTREME_NORM, math.log10(norm), settings.steps, arm=arm))


def _separation(table: list[list[float]], visible_from: int, window: int) -> float:
    """Area under the ROC curve of the first window / 2 steps of a fault against the last window of steps before it.

    Args:
        table: norms; shape (steps, what is watched: one global norm, or the layers). NaN counts as infinite.
        visible_from: first step of the fault, from 1.
        window: steps before a step whose median its norms are compared with.
    """
    import numpy as np

    logs = np.log10(np.nan_to_num(np.array(table), nan=np.inf, posinf=np.inf))
    first = visible_from - 1
    steps = range(first - window, min(first + window // 2, len(logs)))
    scores = np.array([np.abs(logs[at] - np.median(logs[at - window : at], axis=0)).max() for at in steps])
    quiet, faulty = scores[:window], scores[window:]
    higher, equal = faulty[:, None] > quiet, faulty[:, None] == quiet
    return float(higher.mean() + equal.mean() / 2)


_WORDS = {
    "high_lr": "learning rate × 1000",
    "raised_lr": "learning rate × 50",
    "nan_batch": "батч с NaN",
    "dead_layer": "мёртвый слой",
    "fp16_overflow": "переполнение fp16",
    "vanishing_depth": "глубина без residual",
}
_SAID = {
    "high_lr": "seed 000, «Exploding gradients: norm > 1e3»",
    "nan_batch": "seed 000, «NaN/Inf: критическая ошибка»",
    "dead_layer": "seed 000, «Vanishing gradients: norm < 1e-7»",
    "fp16_overflow": "seed 000, «NaN/Inf: критическая ошибка»",
    "vanishing_depth": "seed 000, «Vanishing gradients: norm < 1e-7»",
}
"""Of the faults whose detection is a claim."""
_EARLY = "seed 000, «Мониторинг обучения для раннего обнаружения проблем»"


def _slug(fault: str) -> str:
    return fault.replace("_", "-")


def _distance(name: str, threshold: str, condition: str, above: dict[str, str], below: dict[str, str]) -> Claim:
    """That a threshold keeps an order of magnitude from a norm, of which one must lie above the other."""
    return Claim(
        f"monitor-{name}",
        f"Порог {threshold} не менее чем на порядок отделён от норм по обе стороны: здоровых и сбойных",
        "monitor",
        _SAID["high_lr" if threshold == "1e3" else "vanishing_depth"],
        Difference(EXTREME_NORM.name, above, below),
        Region(low=1.0),
        condition=condition,
    )


def _of(fault: str, arm: str) -> dict[str, str]:
    return {"fault": fault, "arm": arm}


CLAIMS = (
    *(
        Claim(
            f"monitor-detects-{_slug(fault)}",
            "Монитор с порогами гайда замечает сбой (не менее чем в 80 % запусков)",
            "monitor",
            said,
            Rate(DETECTED.name, {"fault": fault}),
            Region(low=0.8),
            condition=_WORDS[fault],
        )
        for fault, said in _SAID.items()
    ),
    Claim(
        "monitor-detects-high-lr-by-any-finding",
        "Монитор замечает сбой хоть чем-нибудь, считая и скачки loss (не менее чем в 80 % запусков)",
        "monitor",
        _EARLY,
        Rate(DETECTED_BY_ANY.name, {"fault": "high_lr"}),
        Region(low=0.8),
        condition=_WORDS["high_lr"],
    ),
    *(
        Claim(
            f"monitor-detects-at-once-{_slug(fault)}",
            "Монитор замечает сбой на первом же шаге, на котором его видно по градиентам (не менее чем в 80 % "
            "запусков): «раннее обнаружение проблем»",
            "monitor",
            _EARLY,
            Rate(AT_ONCE.name, {"fault": fault}),
            Region(low=0.8),
            condition=_WORDS[fault],
        )
        for fault in _SAID
    ),
    Claim(
        "monitor-quiet-on-healthy-runs",
        "На здоровых запусках монитор не поднимает тревоги по градиентам (не более чем в 20 % запусков)",
        "monitor",
        "seed 000, «Gradient Health»",
        Rate(FALSE_ALARM.name, {"fault": "healthy"}),
        Region(high=0.2),
        condition="предупреждения о скачках loss не считаются",
    ),
    Claim(
        "monitor-quiet-on-healthy-runs-of-any-kind",
        "На здоровых запусках монитор не поднимает никакой тревоги (не более чем в 20 % запусков)",
        "monitor",
        "seed 000, «Real-world monitoring во время обучения»",
        Rate(ANY_FALSE_ALARM.name, {"fault": "healthy"}),
        Region(high=0.2),
        condition="считаются и предупреждения о скачках loss",
    ),
    *(
        Claim(
            f"monitor-layer-norm-separates-{_slug(fault)}",
            "Нормы по слоям отделяют сбой лучше, чем глобальная норма (площадь под ROC больше не менее чем на 0,02)",
            "monitor",
            "собственное утверждение: норма слоя или всей модели",
            Difference(SEPARATION.name, {"arm": "layer_norm"}, {"arm": "global_norm"}, {"fault": fault}),
            Region(low=0.02),
            condition=_WORDS[fault],
        )
        for fault in SEPARATED
    ),
    _distance(
        "exploding-threshold-above-healthy",
        "1e3",
        "над наибольшей нормой параметра на здоровых шагах",
        _of("high_lr", "threshold"),
        _of("high_lr", "healthy"),
    ),
    _distance(
        "exploding-threshold-below-faulty",
        "1e3",
        f"под наибольшей нормой параметра на сбойных шагах, {_WORDS['high_lr']}",
        _of("high_lr", "faulty"),
        _of("high_lr", "threshold"),
    ),
    Claim(
        "monitor-exploding-threshold-near-middle",
        "Порог 1e3 не дальше порядка от (геометрической) середины между здоровыми и сбойными нормами",
        "monitor",
        _SAID["high_lr"],
        Difference(EXTREME_NORM.name, _of("high_lr", "threshold"), _of("high_lr", "middle")),
        Region(-1.0, 1.0),
        condition=_WORDS["high_lr"],
    ),
    _distance(
        "vanishing-threshold-below-healthy",
        "1e-7",
        "под наименьшей нормой параметра в здоровом запуске",
        _of("healthy", "healthy"),
        _of("vanishing_depth", "threshold"),
    ),
    _distance(
        "vanishing-threshold-above-faulty",
        "1e-7",
        f"над наименьшей нормой параметра в сбойном запуске, {_WORDS['vanishing_depth']}",
        _of("vanishing_depth", "threshold"),
        _of("vanishing_depth", "faulty"),
    ),
)

EXPERIMENT = Experiment(
    name="monitor_detection",
    version=2,
    question="Does the gradient monitor notice what breaks a run, and is it quiet on healthy ones?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
