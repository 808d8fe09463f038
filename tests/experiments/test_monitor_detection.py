"""The claims of ``monitor_detection``: what could not be confirmed says so."""

from __future__ import annotations

from pathlib import Path

from analysis.estimands import select
from analysis.load import load_campaigns
from experiments.monitor_detection import EXPERIMENT, SEPARATION

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = {claim.id: claim for claim in EXPERIMENT.claims}


def test_claims_that_no_monitor_could_meet_say_so():
    said = {id for id, claim in CLAIMS.items() if "подтвердиться не могло" in claim.condition}
    assert said == {"monitor-detects-at-once-high-lr", "monitor-layer-norm-separates-high-lr"}


def test_a_perfect_layer_norm_would_not_have_been_confirmed_either():
    """The mean of 1 / AUC of the global norm, which no layer norm can exceed, lies below the region."""
    (campaign,) = [c for c in load_campaigns(ROOT / "results", EXPERIMENT.name)[0] if c.version == 1]
    where = {"metric": SEPARATION.name, "fault": "high_lr", "arm": "global_norm"}
    best = (1 / select(campaign.observations, where)["value"]).mean()
    assert 1 < best < CLAIMS["monitor-layer-norm-separates-high-lr"].region.low
