"""Tidy observations by hand, and what an estimand makes of them."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.statistics import CannotEstimate, per_seed_values


def row(value, seed=0, step=100, metric="eval_loss", trial=None, **conditions):
    trial_id = f"trial-{seed}" if trial is None else trial
    return {"trial_id": trial_id, "seed": seed, "metric": metric, "value": value, "step": step, **conditions}


def estimate(estimand, rows):
    return per_seed_values(estimand, pd.DataFrame(rows)).to_dict()


def refusal(estimand, rows):
    with pytest.raises(CannotEstimate) as caught:
        per_seed_values(estimand, pd.DataFrame(rows))
    return str(caught.value)
