"""The shift of a best level against cases worked by hand, and its refusals."""

from __future__ import annotations

import math

import pytest

from experiments.harness.claims import ArgBestShift, Exact
from tests.analysis.tidy_rows import estimate, refusal, row

SHIFT = ArgBestShift("eval_loss", along="horizon", start={"phase": "early"}, end={"phase": "late"})


def grid(phase, values, levels=(1.0, 10.0, 100.0, 1000.0), seed=0):
    """Rows at the last step, and at an earlier one that ranks the levels backwards."""
    return [
        row(measured, seed=seed, phase=phase, horizon=level, step=step)
        for level, value in zip(levels, values, strict=True)
        for step, measured in ((50, 100 - value), (100, value))
    ]


def test_arg_best_shift_interpolates_the_best_level():
    # early: (x - 0.75)² at x = 0, 1, 2, 3 → minimum at x = 0.75 (grid point 1)
    # late:  (x - 2.25)² at the same points → 2.25 (grid point 2); shift 1.5 decades
    early = [(x - 0.75) ** 2 for x in range(4)]
    late = [(x - 2.25) ** 2 for x in range(4)]
    assert estimate(SHIFT, grid("early", early) + grid("late", late)) == pytest.approx({0: 1.5})


def test_arg_best_shift_on_an_uneven_grid():
    # levels 1, 10, 1000 → x = 0, 1, 3; (x - 1.25)² = 1.5625, 0.0625, 3.0625 → 1.25. Start at the edge: x = 0.
    levels = (1.0, 10.0, 1000.0)
    rows = grid("early", [1.0, 2.0, 3.0], levels) + grid("late", [1.5625, 0.0625, 3.0625], levels)
    assert estimate(SHIFT, rows) == pytest.approx({0: 1.25})


def test_arg_best_shift_keeps_the_grid_point_at_the_edges_and_on_a_plateau():
    rows = [
        *grid("early", [1.0, 2.0, 3.0, 4.0]),  # lower edge: x = 0
        *grid("late", [4.0, 3.0, 2.0, 1.0]),  # upper edge: x = 3
        *grid("early", [3.0, 1.0, 2.0, 1.5], seed=1),  # (0, 3), (1, 1), (2, 2): 1 + (2 - 1) / (2 · 3) = 7/6
        *grid("late", [5.0, 5.0, 5.0, 5.0], seed=1),  # all equal: the first, x = 0
        *grid("early", [1.0, 2.0, 3.0, 4.0], seed=2),
        *grid("late", [3.0, 1.0, 1.0, 1.0], seed=2),  # the first of equals, (1, 1), between (0, 3) and (2, 1): 1.5
    ]
    assert estimate(SHIFT, rows) == pytest.approx({0: 3.0, 1: -7 / 6, 2: 1.5})


def test_arg_best_shift_ignores_rows_without_a_level():
    rows = grid("early", [1.0, 2.0, 3.0, 4.0]) + grid("late", [4.0, 3.0, 2.0, 1.0])
    rows += [row(-5.0, phase="early", arm="raw"), row(-5.0, phase="late", arm="raw", horizon=None)]
    assert estimate(SHIFT, rows) == pytest.approx({0: 3.0})


def test_the_levels_of_an_arg_best_shift():
    rows = grid("early", [1.0, 2.0, 3.0, 4.0]) + grid("late", [4.0, 3.0, 2.0, 1.0])
    unknown = ArgBestShift("eval_loss", along="horizn", start={"phase": "early"}, end={"phase": "late"})
    assert "unknown column 'horizn'; did you mean horizon?" in refusal(unknown, rows)
    single = grid("early", [1.0], levels=(10.0,)) + grid("late", [1.0], levels=(10.0,))
    assert "at least 2 levels of horizon, got only 10 for start {phase=early}" in refusal(SHIFT, single)
    negative = grid("early", [1.0, 2.0], levels=(0.0, 10.0)) + grid("late", [1.0, 2.0], levels=(0.0, 10.0))
    assert "levels of horizon must be positive numbers, got 0.0, 10.0" in refusal(SHIFT, negative)
    words = grid("early", [1.0, 2.0], levels=("long", "short")) + grid("late", [1.0, 2.0], levels=("long", "short"))
    assert "levels of horizon must be positive numbers, got long, short" in refusal(SHIFT, words)
    uneven = [
        *rows,
        *grid("early", [1.0, 2.0], levels=(1.0, 10.0), seed=1),
        *grid("late", [4.0, 3.0, 2.0, 1.0], seed=1),
    ]
    assert "start {phase=early} lacks horizon 100, 1000 in seed 1" in refusal(SHIFT, uneven)


def test_a_best_level_at_the_upper_end_in_both_conditions_is_refused():
    """As where the longest average is best at every length: how much longer would be better still is not seen."""
    rows = [
        row(1 / horizon, horizon=horizon, phase=phase) for phase in ("early", "late") for horizon in (1.0, 10.0, 100.0)
    ]
    assert "inside the grid in one condition at least, got the upper ends, 100 and 100, in both" in refusal(SHIFT, rows)


def test_the_upper_end_is_that_of_each_condition():
    """As where one model has fewer layers to freeze than the other."""
    rows = grid("early", (4, 3, 2, 1)) + grid("late", (3, 2, 1), levels=(1.0, 10.0, 60.0))
    assert "got the upper ends, 1000 and 60, in both: the shift is not seen" in refusal(SHIFT, rows)
    one_inside = grid("early", (4, 3, 2, 1)) + grid("late", (1, 2, 3), levels=(1.0, 10.0, 60.0))
    assert estimate(SHIFT, one_inside) == pytest.approx({0: -3.0})


def test_the_lowest_level_as_the_best_everywhere_is_named_as_the_finding():
    lowest = [r for seed in (0, 1) for r in grid("early", (1, 2, 3, 4), seed=seed)]
    rows = lowest + [r for seed in (0, 1) for r in grid("late", (1, 2, 3), levels=(2.0, 10.0, 60.0), seed=seed)]
    message = refusal(SHIFT, rows)
    assert "got the lowest, 1 and 2, in both conditions and all 2 seeds" in message
    assert "that the lowest level is best is the finding" in message
    in_one_seed = lowest + grid("late", (1, 2, 3, 4)) + grid("late", (4, 3, 2, 1), seed=1)
    assert estimate(SHIFT, in_one_seed) == pytest.approx({0: 0.0, 1: 3.0})
    alone = [r for r in rows if r["seed"] == 0]
    assert estimate(Exact(SHIFT), alone) == pytest.approx({"trial-0": math.log10(2)})
