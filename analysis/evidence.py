"""Which campaign speaks for a claim: the rule by which committed evidence reaches THEORY.md.

Serves every section of THEORY.md. Smoke runs, other versions and campaigns with settings or seeds of one's own never
speak for a claim there; they have their place in the tables of ``analysis.tables``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.estimands import selectors as selectors
from analysis.load import Campaign, agrees
from analysis.verdicts import NOT_MEASURED, Verdict, judge_campaign
from experiments.harness.claims import Claim
from experiments.harness.experiment import Experiment
from experiments.harness.record import TrialSpec

SCALES = ("laptop", "cpu", "gpu", "paper")
"""From the weakest evidence to the strongest; ``smoke`` is none."""


@dataclass(frozen=True)
class Evidence:
    """The campaign that speaks for a claim, and its verdict."""

    campaign: Campaign
    verdict: Verdict


@dataclass(frozen=True)
class Finding:
    """What is known about one claim."""

    experiment: Experiment
    claim: Claim
    evidence: Evidence | None


def scale_rank(scale: str) -> int:
    """Position in the order of evidence; a scale of unknown name counts least."""
    return SCALES.index(scale) if scale in SCALES else -1


def in_order(campaigns: Iterable[Campaign]) -> list[Campaign]:
    """Evidence campaigns by version, scale (weakest first) and campaign id."""
    evidence = [campaign for campaign in campaigns if campaign.is_evidence]
    return sorted(evidence, key=lambda c: (c.experiment, c.version, scale_rank(c.scale), c.scale, c.campaign_id))


def default_plan(experiment: Experiment, scale: str) -> list[TrialSpec]:
    """The trials of a scale with the settings that the experiment declares; none for a scale that it does not have."""
    return experiment.trials(experiment.scales[scale], scale) if scale in experiment.scales else []


def is_default(experiment: Experiment, campaign: Campaign) -> bool:
    """Whether a campaign planned the trials that its scale declares in the experiment's current version, all of them
    and no others.

    The number of seeds is no setting, so a campaign of fewer or more has the same id. It is another design: whoever
    adds seeds until the verdict comes is wrong more often than alpha says. More seeds are a new version.
    """
    if (campaign.experiment, campaign.version) != (experiment.name, experiment.version):
        return False
    return campaign.planned == {spec.trial_id for spec in default_plan(experiment, campaign.scale)}


def find(experiment: Experiment, campaigns: Iterable[Campaign]) -> list[Finding]:
    """One finding per claim, in the order of declaration.

    Of the evidence campaigns of the current version with the declared plan, the highest scale at which the claim was
    measured speaks for it.
    """
    speaking = [campaign for campaign in in_order(campaigns) if is_default(experiment, campaign)]
    judged = [
        (campaign, default_plan(experiment, campaign.scale), judge_campaign(experiment.claims, campaign))
        for campaign in reversed(speaking)
    ]
    findings = []
    for index, claim in enumerate(experiment.claims):
        measured = (
            Evidence(campaign, verdicts[index])
            for campaign, plan, verdicts in judged
            if planned(claim, plan) and not verdicts[index].reason.endswith(NOT_MEASURED)
        )
        findings.append(Finding(experiment, claim, next(measured, None)))
    return findings


def planned(claim: Claim, plan: Sequence[TrialSpec]) -> bool:
    """Whether a plan has trials for every arm of a claim, as far as its selectors name factors."""
    return all(
        any(agrees(spec.factors, {**claim.estimand.where, **selector}) for spec in plan)
        for selector in selectors(claim.estimand)
    )
