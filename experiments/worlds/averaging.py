"""Step sizes of SGD and averages of its iterates, as plain arrays.

Every average here is linear: a(t) = (1 − w(t)) · a(t−1) + w(t) · θ(t). So one row of weights w(t) says all of it, and
the worlds follow many averages along one trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def constant_steps(first: float, steps: int) -> Array:
    """γ(t) = γ₀; shape (steps,)."""
    return np.full(steps, first)


def power_steps(first: float, steps: int, exponent: float, offset: float) -> Array:
    """γ(t) = γ₀ (1 + t / t₀)^−α for t = 0…steps − 1, shape (steps,).

    Without the offset the first steps are so short compared with the later ones that t^-¾ has not reached its
    asymptotic rate after a million of them.
    """
    return first * (1 + np.arange(steps) / offset) ** -exponent


def cosine_steps(first: float, steps: int) -> Array:
    """γ(t) = γ₀ (1 + cos(π t / T)) / 2 for t = 0…T − 1, shape (steps,); the last is almost nought."""
    return first * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))


@dataclass(frozen=True)
class Average:
    """A running average of the iterates."""

    name: str
    weight: Callable[[int], float]
    """w(t) for t = 1, 2, …"""
    horizon_steps: float | None = None
    """Mean age of the weights in it, 1 / (1 − β), where it is constant."""


def last_iterate() -> Average:
    """θ(t) itself."""
    return Average("last", lambda t: 1.0, horizon_steps=1.0)


def uniform() -> Average:
    """Mean of θ(1)…θ(t) (Polyak & Juditsky 1992; Ruppert 1988)."""
    return Average("uniform", lambda t: 1 / t)


def ema(decay: float, *, name: str | None = None, bias_corrected: bool = False) -> Average:
    """Exponential moving average: w = 1 − β, or (1 − β) / (1 − β^t) where it starts from nothing instead of θ(0)."""
    name, log_decay = name or f"ema_{decay:g}", math.log(decay)

    def corrected(t: int) -> float:
        return math.expm1(log_decay) / math.expm1(t * log_decay)

    return Average(name, corrected if bias_corrected else lambda t: 1 - decay, 1 / (1 - decay))


def ema_of_a_tenth() -> Average:
    """EMA whose half-life is always a tenth of the steps so far: β(t) = 0.5^(10 / t)."""
    return Average("ema_tenth", lambda t: -math.expm1(-10 * math.log(2) / t))


def second_halves(record_at: Sequence[int]) -> list[Average]:
    """Suffix averages: for each T the mean of θ(T/2 + 1)…θ(T), in as few running averages as can hold them.

    The average in charge of T is named ``suffix@T``; one that is done with its T takes over the next free one, so that
    a name lists all of them: ``suffix@100@1000``.
    """
    slots: list[list[tuple[int, int]]] = []
    for end in sorted(record_at):
        start = end // 2
        free = next((slot for slot in slots if slot[-1][1] <= start), None)
        if free is None:
            slots.append([(start, end)])
        else:
            free.append((start, end))
    return [Average("suffix" + "".join(f"@{end}" for _, end in slot), _suffix_weight(slot)) for slot in slots]


def _suffix_weight(spans: list[tuple[int, int]]) -> Callable[[int], float]:
    def weight(t: int) -> float:
        return next((1 / (t - start) for start, end in spans if start < t <= end), 0.0)

    return weight


def weights_table(averages: Sequence[Average], start: int, stop: int) -> Array:
    """w(t) of every average for t = start…stop − 1, shape (stop − start, averages)."""
    return np.array([[average.weight(t) for average in averages] for t in range(start, stop)])
