"""Stochastic quadratics, whose second moments under SGD are propagated exactly: no Monte-Carlo error.

L(θ) = ½ Σ λᵢ eᵢ², e = θ − θ*, with gradient noise of variance sᵢ in direction i, independent of e and of the past. So
E eᵢ, E eᵢ², E aᵢeᵢ and E aᵢ² of any linear average a obey a closed recursion, one per direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.worlds.averaging import Array, Average, weights_table

_BLOCK = 10_000
"""Steps between two looks at whether to stop."""


@dataclass(frozen=True)
class Quadratic:
    """A strongly convex stochastic quadratic in its eigenbasis."""

    curvature: Array
    """Eigenvalues λ of the Hessian, shape (directions,)."""
    noise: Array
    """Variance of the gradient noise in each direction, shape (directions,)."""
    distance: float = 1.0
    """|θ(0) − θ*| in each direction."""

    @property
    def cramer_rao(self) -> float:
        """t times the least variance that an estimate of θ* from t noisy gradients can have: tr(H⁻¹ S H⁻¹)."""
        return float(np.sum(self.noise / self.curvature**2))


def quadratic(condition_number: float, noise: str, directions: int = 20) -> Quadratic:
    """Eigenvalues spread evenly in the logarithm over [1/κ, 1]; noise of unit variance, or shaped like the Hessian.

    Raises:
        ValueError: for another noise than ``isotropic`` and ``hessian``.
    """
    curvature = np.logspace(-np.log10(condition_number), 0, directions)
    shapes = {"isotropic": np.ones(directions), "hessian": curvature}
    if noise not in shapes:
        raise ValueError(f"noise must be isotropic or hessian, got {noise!r}")
    return Quadratic(curvature, shapes[noise])


@dataclass(frozen=True)
class Moments:
    """Expectations of every average at one step; each of shape (step sizes, averages)."""

    squared_error: Array
    """E‖a − θ*‖²."""
    bias_squared: Array
    """‖E a − θ*‖²."""
    excess_loss: Array
    """E L(a) − L(θ*)."""

    @property
    def variance(self) -> Array:
        """E‖a − E a‖²."""
        return self.squared_error - self.bias_squared


def propagate(
    world: Quadratic,
    step_sizes: Array,
    averages: Sequence[Average],
    record_at: Sequence[int],
    proceed: Callable[[int], None] = lambda step: None,
) -> dict[int, Moments]:
    """Exact moments of the averages along SGD: e(t) = (1 − γ λ) e(t−1) − γ ξ, a(0) = e(0).

    Args:
        world: the quadratic.
        step_sizes: γ(1)…γ(T) of each schedule, shape (schedules, T).
        averages: the averages to follow.
        record_at: steps in 1…T at which moments are kept.
        proceed: called now and then with the number of steps done; it may raise to stop.
    """
    rate, noise = step_sizes.T[..., None], world.noise  # (T, schedules, 1), (directions,)
    shape = (step_sizes.shape[0], world.curvature.size)
    mean, square = np.full(shape, world.distance), np.full(shape, world.distance**2)
    bias = np.full((*shape, len(averages)), world.distance)
    cross, second = bias**2, bias**2
    wanted, recorded = set(record_at), {}
    for begin in range(0, step_sizes.shape[1], _BLOCK):
        proceed(begin)
        end = min(begin + _BLOCK, step_sizes.shape[1])
        for t, weight in enumerate(weights_table(averages, begin + 1, end + 1), start=begin + 1):
            gamma = rate[t - 1]
            shrink = 1 - gamma * world.curvature
            mean *= shrink
            square = shrink**2 * square + gamma**2 * noise
            keep = 1 - weight
            cross *= shrink[..., None]  # E a(t−1) e(t)
            second = keep**2 * second + (2 * weight * keep) * cross + weight**2 * square[..., None]
            cross = keep * cross + weight * square[..., None]
            bias = keep * bias + weight * mean[..., None]
            if t in wanted:
                excess = 0.5 * np.einsum("d,sdk->sk", world.curvature, second)
                recorded[t] = Moments(second.sum(axis=1), (bias**2).sum(axis=1), excess)
    return recorded
