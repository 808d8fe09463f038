"""How fast does SGD converge with and without averaging, and which decay is best, where the answer can be computed?

Serves the section «EMA» of THEORY.md: its «Ключевой результат» and «Теоретический выигрыш» (seed 000) and the rules
for choosing a decay (seed 003).

Design. Track ``rates``: every average along one trajectory of SGD, under a constant step and under γ₀ (1 + t/t₀)^-α.
On stochastic quadratics (condition number × shape of the gradient noise) second moments are propagated exactly and a
trial has no sampling error; streaming least squares, logistic regression and a loss that is flat at its optimum are
followed by independent chains, and a trial is a seed of ``chains`` chains. Track ``decays``: excess loss of a fine grid
of decays on the exact quadratics, by length of the run, under a constant step and under cosine to zero, started at
θ(0) or bias-corrected. The guides' sentences name no conditions; so each is judged once per schedule.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from experiments.harness.claims import (
    ArgBestShift,
    Claim,
    Estimand,
    Exact,
    LogLogSlope,
    Region,
    Regret,
)
from experiments.harness.experiment import Experiment, Preempted, TrialContext, UserError
from experiments.harness.record import ManipulationCheck, Measurements, Metric, Observation, TrialSpec

if TYPE_CHECKING:
    from experiments.worlds.averaging import Array, Average
    from experiments.worlds.chains import Stream
    from experiments.worlds.quadratic import Quadratic

SQUARED_ERROR = Metric("squared_error", "1", "minimize")
VARIANCE = Metric("variance", "1", "minimize")
EXCESS_LOSS = Metric("excess_loss", "1", "minimize")
OVER_BOUND = Metric("variance_over_cramer_rao", "1", "none")

SCHEDULES = ("constant", "t^-0.5", "t^-0.75", "t^-1")
GUIDE = {1_000: 0.99, 10_000: 0.999, 100_000: 0.9999}
"""The table of seed 003: length of the run → decay."""
STREAMS = ("least_squares", "logistic", "flat")
POINTS_PER_DECADE = 5


@dataclass(frozen=True)
class Settings:
    """How long, and with how many chains."""

    steps: int = 1_000_000
    """Steps of track ``rates``."""
    lengths: tuple[int, ...] = tuple(GUIDE)
    """Lengths of the runs of track ``decays``."""
    seeds: int = 8
    """Seeds of each world that is followed by chains."""
    chains: int = 32
    """Independent chains of a seed."""
    first_step: float = 0.5
    """γ₀ on the quadratics, whose largest curvature is 1."""
    first_step_of_chains: float = 0.1
    """γ₀ on the streaming worlds."""
    offset_steps: float = 1_000.0
    """t₀ of the schedules (1 + t/t₀)^-α."""
    decays_per_decade: int = 10
    """Decays of the grid per decade of 1 − β, from 1 − 10^-0.5 to 1 − 10^-6."""

    def __post_init__(self) -> None:
        for name in ("seeds", "chains", "decays_per_decade"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.steps, *self.lengths) < 100:
            raise UserError(f"runs must have at least 100 steps, got {min(self.steps, *self.lengths)}")
        if not 0 < self.first_step <= 1 or not 0 < self.first_step_of_chains <= 0.15 or not self.offset_steps > 0:
            raise UserError(
                "steps must be stable: first_step in (0, 1], first_step_of_chains in (0, 0.15], offset_steps above 0, "
                f"got {self.first_step}, {self.first_step_of_chains}, {self.offset_steps}"
            )


SCALES = {
    "smoke": Settings(steps=2_000, lengths=(100, 1_000), seeds=2, chains=4),
    "laptop": Settings(steps=100_000, lengths=(1_000, 10_000), seeds=4, chains=16),
    "cpu": Settings(),
    "paper": Settings(steps=10_000_000, seeds=32),
}

COST = {
    "smoke": "under 10 s on 2 cores",
    "laptop": "about 2 min on 2 cores",
    "cpu": "about 1 h 10 min on 2 cores with --workers 2",
    "paper": "planned for a day on 2 cores; not yet measured",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """The exact worlds once each (seed 0 draws nothing), then the streams seed by seed."""
    quadratics = [
        {"track": track, "world": "quadratic", "condition_number": condition_number, "noise": noise}
        for track in ("decays", "rates")
        for condition_number in (10, 100)
        for noise in ("isotropic", "hessian")
    ]
    streams = [(seed, {"track": "rates", "world": world}) for seed in range(settings.seeds) for world in STREAMS]
    return [
        EXPERIMENT.spec(scale, seed, factors, {key: value for key, value in asdict(settings).items() if key != "seeds"})
        for seed, factors in [*((0, factors) for factors in quadratics), *streams]
    ]


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Follow all averages and schedules of one world."""
    began = time.monotonic()
    settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec.settings.items()})
    measurements = Measurements()
    if spec.factors["track"] == "decays":
        _decays(_quadratic(spec), settings, context, measurements)
    elif spec.factors["world"] == "quadratic":
        _exact_rates(_quadratic(spec), settings, context, measurements)
    else:
        _chain_rates(_stream(str(spec.factors["world"])), settings, spec.seed, context, measurements)
    measurements.seconds = {"training": time.monotonic() - began, "evaluation": 0.0, "overhead": 0.0}
    return measurements


def _quadratic(spec: TrialSpec) -> Quadratic:
    from experiments.worlds.quadratic import quadratic

    return quadratic(float(str(spec.factors["condition_number"])), str(spec.factors["noise"]))


def _stream(name: str) -> Stream:
    import numpy as np

    from experiments.worlds.chains import LeastSquares, Logistic, Quartic

    streams: dict[str, Stream] = {
        "least_squares": LeastSquares(np.logspace(-1, 0, 10)),
        "logistic": Logistic(),
        "flat": Quartic(),
    }
    return streams[name]


def _step_sizes(first: float, settings: Settings) -> Array:
    """γ of every schedule, in the order of ``SCHEDULES``; shape (4, steps)."""
    import numpy as np

    from experiments.worlds.averaging import constant_steps, power_steps

    powers = [power_steps(first, settings.steps, alpha, settings.offset_steps) for alpha in (0.5, 0.75, 1.0)]
    return np.stack([constant_steps(first, settings.steps), *powers])


def _record_at(steps: int) -> list[int]:
    """Steps spread evenly in the logarithm over the last two decades, and one for each decade before."""
    late = [round(steps * 10 ** (-i / POINTS_PER_DECADE)) for i in range(2 * POINTS_PER_DECADE + 1)]
    early = [round(steps / 10**i) for i in range(3, 9) if steps / 10**i >= 1]
    return sorted({*late, *early})


def _rate_averages(record_at: list[int]) -> list[Average]:
    from experiments.worlds.averaging import ema, ema_of_a_tenth, last_iterate, second_halves, uniform

    decays = [ema(decay) for decay in GUIDE.values()]
    return [last_iterate(), uniform(), *decays, ema_of_a_tenth(), *second_halves(record_at)]


def _conditions(average: Average, step: int) -> dict[str, str | float] | None:
    """Name and horizon of an average at a step; None for a suffix average that is in charge of other steps."""
    if average.name.startswith("suffix"):
        return {"arm": "suffix"} if str(step) in average.name.split("@")[1:] else None
    return {"arm": average.name} | ({} if average.horizon_steps is None else {"horizon_steps": average.horizon_steps})


def _proceed(context: TrialContext, total: int) -> Any:
    def proceed(step: int) -> None:
        context.report(step, total, phase="stochastic approximation")
        if context.should_stop():
            raise Preempted

    return proceed


def _exact_rates(world: Quadratic, settings: Settings, context: TrialContext, into: Measurements) -> None:
    from experiments.worlds.quadratic import propagate

    step_sizes, record_at = _step_sizes(settings.first_step, settings), _record_at(settings.steps)
    averages = _rate_averages(record_at)
    moments = propagate(world, step_sizes, averages, record_at, _proceed(context, settings.steps))
    forgotten = float(world.curvature.min()) * step_sizes.cumsum(axis=1)
    for step, at in moments.items():
        for s, schedule in enumerate(SCHEDULES):
            for k, average in enumerate(averages):
                conditions = _conditions(average, step)
                if conditions is None:
                    continue
                where = {"schedule": schedule, "forgetting": float(forgotten[s, step - 1]), **conditions}
                variance = float(at.variance[s, k])
                into.observations += [
                    Observation.of(SQUARED_ERROR, float(at.squared_error[s, k]), step, **where),
                    Observation.of(EXCESS_LOSS, float(at.excess_loss[s, k]), step, **where),
                    Observation.of(VARIANCE, variance, step, **where),
                    Observation.of(OVER_BOUND, variance * step / world.cramer_rao, step, **where),
                ]
    last, closed = moments[settings.steps].squared_error[0, 0], _closed_form(world, settings)
    agree = abs(last - closed) <= 1e-9 * closed
    into.checks = [
        *ManipulationCheck.each(recorded_steps=(len(record_at), len(moments))),
        ManipulationCheck(
            name="constant_step_closed_form", expected=f"{closed:.9g}", observed=f"{last:.9g}", passed=agree
        ),
    ]


def _closed_form(world: Quadratic, settings: Settings) -> float:
    """E‖e(T)‖² under a constant step: Σ r^2T + γ² s (1 − r^2T) / (1 − r²), r = 1 − γλ; by no recursion."""
    squared = (1 - settings.first_step * world.curvature) ** 2
    left = squared**settings.steps
    return float((left * world.distance**2 + settings.first_step**2 * world.noise * (1 - left) / (1 - squared)).sum())


def _chain_rates(world: Stream, settings: Settings, seed: int, context: TrialContext, into: Measurements) -> None:
    import numpy as np

    from experiments.worlds.chains import follow

    step_sizes, record_at = _step_sizes(settings.first_step_of_chains, settings), _record_at(settings.steps)
    averages = [a for a in _rate_averages(record_at) if a.name not in ("ema_0.99", "ema_0.9999")]
    rng, proceed = np.random.default_rng(seed), _proceed(context, settings.steps)
    errors = follow(world, step_sizes, averages, record_at, settings.chains, rng, proceed)
    for step, at in errors.items():
        for s, schedule in enumerate(SCHEDULES):
            where: dict[str, str | float] = {"schedule": schedule}
            if world.strong_convexity is not None:
                where["forgetting"] = float(world.strong_convexity * step_sizes[s, :step].sum())
            for k, average in enumerate(averages):
                conditions = _conditions(average, step)
                if conditions is None:
                    continue
                rows = [(SQUARED_ERROR, at.squared_error[s, k]), (EXCESS_LOSS, at.excess_loss[s, k])]
                into.observations += [Observation.of(m, float(v), step, **where, **conditions) for m, v in rows]
                if world.cramer_rao is not None and step == settings.steps:
                    ratio = float(at.squared_error[s, k]) * step / world.cramer_rao
                    into.observations.append(Observation.of(OVER_BOUND, ratio, step, **where, **conditions))
    finite = all(np.isfinite(at.squared_error).all() for at in errors.values())
    into.checks = ManipulationCheck.each(
        recorded_steps=(len(record_at), len(errors)), errors_are_finite=(True, bool(finite))
    )


def _decays(world: Quadratic, settings: Settings, context: TrialContext, into: Measurements) -> None:
    """Excess loss at the end of runs of several lengths; under a constant step they lie on one trajectory."""
    import numpy as np

    from experiments.worlds.averaging import constant_steps, cosine_steps
    from experiments.worlds.quadratic import propagate

    rivals = {"last", *(name for name, _ in _grid(settings.decays_per_decade))}
    longest, proceed = max(settings.lengths), _proceed(context, max(settings.lengths))
    runs = [("constant", constant_steps(settings.first_step, longest), settings.lengths)]
    runs += [("cosine", cosine_steps(settings.first_step, length), (length,)) for length in settings.lengths]
    for schedule, step_sizes, lengths in runs:
        for start in ("initial_weights", "bias_corrected"):
            averages = _decay_grid(settings, bias_corrected=start == "bias_corrected")
            moments = propagate(world, np.atleast_2d(step_sizes), averages, lengths, proceed)
            for length, at in moments.items():
                for k, average in enumerate(averages):
                    where: dict[str, str | float] = {"schedule": schedule, "steps": length, "start": start}
                    optimal = average.name.startswith("optimal@")
                    if optimal and average.name != f"optimal@{length}":
                        continue
                    arm = "ema_optimal" if optimal else average.name
                    if arm in rivals:
                        where["family"] = "grid"
                    assert average.horizon_steps is not None
                    where["horizon_steps"] = average.horizon_steps
                    value = float(at.excess_loss[0, k])
                    into.observations.append(Observation.of(EXCESS_LOSS, value, length, arm=arm, **where))
    arms = 1 + len(_grid(settings.decays_per_decade)) + len(GUIDE) + 1
    into.checks = ManipulationCheck.each(recorded_arms=(2 * 2 * len(settings.lengths) * arms, len(into.observations)))


def _decay_grid(settings: Settings, *, bias_corrected: bool) -> list[Average]:
    """Raw weights, the grid, the guide's three decays and ``compute_optimal_decay`` of every length."""
    from experiments.worlds.averaging import ema, last_iterate
    from forge.ema import compute_optimal_decay

    grid = [ema(decay, name=name, bias_corrected=bias_corrected) for name, decay in _grid(settings.decays_per_decade)]
    guide = [ema(decay, name=f"guide_{decay:g}", bias_corrected=bias_corrected) for decay in GUIDE.values()]
    optimal = [
        ema(compute_optimal_decay(length), name=f"optimal@{length}", bias_corrected=bias_corrected)
        for length in settings.lengths
    ]
    return [last_iterate(), *grid, *guide, *optimal]


def _grid(per_decade: int) -> list[tuple[str, float]]:
    """β = 1 − 10^(−i / per_decade) from 10^-0.5 to 10^-6."""
    first, last = round(0.5 * per_decade), 6 * per_decade
    return [(f"grid_{i}", 1 - 10 ** (-i / per_decade)) for i in range(first, last + 1)]


_AS_ROOT, _AS_INVERSE, _AS_SQUARE = Region(-0.6, -0.4), Region(-1.1, -0.9), Region(-2.1, -1.9)
_WORDS = {
    "constant": "постоянный шаг",
    "t^-0.5": "шаг ~ t^-½",
    "t^-0.75": "шаг ~ t^-¾",
    "t^-1": "шаг ~ 1/t",
    "cosine": "шаг по косинусу до нуля",
}
_SLUG = {"constant": "constant", "t^-0.5": "alpha-0.5", "t^-0.75": "alpha-0.75", "t^-1": "alpha-1"}
_WORLD_WORDS = {
    "quadratic": "квадратичная функция, точно",
    "least_squares": "наименьшие квадраты",
    "logistic": "логистическая регрессия",
    "flat": "выпуклая, не сильно выпуклая",
}


def _spaced(number: int) -> str:
    return f"{number:_}".replace("_", " ")


def _slope_claims(world: str, schedule: str) -> list[Claim]:
    """What seed 000 says of rates, for one world and one schedule."""
    where = {"track": "rates", "world": world, "schedule": schedule}
    forgetting = None if world == "flat" else 10.0
    metric = EXCESS_LOSS.name if world == "flat" else SQUARED_ERROR.name
    told = "избыточный loss" if world == "flat" else "квадрат ошибки"
    key, table = "seed 000, «Ключевой результат»", "seed 000, «Теоретический выигрыш»"

    def claim(id: str, statement: str, source: str, metric: str, arm: str, region: Region) -> Claim:
        slope = LogLogSlope(metric, {"arm": arm}, where, min_forgetting=forgetting)
        estimand: Estimand = Exact(slope) if world == "quadratic" else slope
        name = f"{id}-{world}-{_SLUG[schedule]}".replace("_", "-")
        told = f"{statement} ({_WORLD_WORDS[world]})"
        return Claim(name, told, "ema", source, estimand, region, condition=_WORDS[schedule])

    root = "Стандартный SGD сходится как O(1/√t), порядок точный"
    inverse = "SGD с Polyak averaging сходится как O(1/t), порядок точный"
    claims = [
        claim("sgd-root-rate", f"{root}: {told} последнего шага", key, metric, "last", _AS_ROOT),
        claim("polyak-rate", f"{inverse}: {told} среднего", key, metric, "uniform", _AS_INVERSE),
    ]
    if world != "quadratic":
        return claims
    basis, like = "seed 000, «EMA основан на Polyak & Juditsky»", "сходится, как среднее Поляка, O(1/t)"
    for id, what, arm in (
        ("ema-rate", "EMA с постоянным decay (0.999)", "ema_0.999"),
        ("ema-tenth-rate", "EMA с периодом полураспада t/10", "ema_tenth"),
    ):
        claims.append(claim(id, f"{what} {like}", basis, metric, arm, _AS_INVERSE))
    for id, what, arm, region in (
        ("variance-raw", "без усреднения убывает как O(σ²/t)", "last", _AS_INVERSE),
        ("variance-ema", "с EMA (0.999) убывает как O(σ²/t²)", "ema_0.999", _AS_SQUARE),
        ("variance-polyak", "с равномерным средним убывает как O(σ²/t²)", "uniform", _AS_SQUARE),
    ):
        claims.append(claim(id, f"Variance {what}", table, VARIANCE.name, arm, region))
    return claims


def _decay_claims(schedule: str, start: str) -> list[Claim]:
    """What seed 003 says of the choice of a decay, for one schedule and one start of the average."""
    where = {"track": "decays", "schedule": schedule, "start": start}
    begins = {"initial_weights": "EMA с θ(0)", "bias_corrected": "EMA с поправкой на начало"}[start]
    condition, slug = f"{_WORDS[schedule]}; {begins}", f"{schedule}-{start}".replace("_", "-")
    loss = EXCESS_LOSS.name
    grid = ({"arm": "last"}, *({"arm": name} for name, _ in _grid(Settings.decays_per_decade)))
    family = {**where, "family": "grid"}
    claims = [
        Claim(
            f"best-horizon-grows-from-{short}-{slug}",
            f"Чем длиннее обучение, тем ближе decay к 1: от {_spaced(short)} к {_spaced(long)} шагов лучший горизонт "
            "растёт не менее чем вдвое",
            "ema",
            "seed 003, «Правило»",
            Exact(ArgBestShift(loss, "horizon_steps", {"steps": short}, {"steps": long}, family)),
            Region(low=0.3),
            condition=condition,
        )
        for short, long in ((1_000, 10_000), (10_000, 100_000))
    ]
    for steps, decay in GUIDE.items():
        at = {**where, "steps": steps}
        claims += [
            Claim(
                f"guide-decay-{decay:g}-at-{steps}-{slug}",
                f"При ~{_spaced(steps)} шагов decay = {decay:g} хорош: проигрывает лучшему не более чем в 1,25 раза",
                "ema",
                "seed 003, «Выбор decay», таблица",
                Exact(Regret(loss, {"arm": f"guide_{decay:g}"}, grid, at)),
                Region(high=0.25),
                condition=condition,
            ),
            Claim(
                f"optimal-decay-at-{steps}-{slug}",
                f"При {_spaced(steps)} шагов compute_optimal_decay(T) проигрывает лучшему не более чем в 1,25 раза",
                "ema",
                "seed 003, «Автоматический расчёт»",
                Exact(Regret(loss, {"arm": "ema_optimal"}, grid, at)),
                Region(high=0.25),
                condition=condition,
            ),
        ]
    return claims


_WORLDS = ("quadratic", *STREAMS)
_AVERAGED = [
    (schedule, start) for schedule in ("constant", "cosine") for start in ("initial_weights", "bias_corrected")
]
CLAIMS = (
    *(c for w in _WORLDS for told in zip(*(_slope_claims(w, s) for s in SCHEDULES), strict=True) for c in told),
    *(c for told in zip(*(_decay_claims(*condition) for condition in _AVERAGED), strict=True) for c in told),
)
"""Sentence by sentence, each under all its conditions."""

EXPERIMENT = Experiment(
    name="polyak_averaging",
    version=1,
    question="How fast does SGD converge with and without averaging, where the answer can be computed?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
