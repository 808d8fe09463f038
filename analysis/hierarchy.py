"""Two sources of variation, kept apart: training seeds and test items.

Serves every section of THEORY.md whose trials recorded the outcome of each test item. A verdict's interval covers the
variation between training seeds on the one test set that was used; here stands, beside it, how far other items of the
same kind would move the estimate, and both together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from analysis.estimands import per_seed_values
from analysis.load import Campaign
from analysis.rows import CannotEstimate, select
from analysis.statistics import Estimate
from experiments.harness.claims import RelativeReduction, Selector

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TwoWay:
    """Intervals of a mean over seeds and items, and the standard deviations that make them."""

    over_seeds: Estimate
    """Other seeds, the same items: the paired-t interval."""
    over_items: Estimate
    """Other items, the same seeds."""
    over_both: Estimate
    """Other seeds and other items."""
    sd_seeds: float
    """Standard deviation of the true values of seeds; 0 where the estimate of its square is negative."""
    sd_items: float
    """The same of items."""
    sd_rest: float
    """Standard deviation of what is left: the interaction of seed and item, and noise."""


def two_way(values: Array, alpha: float) -> TwoWay:
    """Intervals of the mean of a complete seeds × items table under crossed random effects.

    The mean squares of seeds, of items and of the rest (analysis of variance, one value per cell) give
    ``Var(mean) = (MS_seeds + MS_items − MS_rest) / (S I)`` over both (Cornfield & Tukey 1956); its degrees of freedom
    are Satterthwaite's (1946). Assumes that seeds and items are drawn independently and effects are about normal.

    Args:
        values: shape (seeds S, items I), at least 2 × 2.
        alpha: error rate of each interval.

    Raises:
        CannotEstimate: if the table is too small or not finite, or nothing varies.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise CannotEstimate(f"two sources of variation need at least 2 seeds and 2 items, got shape {table.shape}")
    if not np.isfinite(table).all():
        raise CannotEstimate(
            "values of seeds and items must be finite, got NaN or infinity; record such trials as diverged"
        )
    n_seeds, n_items = table.shape
    mean, of_seeds, of_items = table.mean(), table.mean(axis=1), table.mean(axis=0)
    rest = table - of_seeds[:, None] - of_items + mean
    df_seeds, df_items, df_rest = n_seeds - 1, n_items - 1, (n_seeds - 1) * (n_items - 1)
    ms_seeds = n_items * float(((of_seeds - mean) ** 2).sum()) / df_seeds
    ms_items = n_seeds * float(((of_items - mean) ** 2).sum()) / df_items
    ms_rest = float((rest**2).sum()) / df_rest
    # Negative where the rest is larger than both; the larger single source is then the honest lower limit.
    ms_both = max(ms_seeds + ms_items - ms_rest, ms_seeds, ms_items)
    if not ms_both > 0:
        raise CannotEstimate(f"all {table.size} values are {mean:g}: no variance to estimate an interval from")
    df_both = ms_both**2 / (ms_seeds**2 / df_seeds + ms_items**2 / df_items + ms_rest**2 / df_rest)

    def interval(mean_square: float, df: float, n: int) -> Estimate:
        half = float(stats.t.ppf(1 - alpha / 2, df)) * math.sqrt(mean_square / table.size)
        return Estimate(float(mean), float(mean) - half, float(mean) + half, n, math.sqrt(mean_square * n / table.size))

    return TwoWay(
        over_seeds=interval(ms_seeds, df_seeds, n_seeds),
        over_items=interval(ms_items, df_items, n_items),
        over_both=interval(ms_both, max(1.0, df_both), min(n_seeds, n_items)),
        sd_seeds=math.sqrt(max(0.0, ms_seeds - ms_rest) / n_items),
        sd_items=math.sqrt(max(0.0, ms_items - ms_rest) / n_seeds),
        sd_rest=math.sqrt(ms_rest),
    )


def seeds_and_items(estimand: RelativeReduction, campaign: Campaign, alpha: float) -> TwoWay:
    """The relative reduction with seeds and test items as two sources of variation.

    The reduction of a seed is ``r = 1 − T / C``, with T and C the losses of treatment and control: means over items
    weighted by their tokens where the metric is per token, else alike. It is linear in the items to first order, so
    that item i stands for ``r + I w_i ((1 − r) c_i − t_i) / C``, whose mean over items is r exactly (delta method for a
    ratio).

    Raises:
        CannotEstimate: if the reduction cannot be estimated, items are missing in some seed or arm, or the items do not
            add up to the reduction that the observations give, as when they belong to another split.
    """
    reductions = per_seed_values(estimand, campaign.observations)
    examples = campaign.examples
    examples = examples[examples["metric"] == estimand.metric]
    t, c = (_items(examples, {**estimand.where, **arm}) for arm in (estimand.treatment, estimand.control))
    if not (t["value"].index.equals(c["value"].index) and t["value"].columns.equals(c["value"].columns)):
        raise CannotEstimate("items are paired within seed, but treatment and control differ in seeds or items")
    tokens = c["tokens"].to_numpy(dtype=np.float64)
    size = tokens if _is_per_token(estimand, campaign) else np.ones(tokens.shape)
    weights = size / size.sum(axis=1, keepdims=True)
    treated, raw = (side["value"].to_numpy(dtype=np.float64) for side in (t, c))
    total = (weights * raw).sum(axis=1, keepdims=True)
    reduction = 1 - (weights * treated).sum(axis=1, keepdims=True) / total
    if list(t["value"].index) != list(reductions.index) or not np.allclose(reduction[:, 0], reductions, atol=1e-6):
        raise CannotEstimate(
            "the items must add up to the reduction of each seed, but they do not: they were recorded in the final "
            "evaluation, on the test split; ask for a claim about that split"
        )
    n_items = raw.shape[1]
    return two_way(reduction + n_items * weights * ((1 - reduction) * raw - treated) / total, alpha)


def _is_per_token(estimand: RelativeReduction, campaign: Campaign) -> bool:
    rows = select(campaign.observations, {**estimand.where, "metric": estimand.metric})
    return bool(rows["unit"].str.endswith("/token").any())


def _items(examples: pd.DataFrame, selector: Selector) -> dict[str, pd.DataFrame]:
    """Value and tokens by seed and item of one arm; conditions that items do not carry (the split) are left out."""
    rows = examples
    for name, level in selector.items():
        if name in rows.columns:
            rows = rows[rows[name] == level]
    if rows.empty or rows.duplicated(["seed", "example"]).any():
        found = "none" if rows.empty else "several of one seed"
        raise CannotEstimate(f"a seed needs one outcome per item, got {found} for {dict(selector)}; narrow the claim")
    tables = {name: rows.pivot(index="seed", columns="example", values=name) for name in ("value", "tokens")}
    if tables["value"].isna().to_numpy().any():
        raise CannotEstimate(f"every seed needs the same items, but some are missing for {dict(selector)}; run them")
    return tables
