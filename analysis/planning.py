"""Power of a design, from a pilot's variance: ``python -m experiments.run EXPERIMENT --plan``.

Serves the plans of all experiments. The probability that the ``1 − alpha`` t-interval of n seeds lies clear of the
region's nearest edge, on the side of the truth, follows from the noncentral t distribution; the pilot's standard
deviation is taken for the true one, which with few seeds it is only roughly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import optimize, stats

from analysis.estimands import per_seed_values, selectors
from analysis.evidence import in_order, planned
from analysis.formatting import ENGLISH, NOTHING, format_estimate, format_region, is_relative, is_shift, markdown_table
from analysis.load import Campaign, agrees
from analysis.rows import CannotEstimate
from analysis.statistics import MAX_SEEDS, Estimate, alpha_of_mean, mean_interval, nearest_edge
from analysis.verdicts import MIN_SEEDS
from experiments.harness.claims import Claim, Estimand, Proportion, Rate, is_exact
from experiments.harness.experiment import Experiment
from experiments.harness.record import TrialSpec

POWER = 0.8


@dataclass(frozen=True)
class Plan:
    """What a pilot says of the design for one claim."""

    claim: Claim
    pilot: Estimate
    campaign: Campaign
    """The pilot."""
    n_planned: int
    """Seeds in the plan."""
    detectable: float | None
    """Distance from the edge that the planned seeds decide with the wanted power; None with fewer than two seeds."""
    n_needed: int | None
    """Seeds that decide at the pilot's estimate with the wanted power; None where 200 do not."""


def power(distance: float, sd: float, n: int, alpha: float) -> float:
    """Probability that the ``1 − alpha`` interval of n seeds lies on the truth's side of an edge at a distance.

    Args:
        distance: from the edge to the true mean, positive, in the unit of ``sd``.
        sd: standard deviation over seeds.
        n: seeds, at least 2.
        alpha: error rate of the two-sided interval.
    """
    if n < 2:
        raise ValueError(f"an interval needs at least 2 seeds, got {n}")
    if not sd > 0:
        raise ValueError(f"sd must be positive, got {sd}")
    return float(stats.nct.sf(stats.t.ppf(1 - alpha / 2, n - 1), n - 1, distance * math.sqrt(n) / sd))


def detectable_distance(sd: float, n: int, alpha: float, wanted: float = POWER) -> float:
    """The least distance from the edge that n seeds decide with the wanted power."""
    standardised = optimize.brentq(lambda d: power(d, 1.0, n, alpha) - wanted, 0.0, _far(n, alpha))
    return sd * float(standardised)


def seeds_for_power(distance: float, sd: float, alpha: float, wanted: float = POWER) -> int | None:
    """The least number of seeds, at most 200, that decides at a distance with the wanted power."""
    return next((n for n in range(MIN_SEEDS, MAX_SEEDS + 1) if power(distance, sd, n, alpha) >= wanted), None)


def _far(n: int, alpha: float) -> float:
    """A standardised distance at which the power is almost one: the quantile of t, and ten standard errors of it."""
    quantile = float(stats.t.ppf(1 - alpha / 2, n - 1))
    return 10 * (1 + quantile) * (1 + quantile / math.sqrt(n - 1)) / math.sqrt(n)


def plans(
    experiment: Experiment, specs: Sequence[TrialSpec], campaigns: Sequence[Campaign]
) -> tuple[list[Plan], dict[str, str]]:
    """The plan of each claim that has pilot data.

    Args:
        experiment: whose claims are planned for.
        specs: the trials that are to be run.
        campaigns: where pilot data may be; smoke runs and other versions are none.

    Returns:
        The plans, and why the other claims have none, by claim id. The pilot of a claim is the campaign of the plan
        itself if it can be estimated there, else the one of the highest scale.
    """
    of_version = [c for c in in_order(campaigns) if (c.experiment, c.version) == (experiment.name, experiment.version)]
    own = [c for c in of_version if specs and c.campaign_id == specs[0].campaign_id]
    pilots = [*own, *(c for c in reversed(of_version) if c not in own)]
    m = sum(not is_exact(claim.estimand) for claim in experiment.claims)
    found: list[Plan] = []
    without: dict[str, str] = {}
    for claim in experiment.claims:
        if is_exact(claim.estimand) or isinstance(claim.estimand, Rate | Proportion):
            without[claim.id] = "no variance over seeds to plan by"
        elif not planned(claim, specs):
            without[claim.id] = "not measured at this scale"
        else:
            plan = _plan(claim, specs, pilots, alpha_of_mean(claim.alpha, m))
            if isinstance(plan, Plan):
                found.append(plan)
            else:
                without[claim.id] = plan
    return found, without


def _plan(claim: Claim, specs: Sequence[TrialSpec], pilots: Sequence[Campaign], alpha: float) -> Plan | str:
    """The plan from the first pilot that speaks of the claim, or why there is none."""
    reason = "no pilot data"
    for campaign in pilots:
        try:
            pilot = mean_interval(per_seed_values(claim.estimand, campaign.observations), alpha)
        except CannotEstimate as error:
            reason = f"no usable pilot: {error}"
            continue
        assert pilot.sd is not None
        edge, n = nearest_edge(claim.region, pilot.value), _seeds(claim.estimand, specs)
        distance = 0.0 if edge is None else abs(pilot.value - edge)
        detectable = detectable_distance(pilot.sd, n, alpha) if n >= MIN_SEEDS else None
        return Plan(claim, pilot, campaign, n, detectable, seeds_for_power(distance, pilot.sd, alpha))
    return reason


def _seeds(estimand: Estimand, specs: Sequence[TrialSpec]) -> int:
    """Seeds in which a plan has trials of an estimand's first arm."""
    arm = {**estimand.where, **selectors(estimand)[0]}
    return len({spec.seed for spec in specs if agrees(spec.factors, arm)})


def summary(experiment: Experiment, specs: Sequence[TrialSpec], campaigns: Sequence[Campaign]) -> str:
    """The plans as a table for the terminal."""
    found, without = plans(experiment, specs, campaigns)
    header = ["claim", "true if", "pilot", "sd", "n of pilot", "n planned", "detectable", "n needed"]
    rows = [_cells(plan) for plan in found]
    parts = [markdown_table(header, rows, [False, False, *[True] * 6])] if rows else []
    if found:
        pilots = {plan.campaign.campaign_id: plan.campaign for plan in found}.values()
        parts.append("Pilot: " + "; ".join(f"{c.scope} (campaign {c.campaign_id})" for c in pilots) + ".")
        parts.append(
            "detectable: distance of the truth from the region's edge that the planned seeds decide with power "
            f"{POWER}; n needed: seeds that decide at the pilot's estimate with that power (— where {MAX_SEEDS} do "
            "not). The intervals are simultaneous over the claims; the pilot's sd is taken for the true one."
        )
    reasons = sorted(set(without.values()))
    parts += [f"{reason}: {', '.join(i for i, r in without.items() if r == reason)}" for reason in reasons]
    return "\n\n".join(parts)


def _cells(plan: Plan) -> list[str]:
    estimand, pilot = plan.claim.estimand, plan.pilot
    assert pilot.sd is not None
    return [
        plan.claim.id,
        format_region(estimand, plan.claim.region, ENGLISH),
        format_estimate(estimand, pilot.value, ENGLISH),
        _distance(estimand, pilot.sd),
        str(pilot.n),
        str(plan.n_planned),
        _distance(estimand, plan.detectable),
        NOTHING if plan.n_needed is None else str(plan.n_needed),
    ]


def _distance(estimand: Estimand, value: float | None) -> str:
    if value is None:
        return NOTHING
    if is_shift(estimand):
        return ENGLISH.factor(value)
    return ENGLISH.share(value) if is_relative(estimand) else ENGLISH.figure(value, 3)
