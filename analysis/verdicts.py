"""Verdicts: where the interval of an estimate lies relative to the region in which the claim is true.

Serves every section of THEORY.md. One rule for all claims: the interval entirely inside the region confirms, entirely
outside refutes, across an edge is insufficient. With a planned trial missing or failed, without an estimate, or with
fewer seeds than the calibration asks for (``MIN_SEEDS``), a claim is at most insufficient.

The level. A verdict is false if it says confirmed where the truth lies outside the region, or refuted where it lies
inside. Each of the m claims of an experiment is promised to be false with a probability of at most ``alpha / m``, all
together with at most ``alpha``. Whichever side of an edge the truth is on, only one of the two can be false, and only
one end of a two-sided interval can bring it about; and the interval of a mean is one of ``1 − alpha / 2m``
(``alpha_of_mean``): so the nominal probability of a false verdict is a quarter of what is promised. The rest is what
deviations from normality may use up. ``verdict_calibration`` measures how much they do: slightly skewed outcomes keep
the promise; outcomes as skewed as an exponential distribution break it, the more so the larger m is.

An equivalence is the same rule with a region that has two edges. Two one-sided tests of size ``a`` confirm it where the
``1 − 2a`` interval lies inside (Schuirmann 1987): confirming by a ``1 − a`` interval is that test at size ``a / 2``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.estimands import CannotEstimate, per_seed_values, select, selectors, successes
from analysis.load import Campaign, agrees, succeeded
from analysis.statistics import (
    MAX_SEEDS,
    Estimate,
    alpha_of_mean,
    attempts_needed,
    binomial_interval,
    bonferroni,
    exact_range,
    mean_interval,
    nearest_edge,
    seeds_needed,
    sign_flip_p,
)
from experiments.harness.claims import Claim, Estimand, Proportion, Rate, Region, Selector, is_exact
from experiments.harness.record import TrialRecord

Outcome = Literal["confirmed", "refuted", "insufficient"]

NOT_MEASURED = "not measured at this scale"

MIN_SEEDS = 3
"""Fewest seeds with which a mean over seeds is judged.

The rule: the fewest n of ``verdict_calibration`` from which on no false-verdict rate is refuted as at most what is
promised, under normal and discrete outcomes, for a single claim and for one of many, whatever the estimand.
"""


@dataclass(frozen=True)
class Verdict:
    """What one campaign says about one claim; a quantity that does not exist is None."""

    claim: Claim
    outcome: Outcome
    estimate: float | None
    interval: tuple[float, float] | None
    """Simultaneous over the claims of the experiment; for an exact estimand the range over trials."""
    n: int | None
    """What the estimate counts: seeds, trials of an exact value or a rate, attempts of a proportion."""
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
    """Sign-flip test of the region's edge nearest to the estimate, not adjusted; None for a probability."""
    seeds_needed: int | None
    """Seeds in all (attempts of a rate) that would decide what is undecided; None also where 200 would not."""
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
    estimated, so that an interval does not depend on the fate of the other claims; and over those that a record
    registers and that were deleted since, so that deleting a claim narrows no interval.

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
    deleted = {id for record in campaign.records for id in record.claims} - {claim.id for claim in claims}
    n_sampled = sum(not is_exact(claim.estimand) for claim in claims) + len(deleted)
    uses = Counter(claim.id for claim in claims)
    observations = campaign.observations
    return [_judge(claim, campaign, observations, n_sampled, uses[claim.id]) for claim in claims]


def decided(
    low: npt.ArrayLike, high: npt.ArrayLike, region: Region
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether intervals confirm, and whether they refute: the verdict rule, for one interval or for many.

    The region is closed, so an interval that touches its edge from within is inside.
    """
    low, high = np.asarray(low), np.asarray(high)
    return (region.low <= low) & (high <= region.high), (high < region.low) | (region.high < low)


def _judge(claim: Claim, campaign: Campaign, observations: pd.DataFrame, n_sampled: int, uses: int) -> Verdict:
    alpha = _alpha(claim, n_sampled)
    if uses > 1:
        # Records register a claim's digest by its id: with two of one id, neither is known to have stood.
        taken = f"a claim id must be unique, but {claim.id} is taken by {uses} claims; rename all but one"
        finding = _Finding("insufficient", taken)
    else:
        finding = _find(claim, campaign, observations, alpha)
    lack = _what_is_missing(campaign)
    estimate = finding.estimate
    return Verdict(
        claim=claim,
        outcome="insufficient" if lack else finding.outcome,
        estimate=None if estimate is None else estimate.value,
        interval=None if estimate is None else (estimate.low, estimate.high),
        n=None if estimate is None else estimate.n,
        n_ok=len(_ok_ids(campaign)),
        n_planned=campaign.n_planned,
        scope=campaign.scope_of(*_arms(claim.estimand)),
        registered=all(_registered(claim, record) for record in campaign.records),
        simultaneous_alpha=alpha,
        p_sign_flip=finding.p_sign_flip,
        seeds_needed=finding.seeds_needed,
        reason=f"{lack}; {finding.reason}" if lack else finding.reason,
    )


def _alpha(claim: Claim, n_sampled: int) -> float | None:
    """Error rate of the interval of one of the claims that have sampling error; None for any other."""
    if is_exact(claim.estimand):
        return None
    share = bonferroni if isinstance(claim.estimand, Rate | Proportion) else alpha_of_mean
    return share(claim.alpha, n_sampled)


def _registered(claim: Claim, record: TrialRecord) -> bool:
    """The rule stood when the trial began, and it stood in a commit."""
    return record.claims.get(claim.id) == claim.digest and record.git_dirty is False


def _find(claim: Claim, campaign: Campaign, observations: pd.DataFrame, alpha: float | None) -> _Finding:
    """Estimate a claim from the trials that succeeded; ``alpha`` is None for a quantity without sampling error."""
    if observations.empty:
        return _Finding("insufficient", "no trial yielded observations")
    try:
        seeds = _planned_seeds(claim.estimand, campaign)
        about = [record for record in campaign.records if _is_about(claim.estimand, record)]
        if about and not any(succeeded(record) for record in about):
            return _Finding("insufficient", "no trial of this claim succeeded")
        if not seeds or select(observations, claim.estimand.where).empty:
            return _Finding("insufficient", NOT_MEASURED)
        observations = observations[observations["seed"].isin(seeds)]
        values = per_seed_values(claim.estimand, observations)
        _require_every_trial(claim.estimand, campaign, seeds, values)
        if alpha is None:
            estimate = exact_range(values)
            return _Finding(*_place(estimate, claim.region), estimate)
        if isinstance(claim.estimand, Rate | Proportion):
            counts = successes(claim.estimand, observations)
            return _of_probability(claim.estimand, claim.region, binomial_interval(*counts, alpha), alpha)
        return _of_mean(claim, values, mean_interval(values, alpha), alpha)
    except CannotEstimate as error:
        return _Finding("insufficient", str(error))


def _is_about(estimand: Estimand, record: TrialRecord) -> bool:
    return any(agrees(record.spec.factors, arm) for arm in _arms(estimand))


def _planned_seeds(estimand: Estimand, campaign: Campaign) -> set[int]:
    """Seeds that the design gives to every arm of an estimand; what one arm alone has is no pair, nor missing.

    The seeds of all records count, whatever became of the trial; where records are missing, the campaign is incomplete.
    """
    seeds = [
        {record.spec.seed for record in campaign.records if agrees(record.spec.factors, arm)} for arm in _arms(estimand)
    ]
    return set.intersection(*seeds)


def _arms(estimand: Estimand) -> list[Selector]:
    """What selects each arm of an estimand."""
    return [{**estimand.where, **arm} for arm in selectors(estimand)]


def _of_mean(claim: Claim, values: pd.Series[float], estimate: Estimate, alpha: float) -> _Finding:
    """The verdict on a mean over seeds, with what its number of seeds allows."""
    outcome, reason = _place(estimate, claim.region)
    edge = nearest_edge(claim.region, estimate.value)
    p = None if edge is None else sign_flip_p(values, edge)
    needed = seeds_needed(values, claim.region, alpha)
    if estimate.n < MIN_SEEDS:
        few = (
            f"a mean of {estimate.n} seeds is not judged, since its false verdicts can exceed alpha "
            f"(verdict_calibration): it needs at least {MIN_SEEDS}; run {MIN_SEEDS - estimate.n} more"
        )
        return _Finding("insufficient", few, estimate, p, max(MIN_SEEDS, needed or MIN_SEEDS))
    if outcome != "insufficient":
        return _Finding(outcome, reason, estimate, p)
    hint = f"not decided by {MAX_SEEDS} seeds" if needed is None else f"{needed} seeds would decide"
    return _Finding(outcome, f"{reason}: {hint} at the observed mean and spread", estimate, p, needed)


def _of_probability(estimand: Rate | Proportion, region: Region, estimate: Estimate, alpha: float) -> _Finding:
    """The verdict on a probability; a trial is an attempt of a rate, so that trials needed can be told."""
    outcome, reason = _place(estimate, region)
    if outcome != "insufficient" or isinstance(estimand, Proportion):
        return _Finding(outcome, reason, estimate)
    needed = attempts_needed(estimate, region, alpha)
    hint = f"not decided by {MAX_SEEDS} trials" if needed is None else f"{needed} trials would decide"
    return _Finding(outcome, f"{reason}: {hint} at the observed rate", estimate, seeds_needed=needed)


def _require_every_trial(estimand: Estimand, campaign: Campaign, seeds: set[int], values: pd.Series[float]) -> None:
    """No trial of these seeds may drop out of a claim unseen because it lacks a condition of the claim.

    Raises:
        CannotEstimate: if one that succeeded and whose factors agree with the claim's selectors has no value.
    """
    for record in campaign.ok_records:
        has_value = record.spec.seed in values.index or record.trial_id in values.index
        if _is_about(estimand, record) and record.spec.seed in seeds and not has_value:
            wanted = ", ".join(sorted({name for arm in _arms(estimand) for name in arm})) or "the metric"
            raise CannotEstimate(
                f"every trial that a claim is about must record what it needs ({wanted}), but trial {record.trial_id} "
                f"(seed {record.spec.seed}) has no row that matches; correct the experiment and run it as a new version"
            )


def _place(estimate: Estimate, region: Region) -> tuple[Outcome, str]:
    """The verdict rule in words."""
    confirmed, refuted = decided(estimate.low, estimate.high, region)
    if confirmed:
        return "confirmed", "the interval lies inside the region"
    if refuted:
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
