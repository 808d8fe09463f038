"""Every estimand has a unit in which it is read: percent, signed or not, a factor, or a plain number."""

from __future__ import annotations

import math

import pytest

from analysis.formatting import ENGLISH, RUSSIAN, format_estimate, format_interval, format_region
from experiments.harness.claims import (
    ArgBestShift,
    Difference,
    Exact,
    Interaction,
    LogLogSlope,
    Proportion,
    Rate,
    Ratio,
    Region,
    RelativeReduction,
    SelectedReduction,
)

EMA, RAW = {"arm": "ema"}, {"arm": "raw"}
REDUCTION = RelativeReduction("eval_loss", EMA, RAW)


@pytest.mark.parametrize(
    ("estimand", "estimate", "region"),
    [
        (SelectedReduction("eval_loss", (EMA,), (RAW,)), "+25.00%", "≥\u00a010%"),
        (Interaction(REDUCTION, {"data": "small"}, {"data": "large"}), "+25.00%", "≥\u00a010%"),
        (Ratio("seconds", EMA, RAW), "0.250", "≥\u00a00.1"),
        (Difference("accuracy", EMA, RAW), "+0.250", "≥\u00a00.1"),
        (Rate("detected"), "25.00%", "≥\u00a010%"),
        (Proportion("hits", "tries"), "25.00%", "≥\u00a010%"),
    ],
)
def test_estimates_and_regions_share_a_unit(estimand, estimate, region):
    assert format_estimate(estimand, 0.25, ENGLISH) == estimate
    assert format_region(estimand, Region(low=0.1), ENGLISH) == region


SHIFT, SLOPE = ArgBestShift("eval_loss", "learning_rate", RAW, EMA), LogLogSlope("mse", EMA)


@pytest.mark.parametrize("estimand", [SHIFT, Exact(SHIFT)])
def test_a_shift_of_a_logarithm_is_read_as_a_factor(estimand):
    assert format_estimate(estimand, math.log10(3), RUSSIAN) == "×\u00a03,00"
    assert format_interval(estimand, (-1.0, 2.0), ENGLISH) == "[×\u00a00.10; ×\u00a0100.00]"
    assert format_region(estimand, Region(low=math.log10(3)), RUSSIAN) == "≥\u00a0×\u00a03"
    assert format_region(estimand, Region(low=0.0), RUSSIAN) == "≥\u00a0×\u00a01"


def test_a_slope_is_an_exponent_and_no_factor():
    assert format_estimate(SLOPE, -0.5, ENGLISH) == "−0.500"
    assert format_region(SLOPE, Region(-1.1, -0.9), ENGLISH) == "[−1.1; −0.9]"


@pytest.mark.parametrize(
    ("estimand", "region", "text"),
    [
        (Ratio("rate", EMA, RAW), Region(1 / 3, 3.0), "[0.3333; 3]"),
        (REDUCTION, Region(-5 / 12, -7 / 24), "[−41.67%; −29.17%]"),
        (REDUCTION, Region(high=0.29), "≤\u00a029%"),
        (Ratio("error", EMA, RAW), Region(high=1e-5), "≤\u00a01e-05"),
    ],
)
def test_a_bound_has_four_significant_digits(estimand, region, text):
    assert format_region(estimand, region, ENGLISH) == text
