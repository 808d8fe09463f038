"""Simulated experiments with a known truth: rows of observations of many experiments at once.

Serves ``verdict_calibration`` (section «engine» of THEORY.md). In every world the seed moves all arms alike, and so
cancels in a paired comparison. Noise of its own has only the arm that the claim is about, or that one more than the
others: the hardest case, since the paired difference then inherits the whole skew and the whole tails of the noise,
while like noise in both arms makes it symmetric.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from experiments.harness.claims import (
    ArgBestShift,
    Difference,
    Estimand,
    Interaction,
    LogLogSlope,
    Rate,
    Ratio,
    Regret,
    RelativeReduction,
    Scalar,
    SelectedReduction,
)

Array = npt.NDArray[np.float64]
Noise = Callable[[], Array]
"""One draw of standardised noise, shape (simulations, seeds)."""

LOSS = "eval_loss"
EMA, RAW = {"arm": "ema"}, {"arm": "raw"}
EMAS = ({"arm": "ema_0.9"}, {"arm": "ema_0.99"}, {"arm": "ema_0.999"})
SLOPE_STEPS = tuple(round(10 ** (3 + i / 5)) for i in range(11))


class Row(NamedTuple):
    """One row of observations, in all simulated experiments and seeds."""

    conditions: dict[str, Scalar]
    values: Array
    """Shape (simulations, seeds)."""
    step: int = 100
    metric: str = LOSS


class World(NamedTuple):
    """An estimand and the experiments that it is estimated from."""

    estimand: Estimand
    simulate: Callable[[Noise, Noise], list[Row]]
    """From noise of the distribution under test and from normal noise."""


OUTCOMES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "skewed": lambda rng, shape: rng.standard_exponential(shape) - 1,
    "heavy_tailed": lambda rng, shape: rng.standard_t(3, shape) / np.sqrt(3),
    "discrete": lambda rng, shape: (rng.binomial(8, 0.25, shape) - 2) / np.sqrt(1.5),
}
"""Distributions of noise with mean 0 and standard deviation 1: normal; exponential (skewness 2); Student's t with 3
degrees of freedom; the number of hits among 8 examples at a rate of a quarter."""


def simulate(world: World, outcomes: str, rng: np.random.Generator, shape: tuple[int, int]) -> list[Row]:
    """Rows of ``shape = (simulations, seeds)`` experiments."""
    return world.simulate(lambda: OUTCOMES[outcomes](rng, shape), lambda: rng.standard_normal(shape))


def _seed_effect(normal: Noise) -> Array:
    """What the seed does to all arms alike: a loss of 2 that varies by 5 %."""
    return np.asarray(2 * (1 + 0.05 * normal()))


def _reduction(noise: Noise, normal: Noise) -> list[Row]:
    raw = _seed_effect(normal)
    return [Row(RAW, raw), Row(EMA, raw * (1 - 0.02 - 0.01 * noise()))]


def _selected(noise: Noise, normal: Noise) -> list[Row]:
    """Three arms and two checkpoints against one arm at two checkpoints; validation and test differ a little."""
    seed, rows = _seed_effect(normal), []
    for arm in (*EMAS, RAW):
        for step, progress in ((50, 0.0), (100, 0.004)):
            gain = progress if arm is RAW else 0.01 + progress + 0.01 * noise()
            for split in ("validation", "test"):
                rows.append(Row({**arm, "split": split}, seed * (1 - gain + 0.002 * normal()), step))
    return rows


def _interaction(noise: Noise, normal: Noise) -> list[Row]:
    rows = []
    for schedule, gain, spread in (("constant", 0.02, 0.01), ("cosine", 0.005, 0.003)):
        raw = _seed_effect(normal)
        rows += [
            Row({**RAW, "schedule": schedule}, raw),
            Row({**EMA, "schedule": schedule}, raw * (1 - gain - spread * noise())),
        ]
    return rows


def _regret(noise: Noise, normal: Noise) -> list[Row]:
    seed = _seed_effect(normal)
    rivals = [Row(arm, seed * (1 + 0.002 * i + 0.003 * noise())) for i, arm in enumerate(EMAS)]
    return [Row(EMA, seed * (1.005 + 0.01 * noise())), *rivals]


def _best_shift(noise: Noise, normal: Noise) -> list[Row]:
    """A loss that is a parabola in log10 of the horizon, whose minimum moves by 0.8 decades."""
    rows = []
    for phase, best in (("early", 1.3), ("late", 2.1)):
        seed = _seed_effect(normal)
        for x in range(5):
            loss = seed * (1 + 0.05 * (x - best) ** 2 + 0.01 * noise())
            rows.append(Row({"phase": phase, "horizon_steps": 10.0**x}, loss))
    return rows


def _ratio(noise: Noise, normal: Noise) -> list[Row]:
    raw = _seed_effect(normal)
    return [Row(RAW, raw), Row(EMA, raw * (0.5 + 0.05 * noise()))]


def _difference(noise: Noise, normal: Noise) -> list[Row]:
    """Two shares of one seed, such as accuracies."""
    share = 0.7 + 0.02 * normal()
    return [Row(RAW, share), Row(EMA, share + 0.02 + 0.01 * noise())]


def _slope(noise: Noise, normal: Noise) -> list[Row]:
    """A power law whose exponent differs from seed to seed, measured with a little noise at every step."""
    scale, exponent = 2 + 0.1 * normal(), -1 + 0.03 * noise()
    return [Row({"arm": "mean"}, scale * step**exponent * np.exp(0.01 * normal()), step) for step in SLOPE_STEPS]


def _rate(noise: Noise, normal: Noise) -> list[Row]:
    """Whether a score passes a threshold; its distribution sets how often."""
    return [Row({}, (noise() > 0.5).astype(np.float64))]


REDUCTION = RelativeReduction(LOSS, EMA, RAW)
WORLDS: dict[str, World] = {
    "relative_reduction": World(REDUCTION, _reduction),
    "equivalence": World(REDUCTION, _reduction),
    "selected_reduction": World(SelectedReduction(LOSS, EMAS, (RAW,)), _selected),
    "interaction": World(Interaction(REDUCTION, {"schedule": "constant"}, {"schedule": "cosine"}), _interaction),
    "regret": World(Regret(LOSS, EMA, EMAS), _regret),
    "arg_best_shift": World(ArgBestShift(LOSS, "horizon_steps", {"phase": "early"}, {"phase": "late"}), _best_shift),
    "ratio": World(Ratio(LOSS, EMA, RAW), _ratio),
    "difference": World(Difference(LOSS, EMA, RAW), _difference),
    "slope": World(LogLogSlope(LOSS, {"arm": "mean"}, min_forgetting=None), _slope),
    "rate": World(Rate(LOSS), _rate),
}
"""The estimands of ``claims`` that have sampling error; an equivalence is a reduction with a region of two edges."""
