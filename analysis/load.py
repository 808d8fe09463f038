"""Trial records as campaigns: the trials that are analysed together, with what was planned and what came of it.

Serves every section of THEORY.md: a verdict is judged from exactly one campaign, so that results of different
versions, scales or settings are never pooled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from experiments.harness.claims import Selector
from experiments.harness.record import Scalar, TrialRecord, TrialSpec, read_records

SMOKE = "smoke"

_OBSERVATION_COLUMNS = ("trial_id", "seed", "status", "metric", "unit", "value", "step")
_EXAMPLE_COLUMNS = ("trial_id", "seed", "status", "example", "arm", "metric", "value", "tokens")


@dataclass(frozen=True)
class Campaign:
    """All trials of one experiment, version, scale and settings.

    Raises:
        ValueError: if there are no records.
    """

    experiment: str
    version: int
    scale: str
    campaign_id: str
    records: tuple[TrialRecord, ...]
    planned: frozenset[str]
    """Trial ids of the plan: the union of every record's plan and the trials that ran."""

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("a campaign needs at least one record, got none; build it from load_campaigns")

    @property
    def is_evidence(self) -> bool:
        """False for ``smoke``, which proves that the code runs and feeds no verdict."""
        return self.scale != SMOKE

    @property
    def n_planned(self) -> int:
        """Number of trials in the plan."""
        return len(self.planned)

    @property
    def ok_records(self) -> tuple[TrialRecord, ...]:
        """Records of trials that succeeded: status ``ok``, and every manipulation check passed."""
        return tuple(record for record in self.records if succeeded(record))

    @cached_property
    def observations(self) -> pd.DataFrame:
        """Tidy observations of the trials that succeeded, one row each.

        Columns: ``trial_id``, ``seed``, ``status``, the factors, then the fields of the observation with its extra
        conditions. A condition that a row does not have is missing (NaN).

        Raises:
            ValueError: if an observation gives a factor another level than its trial's spec does.
        """
        rows = [
            _merge(record, observation.model_dump())
            for record in self.ok_records
            for observation in record.observations
        ]
        return _frame(rows, _OBSERVATION_COLUMNS)

    @property
    def examples(self) -> pd.DataFrame:
        """Per-example outcomes of the trials that succeeded, one row each, with the factors of their trial.

        Raises:
            ValueError: if an outcome gives a factor another level than its trial's spec does.
        """
        rows = [_merge(record, example.model_dump()) for record in self.ok_records for example in record.examples]
        return _frame(rows, _EXAMPLE_COLUMNS)

    @property
    def scope(self) -> str:
        """Scope of all trials, see ``scope_of``."""
        return self.scope_of({})

    def scope_of(self, *selectors: Selector) -> str:
        """World or model, data, hardware, scale and seeds of the trials whose factors agree with one of the selectors.

        ``smollm2-135m · moby_dick · CPU ×2 · cpu · seeds 0–4``. Model and data are left out where neither settings nor
        factors name them. A factor may choose between groups of settings, as ``track`` does in ``ema_ablation``: then
        the chosen group names them, or the only one there is. The seeds are those of the trials that succeeded.
        """
        chosen = self._agreeing(*selectors)
        named = [_levels(chosen, key) for key in ("world", "model", "dataset")]
        parts = [*named, _hardware(chosen), self.scale]
        seeds = sorted({record.spec.seed for record in chosen if succeeded(record)})
        parts.append(f"seeds {_ranges(seeds)}" if len(seeds) > 1 else "".join(f"seed {seed}" for seed in seeds))
        return " · ".join(part for part in parts if part)

    def models_of(self, where: Selector) -> str:
        """The models of the trials whose factors agree with a selector; empty where none is named."""
        return _levels(self._agreeing(where), "model")

    def _agreeing(self, *selectors: Selector) -> list[TrialRecord]:
        """The records whose factors agree with one of the selectors; all of them where none does."""
        found = [record for record in self.records if any(agrees(record.spec.factors, where) for where in selectors)]
        return found or list(self.records)


def agrees(factors: Mapping[str, object], selector: Selector) -> bool:
    """Whether factor levels agree with a selector in every factor that it names; it may name conditions too."""
    return all(factors[name] == level for name, level in selector.items() if name in factors)


def succeeded(record: TrialRecord) -> bool:
    """Whether a trial yields observations: it ended ``ok`` and its treatment provably took effect."""
    return record.status == "ok" and all(check.passed for check in record.checks)


def load_campaigns(results: Path, experiment: str | None = None) -> tuple[list[Campaign], list[str]]:
    """Group the records below ``results`` into campaigns.

    Args:
        results: folder that holds ``<experiment>/v<version>/<trial_id>.json``.
        experiment: name of one experiment, or None for all.

    Returns:
        The campaigns in the order of (experiment, version, scale, campaign id), smoke ones included, and one line for
        each file that is not a valid record.
    """
    records, problems = read_records(results if experiment is None else results / experiment)
    groups: dict[tuple[str, int, str, str], list[TrialRecord]] = defaultdict(list)
    for record in records:
        spec = record.spec
        groups[spec.experiment, spec.version, spec.scale, spec.campaign_id].append(record)
    campaigns = [Campaign(*key, records=tuple(group), planned=_planned(group)) for key, group in sorted(groups.items())]
    return campaigns, problems


def _planned(records: Iterable[TrialRecord]) -> frozenset[str]:
    return frozenset(trial_id for record in records for trial_id in (record.trial_id, *record.plan))


def _merge(record: TrialRecord, fields: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """One row: identity and factors of the trial, then the fields of the measurement."""
    row: dict[str, Scalar] = {"trial_id": record.trial_id, "seed": record.spec.seed, "status": record.status}
    for source in (record.spec.factors, fields):
        for name, value in source.items():
            if name in row and row[name] != value:
                raise ValueError(
                    f"a condition must not override what the trial's spec says, got {name}={value!r} against "
                    f"{name}={row[name]!r} in trial {record.trial_id}; rename one of them in the experiment"
                )
            row[name] = value
    return row


def _frame(rows: list[dict[str, Scalar]], columns: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(columns))


def _levels(records: Iterable[TrialRecord], key: str) -> str:
    """The distinct values of a setting, or of a factor where the design varies it."""
    values = (_setting(record.spec, key) for record in records)
    return ", ".join(sorted({str(value) for value in values if value is not None}))


def _setting(spec: TrialSpec, key: str) -> object:
    """A setting of the group that a factor level chooses, else of the whole campaign, else a factor of that name.

    Where no factor chooses among groups, the only group that has it counts.
    """
    for level in spec.factors.values():
        group = spec.settings.get(level) if isinstance(level, str) else None
        if isinstance(group, dict) and key in group:
            return group[key]
    if key in spec.settings or key in spec.factors:
        return spec.settings.get(key, spec.factors.get(key))
    groups = [group for group in spec.settings.values() if isinstance(group, dict) and key in group]
    return groups[0][key] if len(groups) == 1 else None


def _hardware(records: Iterable[TrialRecord]) -> str:
    return ", ".join(sorted({_hardware_label(record.hardware) for record in records} - {""}))


def _hardware_label(hardware: Mapping[str, Scalar]) -> str:
    """``NVIDIA H200`` where a GPU is named, else ``CPU ×2``, else nothing."""
    if gpu := hardware.get("gpu"):
        return str(gpu)
    device, cores = hardware.get("device"), hardware.get("cores")
    label = "" if device is None else str(device).upper()
    return f"{label} ×{cores}" if label and cores is not None else label


def _ranges(seeds: list[int]) -> str:
    """``0–4`` for consecutive seeds, else ``0, 2, 5``."""
    if seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(str(seed) for seed in seeds)
