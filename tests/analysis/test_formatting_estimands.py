"""Every estimand has a unit in which it is read: percent, signed or not, or a plain number."""

from __future__ import annotations

import pytest

from analysis.formatting import ENGLISH, format_estimate, format_region
from experiments.harness.claims import (
    Interaction,
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
        (Rate("detected"), "25.00%", "≥\u00a010%"),
        (Proportion("hits", "tries"), "25.00%", "≥\u00a010%"),
    ],
)
def test_estimates_and_regions_share_a_unit(estimand, estimate, region):
    assert format_estimate(estimand, 0.25, ENGLISH) == estimate
    assert format_region(estimand, Region(low=0.1), ENGLISH) == region
