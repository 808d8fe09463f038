"""The worlds against closed forms, brute force and each other."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.worlds.averaging import (
    constant_steps,
    cosine_steps,
    ema,
    ema_of_a_tenth,
    last_iterate,
    power_steps,
    second_halves,
    uniform,
)
from experiments.worlds.chains import LeastSquares, Logistic, Quartic, follow
from experiments.worlds.quadratic import Quadratic, propagate, quadratic

ONE = Quadratic(curvature=np.array([0.5]), noise=np.array([2.0]), distance=3.0)


def running(average, path):
    """The average along a path θ(0), θ(1), …, by its weights."""
    value = path[0]
    for t, point in enumerate(path[1:], start=1):
        weight = average.weight(t)
        value = (1 - weight) * value + weight * point
    return value


def test_averages_of_a_path_are_what_their_names_say():
    path = np.random.default_rng(0).normal(size=41)
    assert running(last_iterate(), path) == path[-1]
    assert running(uniform(), path) == pytest.approx(path[1:].mean())
    decay, age = 0.9, np.arange(40)[::-1]
    from_start = 0.9**40 * path[0] + 0.1 * (decay**age @ path[1:])
    assert running(ema(decay), path) == pytest.approx(from_start)
    assert running(ema(decay, bias_corrected=True), path) == pytest.approx(np.average(path[1:], weights=decay**age))
    slots = {end: slot for slot in second_halves([10, 15, 40]) for end in map(int, slot.name.split("@")[1:])}
    for end in (10, 15, 40):
        assert running(slots[end], path[: end + 1]) == pytest.approx(path[end // 2 + 1 : end + 1].mean())


def test_the_half_life_of_a_tenth_is_a_tenth():
    average = ema_of_a_tenth()
    kept = np.prod([1 - average.weight(t) for t in range(1001, 1001 + 105)])
    assert kept == pytest.approx(0.5, abs=0.01)


def test_step_sizes():
    assert power_steps(0.5, 3, 1.0, 1.0) == pytest.approx([0.5, 0.25, 0.5 / 3])
    cosine = cosine_steps(0.5, 4)
    assert cosine == pytest.approx([0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.25 * (1 - 0.5**0.5)])
    assert constant_steps(0.1, 2).tolist() == [0.1, 0.1]


def test_exact_moments_of_the_last_iterate_and_its_uniform_average():
    """One direction, constant step: everything about it is a geometric sum."""
    gamma, steps = 0.4, 60
    at = propagate(ONE, constant_steps(gamma, steps)[None], [last_iterate(), uniform()], [steps])[steps]
    r = 1 - gamma * 0.5
    square = r ** (2 * steps) * 9 + gamma**2 * 2 * (1 - r ** (2 * steps)) / (1 - r**2)
    mean = 3 * r * (1 - r**steps) / (1 - r) / steps
    # e(k) holds the noise of step j with −γ r^(k−j); its sum over k = j…T is −γ (1 − r^(T−j+1)) / (1 − r)
    held = gamma * (1 - r ** np.arange(1, steps + 1)) / (1 - r)
    variance = 2 * (held**2).sum() / steps**2
    assert at.squared_error[0] == pytest.approx([square, mean**2 + variance])
    assert at.bias_squared[0] == pytest.approx([(3 * r**steps) ** 2, mean**2])
    assert at.variance[0, 1] == pytest.approx(variance)
    assert at.excess_loss[0] == pytest.approx(0.25 * at.squared_error[0])


def test_exact_moments_agree_with_simulated_chains():
    world = quadratic(10, "hessian", directions=3)
    step_sizes = np.stack([constant_steps(0.5, 80), power_steps(0.5, 80, 0.75, 10)])
    averages = [last_iterate(), uniform(), ema(0.9), ema(0.9, bias_corrected=True), *second_halves([30, 80])]
    exact = propagate(world, step_sizes, averages, [30, 80])

    class Diagonal(Quartic):
        def gradient(self, error, inputs, target):
            return world.curvature * error + np.sqrt(world.noise) * inputs

    chains = 20_000
    found = follow(Diagonal(dimension=3), step_sizes, averages, [30, 80], chains, np.random.default_rng(0))
    for step in (30, 80):
        assert found[step].squared_error == pytest.approx(exact[step].squared_error, rel=0.05)


def test_the_uniform_average_reaches_the_cramer_rao_bound():
    world = quadratic(10, "isotropic")
    steps = 20_000
    at = propagate(world, constant_steps(0.5, steps)[None], [uniform()], [steps])[steps]
    assert at.variance[0, 0] * steps == pytest.approx(world.cramer_rao, rel=0.01)


def test_noise_has_a_known_shape():
    with pytest.raises(ValueError, match="noise must be isotropic or hessian, got 'round'"):
        quadratic(10, "round")


@pytest.mark.parametrize("world", [LeastSquares(np.logspace(-1, 0, 4)), Logistic(dimension=4), Quartic(4)])
def test_gradients_vanish_on_average_at_the_optimum_and_losses_are_least_there(world):
    rng = np.random.default_rng(1)
    inputs, targets = world.draw(rng, (1, 200_000))
    error = np.zeros((1, 200_000, world.dimension))
    gradient = world.gradient(error, inputs[0], targets[0])[0]
    assert np.abs(gradient.mean(axis=0)).max() < 5 * gradient.std(axis=0).max() / np.sqrt(200_000)
    assert world.excess_loss(np.zeros((1, world.dimension))) == pytest.approx(0, abs=1e-12)
    assert (world.excess_loss(0.3 * rng.normal(size=(50, world.dimension))) > 0).all()


def test_curvature_of_logistic_regression_is_that_of_its_loss():
    """Least eigenvalue and Cramér–Rao bound against finite differences of the excess loss on a large sample."""
    world = Logistic(dimension=3, norm_of_optimum=1.5, test_inputs=400_000)
    h, eye = 1e-2, np.eye(3)
    points = np.array([[(eye[i] + s * eye[j]) * h for s in (1, -1)] for i in range(3) for j in range(3)])
    loss = world.excess_loss(points)
    hessian = ((loss[:, 0] - loss[:, 1]) / (2 * h**2)).reshape(3, 3)
    hessian = (hessian + hessian.T) / 2
    assert np.linalg.eigvalsh(hessian).min() == pytest.approx(world.strong_convexity, rel=0.02)
    assert np.trace(np.linalg.inv(hessian)) == pytest.approx(world.cramer_rao, rel=0.02)
