"""Verdicts: where the interval of an estimate lies relative to the region in which the claim is true.

Serves every section of THEORY.md. One rule for all claims: the interval entirely inside the region confirms, entirely
outside refutes, across an edge is insufficient. With a planned trial missing or failed, or without an estimate, a
claim is at most insufficient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.estimands import CannotEstimate, per_seed_values, select
from analysis.load import Campaign
from analysis.statistics import (
    MAX_SEEDS,
    Estimate,
    bonferroni,
    exact_range,
    mean_interval,
    nearest_edge,
    seeds_needed,
    sign_flip_p,
)
from experiments.harness.claims import Claim, Region, is_exact
from experiments.harness.record import TrialRecord

Outcome = Literal["confirmed", "refuted", "insufficient"]

NOT_MEASURED = "not measured at this scale"


@dataclass(frozen=True)
class Verdict:
    """What one campaign says about one claim; a quantity that does not exist is None."""

    claim: Claim
    outcome: Outcome
    estimate: float | None
    interval: tuple[float, float] | None
    """Simultaneous over the claims of the experiment; for an exact estimand the range over trials."""
    n_ok: int
    """Trials that succeeded."""
    n_planned: int
    """Trials in the plan."""
    scope: str
    registered: bool
    """Whether every trial ran committed code that holds the claim as it stands today: else it is exploratory."""
    simultaneous_alpha: float | None
    """Error rate of this interval; None for an interval without a confidence level."""
    p_sign_flip: float | None
    """Sign-flip test of the region's edge nearest to the estimate, not adjusted for multiplicity."""
    seeds_needed: int | None
    """Seeds in all that would decide an interval that lies across an edge; None also where 200 would not."""
    reason: str


@dataclass(frozen=True)
class _Finding:
    """The estimate of one claim, before the completeness of the campaign is considered."""

    outcome: Outcome
    reason: str
    estimate: Estimate | None = None
    p_sign_flip: float | None = None
    seeds_needed: int | None = None


def judge_campaign(claims: Sequence[Claim], campaign: Campaign) -> list[Verdict]:
    """Judge every claim of an experiment on one campaign.

    The intervals are simultaneous (Bonferroni) over all claims that have sampling error, whether or not they could be
    estimated, so that an interval does not depend on the fate of the other claims.

    Args:
        claims: all claims of the experiment, in the order of its file.
        campaign: the trials to judge them on.

    Returns:
        One verdict per claim, in the order of ``claims``.

    Raises:
        ValueError: if the campaign is a smoke run.
    """
    if not campaign.is_evidence:
        raise ValueError(
            f"smoke is not evidence, got campaign {campaign.campaign_id} of {campaign.experiment} at scale "
            f"{campaign.scale!r}; judge a campaign of another scale"
        )
    n_sampled = sum(not is_exact(claim.estimand) for claim in claims)
    return [_judge(claim, campaign, n_sampled) for claim in claims]


def _judge(claim: Claim, campaign: Campaign, n_sampled: int) -> Verdict:
    alpha = None if is_exact(claim.estimand) else bonferroni(claim.alpha, n_sampled)
    finding = _find(claim, campaign, alpha)
    lack = _what_is_missing(campaign)
    estimate = finding.estimate
    return Verdict(
        claim=claim,
        outcome="insufficient" if lack else finding.outcome,
        estimate=None if estimate is None else estimate.value,
        interval=None if estimate is None else (estimate.low, estimate.high),
        n_ok=len(_ok_ids(campaign)),
        n_planned=campaign.n_planned,
        scope=campaign.scope_of(claim.estimand.where),
        registered=all(_registered(claim, record) for record in campaign.records),
        simultaneous_alpha=alpha,
        p_sign_flip=finding.p_sign_flip,
        seeds_needed=finding.seeds_needed,
        reason=f"{lack}; {finding.reason}" if lack else finding.reason,
    )


def _registered(claim: Claim, record: TrialRecord) -> bool:
    """The rule stood when the trial began, and it stood in a commit."""
    return record.claims.get(claim.id) == claim.digest and record.git_dirty is False


def _find(claim: Claim, campaign: Campaign, alpha: float | None) -> _Finding:
    """Estimate a claim from the trials that succeeded; ``alpha`` is None for a quantity without sampling error."""
    observations = campaign.observations
    if observations.empty:
        return _Finding("insufficient", "no trial yielded observations")
    try:
        if select(observations, claim.estimand.where).empty:
            return _Finding("insufficient", NOT_MEASURED)
        values = per_seed_values(claim.estimand, observations)
        estimate = exact_range(values) if alpha is None else mean_interval(values, alpha)
    except CannotEstimate as error:
        return _Finding("insufficient", str(error))
    outcome, reason = _place(estimate, claim.region)
    if alpha is None:
        return _Finding(outcome, reason, estimate)
    edge = nearest_edge(claim.region, estimate.value)
    p = None if edge is None else sign_flip_p(values, edge)
    if outcome != "insufficient":
        return _Finding(outcome, reason, estimate, p)
    needed = seeds_needed(values, claim.region, alpha)
    hint = f"not decided by {MAX_SEEDS} seeds" if needed is None else f"{needed} seeds would decide"
    return _Finding(outcome, f"{reason}: {hint} at the observed mean and spread", estimate, p, needed)


def _place(estimate: Estimate, region: Region) -> tuple[Outcome, str]:
    """The verdict rule; the region is closed, so an interval that touches its edge from within is inside."""
    if region.low <= estimate.low and estimate.high <= region.high:
        return "confirmed", "the interval lies inside the region"
    if estimate.high < region.low or region.high < estimate.low:
        return "refuted", "the interval lies outside the region"
    return "insufficient", "the interval crosses an edge of the region"


def _ok_ids(campaign: Campaign) -> frozenset[str]:
    return frozenset(record.trial_id for record in campaign.ok_records)


def _what_is_missing(campaign: Campaign) -> str:
    """``2 of 6 planned trials are missing or failed: crashed 1, no record 1``, or nothing."""
    ok = _ok_ids(campaign)
    lacking = campaign.planned - ok
    if not lacking:
        return ""
    fates = {r.trial_id: "manipulation check failed" if r.status == "ok" else r.status for r in campaign.records}
    counts = Counter(fates.get(trial_id, "no record") for trial_id in lacking)
    listed = ", ".join(f"{fate} {count}" for fate, count in sorted(counts.items()))
    return f"{len(lacking)} of {campaign.n_planned} planned trials are missing or failed: {listed}"
