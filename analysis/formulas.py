"""The formula of each estimand on aligned arrays: what a value is, apart from how its rows are found.

Serves every section of THEORY.md. ``analysis.estimands`` finds the rows of a claim and applies these formulas seed by
seed; ``experiments.verdict_calibration`` applies the same ones to ten thousand simulated experiments at once. The last
axis is the one that a formula reduces; all others are kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def relative_reduction(treatment: Array, control: Array) -> Array:
    """``(control − treatment) / control``."""
    return np.asarray((control - treatment) / control)


def regret(choice: Array, rivals: Array) -> Array:
    """``choice / min(rivals) − 1``; rivals along the last axis."""
    return np.asarray(choice / rivals.min(axis=-1) - 1)


def value_of_chosen(chosen_on: Array, reported_on: Array) -> Array:
    """The value of ``reported_on`` where ``chosen_on`` is least (the first of equals), along the last axis."""
    best = chosen_on.argmin(axis=-1, keepdims=True)
    return np.take_along_axis(reported_on, best, axis=-1)[..., 0]


def best_abscissa(x: Array, y: Array) -> Array:
    """Abscissa of the minimum: the vertex through the best point and its neighbours, or the point itself at the edge.

    ``argmin`` takes the first of equal values, so the left neighbour of an inner best point is strictly higher: the
    parabola is convex, and its vertex lies within half a grid step of that point.

    Args:
        x: abscissae in rising order, shape (k,).
        y: values, shape (…, k).
    """
    best = y.argmin(axis=-1)
    inner = (best > 0) & (best < len(x) - 1)
    if not inner.any():
        return np.asarray(x[best])
    i = np.where(inner, best, 1)
    at = np.take_along_axis(y, i[..., None] + np.array([-1, 0, 1]), axis=-1)
    left, right = x[i] - x[i - 1], x[i + 1] - x[i]
    rise_left, rise_right = at[..., 0] - at[..., 1], at[..., 2] - at[..., 1]
    numerator = right**2 * rise_left - left**2 * rise_right
    curvature = np.where(inner, left * rise_right + right * rise_left, 1.0)
    return np.asarray(np.where(inner, x[i] + numerator / (2 * curvature), x[best]))


def slope(x: Array, y: Array) -> Array:
    """Slope of the least-squares line of ``y``, shape (…, k), over ``x``, shape (k,)."""
    coefficients = np.polynomial.polynomial.polyfit(x, y.reshape(-1, y.shape[-1]).T, deg=1)
    return np.asarray(coefficients[1].reshape(y.shape[:-1]))
