"""Does the verdict engine lie? How often does it say confirmed or refuted where the truth is on the other side?

Serves the section «engine» of THEORY.md. The one experiment that imports ``analysis``: the engine is what it measures.

Design. Estimand × distribution of outcomes; within a trial, experiments of 3, 5, 10 and 20 seeds are simulated in a
world whose truth is known, and judged as the only claim of an experiment and as one of a family of 40 (more than any
experiment has of these estimands) by the engine's own formulas, intervals and rule, many at once (a test shows that
``judge_campaign`` says the same of the same experiments). The truth is the mean over seeds of the estimand, which the
claims define; it is computed from a population of millions of seeds. The region is moved, not the truth: its edge lies
at the truth, one standard deviation (over seeds) below it, or above it; the region lies above its edge (side ``low``)
or below (side ``high``); that of an equivalence reaches four standard deviations.

What is false. Confirmed is false where the truth lies outside the region, refuted where it lies inside. Both are most
likely with the truth at the edge: there refuted is false, since regions are closed, and confirmed is what it would be
for a truth a hair outside. ``false_verdicts`` counts the most frequent of the two over both sides: the most that can
happen, wherever the truth lies. The engine promises each claim of a family of m at most 0.05/m; were all outcomes
normal, it would be a quarter of that (half, of a rate). The rule of the least number of seeds (``MIN_SEEDS``), which
follows from this experiment, is not applied in it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from experiments.harness.claims import Claim, Proportion, Region
from experiments.harness.experiment import Experiment, Preempted, TrialContext, UserError
from experiments.harness.record import ManipulationCheck, Measurements, Metric, Observation, TrialSpec

if TYPE_CHECKING:
    import numpy as np

    from experiments.worlds.outcomes import Array, Row, World

SIMULATIONS = Metric("simulations", "experiments", "none")
CONFIRMED = Metric("confirmed", "experiments", "none")
REFUTED = Metric("refuted", "experiments", "none")
NO_INTERVAL = Metric("no_interval", "experiments", "minimize")
FALSE_VERDICTS = Metric("false_verdicts", "experiments", "minimize")
INTERVAL_WIDTH = Metric("interval_width", "sd over seeds", "minimize")

ALPHA = 0.05
SEEDS = (3, 5, 10, 20)
FAMILIES = (1, 40)
"""Claims of an experiment, among which the error rate is shared."""
SIDES = ("low", "high")
POSITIONS = {"edge": 0.0, "inside": 1.0, "outside": -1.0}
"""Distance of the truth from the edge, positive inside the region, in standard deviations over seeds."""
EQUIVALENCE_WIDTH = 4.0
CHUNK = 100_000
ESTIMAND_WORDS = {
    "relative_reduction": "относительное снижение",
    "equivalence": "эквивалентность",
    "selected_reduction": "снижение после выбора",
    "interaction": "взаимодействие",
    "regret": "проигрыш лучшему",
    "arg_best_shift": "сдвиг лучшего уровня",
    "ratio": "отношение",
    "difference": "разность",
    "slope": "наклон",
    "rate": "частота",
}
OUTCOME_WORDS = {
    "gaussian": "нормальные исходы",
    "skewed": "асимметричные исходы",
    "heavy_tailed": "исходы с тяжёлыми хвостами",
    "discrete": "дискретные исходы",
}


@dataclass(frozen=True)
class Settings:
    """How many experiments are simulated."""

    simulations: int = 400_000
    """Simulated experiments of each estimand, distribution and number of seeds."""
    population: int = 4_000_000
    """Seeds from which the truth is computed."""

    def __post_init__(self) -> None:
        if self.simulations < 1:
            raise UserError(f"simulations must be at least 1, got {self.simulations}")
        if self.population < 1_000:
            raise UserError(f"population must be at least 1000 seeds, got {self.population}")


SCALES = {
    "smoke": Settings(simulations=200, population=200_000),
    "laptop": Settings(simulations=40_000, population=1_000_000),
    "cpu": Settings(),
}

COST = {
    "smoke": "under 1 min on 1 core",
    "laptop": "about 2 min on 1 core",
    "cpu": "about 9 min on 1 core",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """Estimand × distribution; one seed draws everything."""
    return [
        EXPERIMENT.spec(scale, 0, {"estimand": estimand, "outcomes": outcomes}, asdict(settings))
        for estimand in ESTIMAND_WORDS
        for outcomes in OUTCOME_WORDS
    ]


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Judge simulated experiments of one estimand under one distribution of outcomes."""
    import numpy as np

    from experiments.worlds.outcomes import WORLDS

    began, settings = time.monotonic(), Settings(**spec.settings)
    estimand, outcomes = str(spec.factors["estimand"]), str(spec.factors["outcomes"])
    where = [list(ESTIMAND_WORDS).index(estimand), list(OUTCOME_WORDS).index(outcomes)]
    rng = np.random.default_rng([spec.seed, *where])
    truth, sd = _truth(WORLDS[estimand], outcomes, settings.population, rng, context)
    measurements = Measurements()
    for n_seeds in SEEDS:
        values = _drawn(WORLDS[estimand], outcomes, (settings.simulations, n_seeds), rng, context)
        for family in FAMILIES:
            _observe(estimand, values, family, truth, sd, measurements)
    errors = abs(values.mean() - truth) / (sd * np.sqrt(1 / values.size + 1 / settings.population))
    measurements.checks = [
        ManipulationCheck(
            name="simulated_mean_is_the_truth",
            expected="within 5 standard errors",
            observed=f"{errors:.2f} standard errors",
            passed=bool(errors <= 5),
        )
    ]
    measurements.seconds = {"training": time.monotonic() - began, "evaluation": 0.0, "overhead": 0.0}
    return measurements


def _truth(
    world: World, outcomes: str, population: int, rng: np.random.Generator, context: TrialContext
) -> tuple[float, float]:
    """Mean and standard deviation of the estimand over a population of seeds."""
    values = _drawn(world, outcomes, (population, 1), rng, context)
    return float(values.mean()), float(values.std())


def _drawn(
    world: World, outcomes: str, shape: tuple[int, int], rng: np.random.Generator, context: TrialContext
) -> Array:
    """The estimand of each seed of simulated experiments, shape (simulations, seeds), drawn in chunks."""
    import numpy as np

    from experiments.worlds.outcomes import simulate

    simulations, n_seeds = shape
    chunks = []
    for start in range(0, simulations, CHUNK):
        context.report(start, simulations, phase=f"experiments of {n_seeds} seeds")
        if context.should_stop():
            raise Preempted
        chunks.append(seed_values(world, simulate(world, outcomes, rng, (min(CHUNK, simulations - start), n_seeds))))
    return np.concatenate(chunks)


def seed_values(world: World, rows: list[Row]) -> Array:
    """The estimand of each simulated seed by the formulas of the engine, shape (simulations, seeds)."""
    import numpy as np

    from analysis import formulas
    from experiments.harness import claims

    def of(**conditions: object) -> Array:
        """Values of the rows that agree, stacked along the last axis; those of a single row as they are."""
        chosen = [row.values for row in rows if conditions.items() <= row.conditions.items()]
        return np.stack(chosen, axis=-1) if len(chosen) > 1 else chosen[0]

    match world.estimand:
        case claims.RelativeReduction(_, treatment, control):
            return formulas.relative_reduction(of(**treatment), of(**control))
        case claims.Interaction(claims.RelativeReduction(_, treatment, control), first, second):
            more, less = (
                formulas.relative_reduction(of(**treatment, **condition), of(**control, **condition))
                for condition in (first, second)
            )
            return more - less
        case claims.SelectedReduction(_, treatments, controls, _, choose_on, report_on):
            sides = [
                [np.concatenate([of(**arm, **split) for arm in arms], axis=-1) for split in (choose_on, report_on)]
                for arms in (treatments, controls)
            ]
            return formulas.relative_reduction(*(formulas.value_of_chosen(*side) for side in sides))
        case claims.Ratio(_, numerator, denominator):
            return np.asarray(of(**numerator) / of(**denominator))
        case claims.Difference(_, one, other):
            return np.asarray(of(**one) - of(**other))
        case claims.Regret(_, choice, rivals):
            return formulas.regret(of(**choice), np.stack([of(**rival) for rival in rivals], axis=-1))
        case claims.ArgBestShift(_, along, start, end):
            x = np.log10([float(row.conditions[along]) for row in rows if start.items() <= row.conditions.items()])
            return formulas.best_abscissa(x, of(**end)) - formulas.best_abscissa(x, of(**start))
        case claims.LogLogSlope():
            window = [row for row in rows if 10 * row.step >= rows[-1].step]
            return formulas.slope(
                np.log([row.step for row in window]), np.log(np.stack([row.values for row in window], axis=-1))
            )
        case claims.Rate():
            return of()
    raise NotImplementedError(f"no formula for {type(world.estimand).__name__}")


def intervals(world: World, values: Array, family: int) -> tuple[Array, Array]:
    """The engine's interval of each simulated experiment; NaN where it refuses one for lack of variance."""
    import numpy as np

    from analysis.statistics import alpha_of_mean, binomial_interval, bonferroni, t_interval, varies
    from experiments.harness.claims import Rate

    if isinstance(world.estimand, Rate):
        n = values.shape[1]
        share = bonferroni(ALPHA, family)
        table = [binomial_interval(successes, n, share) for successes in range(n + 1)]
        counts = values.sum(axis=1).astype(int)
        return np.array([e.low for e in table])[counts], np.array([e.high for e in table])[counts]
    usable = varies(values)
    low, high = np.full((2, len(values)), np.nan)
    low[usable], high[usable] = t_interval(values[usable], alpha_of_mean(ALPHA, family))
    return low, high


def region_of(estimand: str, truth: float, sd: float, side: str, position: str) -> Region:
    """The region whose edge has the truth at a position; see ``POSITIONS``.

    A probability has no room for a whole standard deviation: its edge lies halfway to 0 or 1 if that is nearer.
    """
    step = min(sd, truth / 2, (1 - truth) / 2) if estimand == "rate" else sd
    width = EQUIVALENCE_WIDTH * sd if estimand == "equivalence" else float("inf")
    if side == "low":
        edge = truth - POSITIONS[position] * step
        return Region(edge, edge + width)
    edge = truth + POSITIONS[position] * step
    return Region(edge - width, edge)


def _observe(estimand: str, values: Array, family: int, truth: float, sd: float, into: Measurements) -> None:
    """Count the verdicts on experiments of one number of seeds, at every side and position of the region."""
    import numpy as np

    from analysis.verdicts import decided
    from experiments.worlds.outcomes import WORLDS

    simulations, n_seeds = values.shape
    low, high = intervals(WORLDS[estimand], values, family)
    cell = {"n_seeds": n_seeds, "family": family}
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for side in SIDES:
        for position in POSITIONS:
            verdicts = decided(low, high, region_of(estimand, truth, sd, side, position))
            confirmed, refuted = (int(np.count_nonzero(verdict)) for verdict in verdicts)
            found[side, position] = confirmed, refuted
            counts = {SIMULATIONS: simulations, CONFIRMED: confirmed, REFUTED: refuted}
            into.observations += [
                Observation.of(metric, count, 0, **cell, side=side, position=position)
                for metric, count in counts.items()
            ]
    worst = {**cell, "side": "worse", "position": "edge"}
    summary = {
        SIMULATIONS: simulations,
        FALSE_VERDICTS: max(max(found[side, "edge"]) for side in SIDES),
        NO_INTERVAL: int(np.isnan(low).sum()),
        INTERVAL_WIDTH: float(np.nanmean(high - low)) / sd,
    }
    into.observations += [Observation.of(metric, value, 0, **worst) for metric, value in summary.items()]


def _claims() -> tuple[Claim, ...]:
    return tuple(
        Claim(
            f"false-verdicts-{estimand}-{outcomes}-{n_seeds}-of-{family}".replace("_", "-"),
            f"Ложный вердикт — не чаще обещанного (5 % на все m утверждений вместе): {words}",
            "engine",
            "правило вердикта: analysis/verdicts.py",
            Proportion(
                FALSE_VERDICTS.name,
                SIMULATIONS.name,
                {
                    "estimand": estimand,
                    "outcomes": outcomes,
                    "n_seeds": n_seeds,
                    "family": family,
                    "side": "worse",
                    "position": "edge",
                },
            ),
            Region(high=ALPHA / family),
            condition=f"m = {family}, {outcome_words}, n = {n_seeds}",
        )
        for estimand, words in ESTIMAND_WORDS.items()
        for family in FAMILIES
        for outcomes, outcome_words in OUTCOME_WORDS.items()
        for n_seeds in SEEDS
    )


EXPERIMENT = Experiment(
    name="verdict_calibration",
    version=3,
    question="How often does the verdict engine say confirmed or refuted where the truth is on the other side?",
    claims=_claims(),
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
