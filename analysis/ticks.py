"""Ticks in the lists of planned experiments of THEORY.md: an experiment is done when its campaign is complete.

Serves the lists «Планируемые эксперименты». An entry names its experiment by the command that runs it; one without a
command cannot be ticked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from analysis.evidence import is_default
from analysis.load import Campaign
from experiments.harness.experiment import Experiment

_ENTRY = re.compile(r"^(\s*[-*] \[)[ xX](\].*)$", re.MULTILINE)
_COMMAND = re.compile(r"`python -m experiments\.run (?P<name>\w+)(?P<flags>(?: --\S+ [^\s`]+)*)`")
_FLAG = re.compile(r"--(\S+) (\S+)")


def render_ticks(text: str, experiments: Sequence[Experiment], campaigns: Sequence[Campaign]) -> str:
    """A text whose list entries are ticked where, and only where, a complete campaign answers their command."""
    by_name = {experiment.name: experiment for experiment in experiments}

    def ticked(entry: re.Match[str]) -> str:
        command = _COMMAND.search(entry[2])
        experiment = by_name.get(command["name"]) if command else None
        flags = _FLAG.findall(command["flags"]) if command else []
        done = experiment is not None and any(_answers(campaign, experiment, flags) for campaign in campaigns)
        return f"{entry[1]}{'x' if done else ' '}{entry[2]}"

    return _ENTRY.sub(ticked, text)


def _answers(campaign: Campaign, experiment: Experiment, flags: Sequence[tuple[str, str]]) -> bool:
    """Whether a campaign is what a command asks for: evidence of today's version, complete, with these settings."""
    if (campaign.experiment, campaign.version) != (experiment.name, experiment.version) or not campaign.is_evidence:
        return False
    if len(campaign.records) < campaign.n_planned:
        return False
    settings = campaign.records[0].spec.settings
    asked = all(_has(settings, flag.replace("-", "_"), value) for flag, value in flags)
    return asked if flags else is_default(experiment, campaign)


def _has(settings: Mapping[str, object], name: str, value: str) -> bool:
    """Whether a setting of that name, at any depth, has that value."""
    if str(settings.get(name)) == value:
        return True
    return any(_has(group, name, value) for group in settings.values() if isinstance(group, Mapping))
