"""Streaming problems without a closed recursion, followed by many independent chains at once.

All schedules of a chain see the same samples, so that they are compared on one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import expit

from experiments.worlds.averaging import Array, Average, weights_table

_BLOCK = 1_000
"""Steps whose samples are drawn at once."""


class Stream(Protocol):
    """A problem that yields one noisy gradient per chain and step."""

    dimension: int

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Samples of ``shape`` (steps, chains): inputs (*shape, dimension) and targets of the world's own shape."""

    def gradient(self, error: Array, inputs: Array, target: Array) -> Array:
        """Stochastic gradient at e = θ − θ*; ``error`` has shape (schedules, chains, dimension)."""

    def excess_loss(self, error: Array) -> Array:
        """L(θ* + e) − L(θ*), shape of ``error`` without its last axis."""

    @property
    def strong_convexity(self) -> float | None:
        """Least eigenvalue μ of the Hessian at θ*; None where it is nought."""

    @property
    def cramer_rao(self) -> float | None:
        """t times the Cramér–Rao bound of E‖θ̂ − θ*‖² after t samples; None where there is none."""


@dataclass(frozen=True)
class LeastSquares:
    """y = x·θ* + ε, x ~ N(0, diag(λ)), ε ~ N(0, 1): the noise grows with the distance to θ*, and is shaped like H."""

    curvature: Array

    @property
    def dimension(self) -> int:
        return self.curvature.size

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
        inputs = rng.standard_normal((*shape, self.dimension)) * np.sqrt(self.curvature)
        return inputs, rng.standard_normal(shape)

    def gradient(self, error: Array, inputs: Array, target: Array) -> Array:
        return ((error * inputs).sum(axis=-1) - target)[..., None] * inputs

    def excess_loss(self, error: Array) -> Array:
        return 0.5 * (error**2 @ self.curvature)

    @property
    def strong_convexity(self) -> float:
        return float(self.curvature.min())

    @property
    def cramer_rao(self) -> float:
        return float(np.sum(1 / self.curvature))


class Logistic:
    """P(y = 1 | x) = σ(x·θ*), x ~ N(0, I): strongly convex near θ* only, and not quadratic.

    The Hessian at θ* is a I + (b − a) u uᵀ, u = θ*/‖θ*‖, a = E σ'(rz), b = E σ'(rz) z², z ~ N(0, 1), r = ‖θ*‖. The
    excess loss is a mean over a fixed sample of inputs, of which only the label is averaged exactly.
    """

    def __init__(self, dimension: int = 10, norm_of_optimum: float = 1.0, test_inputs: int = 4_000) -> None:
        self.dimension = dimension
        self._optimum = np.full(dimension, norm_of_optimum / np.sqrt(dimension))
        z = np.linspace(-10, 10, 20_001)
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
        slope = expit(norm_of_optimum * z) * expit(-norm_of_optimum * z) * density * (z[1] - z[0])
        self._across, self._along = float(slope.sum()), float((slope * z**2).sum())
        self._test = np.random.default_rng(0).standard_normal((test_inputs, dimension))

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
        inputs = rng.standard_normal((*shape, self.dimension))
        return inputs, (rng.random(shape) < expit(inputs @ self._optimum)).astype(np.float64)

    def gradient(self, error: Array, inputs: Array, target: Array) -> Array:
        logit = (error * inputs).sum(axis=-1) + inputs @ self._optimum
        return (expit(logit) - target)[..., None] * inputs

    def excess_loss(self, error: Array) -> Array:
        best = self._test @ self._optimum
        probability = expit(best)
        flat = error.reshape(-1, self.dimension)
        losses = []
        for some in np.array_split(flat, max(1, len(flat) // 64)):
            logits = some @ self._test.T + best
            losses.append((np.logaddexp(0, logits) - probability * logits).mean(axis=1))
        return np.concatenate(losses).reshape(error.shape[:-1]) - (np.logaddexp(0, best) - probability * best).mean()

    @property
    def strong_convexity(self) -> float:
        return min(self._across, self._along)

    @property
    def cramer_rao(self) -> float:
        return (self.dimension - 1) / self._across + 1 / self._along


@dataclass(frozen=True)
class Quartic:
    """L(e) = Σ h(eᵢ), h' = clip(e, −1, 1)³, unit gradient noise: convex, and flat at the optimum."""

    dimension: int = 10
    strong_convexity: None = None
    cramer_rao: None = None

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
        return rng.standard_normal((*shape, self.dimension)), np.zeros(shape)

    def gradient(self, error: Array, inputs: Array, target: Array) -> Array:
        inside = np.clip(error, -1, 1)
        return inside * inside * inside + inputs

    def excess_loss(self, error: Array) -> Array:
        size = np.abs(error)
        return np.where(size <= 1, size**4 / 4, size - 0.75).sum(axis=-1)


@dataclass(frozen=True)
class Errors:
    """Means over the chains at one step; each of shape (schedules, averages)."""

    squared_error: Array
    excess_loss: Array


def follow(
    world: Stream,
    step_sizes: Array,
    averages: Sequence[Average],
    record_at: Sequence[int],
    chains: int,
    rng: np.random.Generator,
    proceed: Callable[[int], None] = lambda step: None,
) -> dict[int, Errors]:
    """Run SGD from e(0) = 1 in every coordinate and follow averages of its iterates.

    Args:
        world: the problem.
        step_sizes: γ(1)…γ(T) of each schedule, shape (schedules, T).
        averages: the averages to follow.
        record_at: steps in 1…T at which errors are kept.
        chains: independent chains; each feeds all schedules with the same samples.
        rng: source of the samples.
        proceed: called now and then with the number of steps done; it may raise to stop.
    """
    schedules, steps = step_sizes.shape
    error = np.ones((schedules, chains, world.dimension))
    running = np.ones((len(averages), *error.shape))
    wanted, recorded = set(record_at), {}
    for begin in range(0, steps, _BLOCK):
        proceed(begin)
        end = min(begin + _BLOCK, steps)
        inputs, targets = world.draw(rng, (end - begin, chains))
        weights = weights_table(averages, begin + 1, end + 1)[..., None, None, None]
        rates = step_sizes.T[begin:end, :, None, None]
        for i in range(end - begin):
            error -= rates[i] * world.gradient(error, inputs[i], targets[i])
            running += weights[i] * (error - running)
            if begin + i + 1 in wanted:
                excess = world.excess_loss(running).mean(axis=-1).T
                recorded[begin + i + 1] = Errors((running**2).sum(axis=-1).mean(axis=-1).T, excess)
    return recorded
