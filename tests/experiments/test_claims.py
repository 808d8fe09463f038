"""A claim's digest covers all that the verdict depends on, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest

from experiments.ema_ablation import EXPERIMENT
from experiments.harness.claims import ArgBestShift, Claim, Exact, Region, Regret, RelativeReduction

CLAIM = Claim(
    "a-claim",
    "Так говорят",
    "ema",
    "seed 003",
    RelativeReduction("eval_loss", {"arm": "ema_0.99"}, {"arm": "raw"}, {"track": "main"}),
    Region(low=0.01),
)


def changed(**fields):
    return dataclasses.replace(CLAIM, **fields).digest


def test_the_digest_is_that_of_the_registered_rule():
    """A frozen value: evidence on disk stays registered only while it does not move."""
    assert CLAIM.digest == "69828f44c7974bfe"


def test_the_digest_ignores_wording_and_place():
    assert changed(id="other", statement="Иначе", section="freezing", source="elsewhere") == CLAIM.digest


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 0.1},
        {"region": Region(low=0.02)},
        {"region": Region(low=0.01, high=1.0)},
        {"estimand": RelativeReduction("perplexity", {"arm": "ema_0.99"}, {"arm": "raw"}, {"track": "main"})},
        {"estimand": RelativeReduction("eval_loss", {"arm": "ema_0.999"}, {"arm": "raw"}, {"track": "main"})},
        {"estimand": RelativeReduction("eval_loss", {"arm": "ema_0.99"}, {"arm": "initial"}, {"track": "main"})},
        {"estimand": RelativeReduction("eval_loss", {"arm": "ema_0.99"}, {"arm": "raw"}, {"track": "length"})},
        {"estimand": Regret("eval_loss", {"arm": "ema_0.99"}, ({"arm": "raw"},), {"track": "main"})},
        {"estimand": Exact(CLAIM.estimand)},
    ],
)
def test_the_digest_covers_estimand_region_and_alpha(fields):
    assert changed(**fields) != CLAIM.digest


def test_the_digest_covers_what_an_exact_estimand_is_of():
    arms = {"start": {"arm": "a"}, "end": {"arm": "b"}}
    shift, regret = ArgBestShift("m", "along", **arms), Regret("m", {"arm": "a"}, ({"arm": "b"},))
    assert changed(estimand=Exact(shift)) != changed(estimand=Exact(regret))


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, math.nan])
def test_alpha_is_a_probability(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got"):
        dataclasses.replace(CLAIM, alpha=alpha)


@pytest.mark.parametrize("name", ["", "Upper", "with space", "под-ключ", "under_score"])
def test_ids_are_plain(name):
    with pytest.raises(ValueError, match="a claim id is lower-case"):
        dataclasses.replace(CLAIM, id=name)


@pytest.mark.parametrize(("low", "high"), [(1, 0), (math.nan, 1), (0, math.nan)])
def test_a_region_is_an_interval(low, high):
    with pytest.raises(ValueError, match="a region needs low <= high"):
        Region(low, high)


def test_an_experiment_refuses_a_claim_id_twice():
    first = EXPERIMENT.claims[0]
    with pytest.raises(ValueError, match=f"claim ids must be unique, repeated in ema_ablation: {first.id}"):
        dataclasses.replace(EXPERIMENT, claims=(*EXPERIMENT.claims, first))
