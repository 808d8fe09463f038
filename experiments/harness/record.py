"""Trial specifications, measurements and records: the only thing that passes from experiments to analysis.

A record is one JSON file per trial, ``results/<experiment>/v<version>/<trial_id>.json``, written atomically and never
edited. A trial that diverged, ran out of memory or crashed is a record too.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Scalar = str | int | float | bool | None
Status = Literal["ok", "diverged", "oom", "crashed", "cancelled"]


class Metric(NamedTuple):
    """A metric's name, unit and direction, declared together."""

    name: str
    unit: str
    direction: Literal["minimize", "maximize", "none"]


EVAL_LOSS = Metric("eval_loss", "nats/token", "minimize")
OTHER_LOSS = Metric("other_domain_loss", "nats/token", "minimize")
"""On a domain that was not trained on."""
PERPLEXITY = Metric("perplexity", "1", "minimize")
PEAK_MEMORY = Metric("peak_memory_bytes", "bytes", "minimize")
PREDICTED_PEAK = Metric("predicted_peak_bytes", "bytes", "none")
GRADIENT_MEMORY = Metric("gradient_bytes", "bytes", "minimize")
OPTIMIZER_MEMORY = Metric("optimizer_bytes", "bytes", "minimize")
PARAMETER_MEMORY = Metric("parameter_bytes", "bytes", "minimize")
STEP_TIME = Metric("step_time_sec", "s", "minimize")
TOKENS_PER_SECOND = Metric("tokens_per_second", "tokens/s", "maximize")
"""Padding counts."""
TRAINABLE_PARAMS = Metric("trainable_params", "1", "none")


class TrialSpec(BaseModel):
    """What defines a trial completely: two equal specs are the same trial, and it is run once.

    ``factors`` are the levels that the design varies; ``settings`` are the rest of the resolved configuration. Trials
    that share experiment, version, scale and settings form one *campaign*: they are analysed together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str
    version: int
    scale: str
    seed: int
    factors: dict[str, Scalar]
    settings: dict[str, Any]

    @property
    def trial_id(self) -> str:
        """SHA-256 of the canonical JSON, first 16 hex digits."""
        return _digest(self.model_dump(mode="json"))

    @property
    def campaign_id(self) -> str:
        """Digest of everything but seed and factor levels."""
        return _digest(self.model_dump(mode="json", exclude={"seed", "factors"}))


class Observation(BaseModel):
    """One tidy measurement; conditions (arm, split, decay, …) are further fields of the same row."""

    model_config = ConfigDict(frozen=True, extra="allow")

    metric: str
    unit: str
    value: float
    step: int

    @classmethod
    def of(cls, metric: Metric, value: float, step: int, **conditions: Scalar) -> Observation:
        """An observation of a declared metric, so that name and unit cannot disagree."""
        return cls(metric=metric.name, unit=metric.unit, value=value, step=step, **conditions)


class ExampleOutcome(BaseModel):
    """The outcome of one example (a document) in the final evaluation of one arm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    example: str
    arm: str
    metric: str
    value: float
    tokens: int


class ManipulationCheck(BaseModel):
    """Proof that the treatment took effect: the expected and the observed value, and whether they agree."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    expected: str
    observed: str
    passed: bool

    @classmethod
    def each(cls, **pairs: tuple[object, object]) -> list[ManipulationCheck]:
        """One check per name, of (expected, observed): passed where they are equal."""
        return [
            cls(name=name, expected=str(want), observed=str(got), passed=want == got)
            for name, (want, got) in pairs.items()
        ]


@dataclass
class Measurements:
    """What ``run_trial`` returns; the runner adds the provenance and writes the record."""

    observations: list[Observation] = field(default_factory=list)
    examples: list[ExampleOutcome] = field(default_factory=list)
    checks: list[ManipulationCheck] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """``training``, ``evaluation`` and ``overhead``, which sum to the trial's wall time."""
    tokens: int = 0
    """Training tokens that the model consumed."""
    memory_bytes: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the initial ``model`` weights and fingerprint of the ``data``."""
    diverged: str | None = None
    """Why the trial counts as diverged (a non-finite loss), or None."""


class TrialRecord(BaseModel):
    """One trial, as it happened."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    trial_id: str
    spec: TrialSpec
    plan: list[str]
    """Trial ids of the whole campaign as it was planned when this trial ran."""
    claims: dict[str, str]
    """Claim id → digest, as the claims stood when the trial began."""
    status: Status
    error: str | None = None
    observations: list[Observation] = Field(default_factory=list)
    examples: list[ExampleOutcome] = Field(default_factory=list)
    checks: list[ManipulationCheck] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)
    tokens: int = 0
    memory_bytes: dict[str, int] = Field(default_factory=dict)
    digests: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None
    git_dirty: bool | None
    packages: dict[str, str]
    hardware: dict[str, Scalar]
    wandb_run_id: str | None = None
    started: str
    """UTC, ISO 8601."""
    finished: str


def record_path(results: Path, spec: TrialSpec) -> Path:
    """Where the record of a trial lives."""
    return results / spec.experiment / f"v{spec.version}" / f"{spec.trial_id}.json"


def recorded_trials(results: Path, experiment: str, version: int) -> set[str]:
    """Ids of all trials of an experiment's version that have a record, whatever their scale."""
    return {path.stem for path in (results / experiment / f"v{version}").glob("*.json")}


def write_record(results: Path, record: TrialRecord) -> Path:
    """Write a record atomically: a reader sees either nothing or the whole file.

    Raises:
        FileExistsError: if the trial already has a record (records are never edited).
        OSError: if the folder is not writable or the disk is full; nothing half-written stays behind.
    """
    path = record_path(results, record.spec)
    if path.exists():
        raise FileExistsError(f"trial {record.trial_id} already has a record, and records are never edited: {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record.model_dump(mode="json"), ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_records(folder: Path) -> tuple[list[TrialRecord], list[str]]:
    """All valid records below a folder, in the order of their paths, and one line for each file that is not one.

    An invalid file is named and left alone; the others are still used.
    """
    records: list[TrialRecord] = []
    problems: list[str] = []
    for path in sorted(folder.glob("**/v*/*.json")):
        try:
            record = TrialRecord.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "file"
            problems.append(f"{path}: not a valid trial record ({where}: {first['msg']}); left alone")
            continue
        if record.trial_id != record.spec.trial_id or path.stem != record.trial_id:
            problems.append(f"{path}: trial_id does not match its spec (expected {record.spec.trial_id}); left alone")
            continue
        records.append(record)
    return records, problems


def _digest(payload: object) -> str:
    text = json.dumps(payload, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
