"""Fake trial records, so that the analysis is tested without training anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

from experiments.harness.record import (
    ExampleOutcome,
    ManipulationCheck,
    Observation,
    Scalar,
    Status,
    TrialRecord,
    TrialSpec,
)

SETTINGS = {"model": "smollm2-135m", "dataset": "moby_dick", "steps": 300}
HARDWARE: dict[str, Scalar] = {"device": "cpu", "cores": 2}


def _make_record(
    *,
    experiment: str = "ema_ablation",
    version: int = 1,
    scale: str = "cpu",
    seed: int = 0,
    factors: Mapping[str, Scalar] | None = None,
    settings: Mapping[str, Any] | None = None,
    observations: Iterable[Mapping[str, Any]] = (),
    plan: Sequence[str] | None = None,
    claims: Mapping[str, str] | None = None,
    status: Status = "ok",
    error: str | None = None,
    checks: Iterable[ManipulationCheck] = (),
    examples: Iterable[ExampleOutcome] = (),
    hardware: Mapping[str, Scalar] | None = None,
) -> TrialRecord:
    spec = TrialSpec(
        experiment=experiment,
        version=version,
        scale=scale,
        seed=seed,
        factors=dict(factors or {}),
        settings=dict(SETTINGS if settings is None else settings),
    )
    defaults = {"metric": "eval_loss", "unit": "nats/token", "step": 100}
    return TrialRecord(
        trial_id=spec.trial_id,
        spec=spec,
        plan=[spec.trial_id] if plan is None else list(plan),
        claims=dict(claims or {}),
        status=status,
        error=error,
        observations=[Observation.model_validate({**defaults, **row}) for row in observations],
        examples=list(examples),
        checks=list(checks),
        git_commit="0" * 40,
        git_dirty=False,
        packages={"torch": "2.0.0"},
        hardware=dict(HARDWARE if hardware is None else hardware),
        started="2025-01-01T00:00:00+00:00",
        finished="2025-01-01T00:01:00+00:00",
    )


@pytest.fixture
def make_record() -> Callable[..., TrialRecord]:
    """Build one valid ``TrialRecord``.

    Observations are dicts; ``metric``, ``unit`` and ``step`` default to ``eval_loss``, ``nats/token`` and 100.
    ``plan`` defaults to the record's own trial alone; several records of one plan are made with
    ``record.model_copy(update={"plan": [...]})``.
    """
    return _make_record
