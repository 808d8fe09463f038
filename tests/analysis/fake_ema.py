"""Fake records of the EMA ablation, with the design of the real experiment and losses from a closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.averaging import LENGTHS, posthoc_arm
from experiments.harness.experiment import load_experiment
from experiments.harness.record import ExampleOutcome, Scalar, TrialRecord, TrialSpec, write_record

EXPERIMENT = load_experiment("ema_ablation")
ARMS = {"raw": None, "ema_0.99": 0.99, "ema_0.999": 0.999, "ema_0.9999": 0.9999}
LENGTH_ARMS = {"ema_0.9": 0.9, "ema_0.97": 0.97, "ema_0.997": 0.997, "ema_0.9997": 0.9997}
GAIN = {"constant": 0.02, "cosine": 0.002}
DOCUMENTS = ("Loomings", "The Carpet-Bag", "The Spouter-Inn")


def plan(scale: str, seeds: int | None = None, **changes: Any) -> list[TrialSpec]:
    """The default plan of a scale, or one with another number of seeds or changed settings (``learning_rate=1e-3``)."""
    settings = EXPERIMENT.scales[scale]
    specs = EXPERIMENT.trials(settings if seeds is None else replace(settings, seeds=seeds), scale)
    return [spec.model_copy(update={"settings": {**spec.settings, **changes}}) for spec in specs]


def write_campaign(
    results: Path,
    make_record: Any,
    scale: str = "cpu",
    *,
    gain: Mapping[str, float] = GAIN,
    seeds: int | None = None,
    drop: int = 0,
    claims: Mapping[str, str] | None = None,
    **changes: Any,
) -> list[TrialRecord]:
    """Write one campaign below ``results``.

    Args:
        results: folder of the records.
        make_record: the fixture.
        scale: scale whose default plan is followed.
        gain: relative reduction of the loss at the best horizon, by schedule.
        seeds: number of seeds; that of the scale by default.
        drop: number of planned trials, from the end, that are left without a record.
        claims: digests in the records; today's by default.
        changes: settings that differ from the defaults.
    """
    specs = plan(scale, seeds, **changes)
    digests = {claim.id: claim.digest for claim in EXPERIMENT.claims} if claims is None else claims
    records = []
    for spec in specs[: len(specs) - drop]:
        record = make_record(
            experiment=spec.experiment,
            version=spec.version,
            scale=spec.scale,
            seed=spec.seed,
            factors=spec.factors,
            settings=spec.settings,
            plan=[planned.trial_id for planned in specs],
            claims=digests,
            **_measure(spec, gain),
        )
        write_record(results, record)
        records.append(record)
    return records


def _measure(spec: TrialSpec, gain: Mapping[str, float]) -> dict[str, Any]:
    steps, schedule, track = int(spec.factors["steps"]), str(spec.factors["schedule"]), spec.factors["track"]
    rng = np.random.default_rng([spec.seed, steps, schedule == "cosine", track == "main"])
    raw, initial = (3.4, 3.7) if track == "main" else (6.0, 10.8)
    raw += rng.normal(0, 0.02)
    arms: dict[str, float | None] = dict(ARMS)
    arms |= LENGTH_ARMS if track == "length" else {}
    arms["ema_optimal"] = 0.5 ** (10 / steps)
    observations: list[dict[str, Scalar]] = [_row("initial", initial, 0, "test", {})]
    observations.append({**observations[0], "metric": "perplexity", "unit": "1", "value": math.exp(initial)})
    examples = []
    for arm, decay in arms.items():
        loss, conditions = raw, {"horizon_steps": 1.0}
        if decay is not None:
            horizon, share = 1 / (1 - decay), decay**steps
            closeness = math.exp(-(math.log10(horizon / (steps / 14)) ** 2))
            loss = raw * (1 - gain[schedule] * closeness + rng.normal(0, 0.0008)) * (1 - share) + share * initial
            conditions = {"decay": decay, "horizon_steps": horizon, "initial_weight_share": share}
        observations.append(_row(arm, loss, steps, "test", conditions))
        observations.append({**observations[-1], "metric": "perplexity", "unit": "1", "value": math.exp(loss)})
        noise = 0.03 if arm == "raw" else 0.005
        late = {steps * k // 8 for k in (4, 5, 6, 7, 8)}
        observations += [_row(arm, loss + rng.normal(0, noise), k, "validation", conditions) for k in sorted(late)]
        shifts = rng.normal((0.0, 0.2, 0.4), 0.004)
        examples += [
            ExampleOutcome(example=name, arm=arm, metric="eval_loss", value=loss + shift, tokens=900 + 100 * i)
            for i, (name, shift) in enumerate(zip(DOCUMENTS, shifts, strict=True))
        ]
    observations += _curve(rng, raw, steps, gain[schedule])
    for arm in arms:
        log = math.log(0.03 if arm == "raw" else 0.005) + rng.normal(0, 0.1)
        for metric, unit, value in (
            ("late_loss_spread", "nats/token", math.exp(log)),
            ("late_loss_log_spread", "log(nats/token)", log),
        ):
            observations.append({**_row(arm, value, steps, "validation", {}), "metric": metric, "unit": unit})
    if (track, schedule) == ("main", "constant"):
        for arm, rise in (("raw", 0.02), ("ema_optimal", 0.001)):
            row = _row(arm, rise + rng.normal(0, 0.001), steps, "test", {})
            observations.append({**row, "metric": "bad_batch_loss_rise", "unit": "1"})
    for metric in ("averaged_param_bytes", "ema_extra_bytes"):
        observations.append({"metric": metric, "unit": "bytes", "value": 538060416, "step": steps})
    return {"observations": observations, "examples": examples}


def _curve(rng: np.random.Generator, raw: float, steps: int, gain: float) -> list[dict[str, Scalar]]:
    """Losses along the averaging lengths, best at an eighth of the run, and what following them costs and misses."""
    losses = {
        width: raw * (1 - gain * math.exp(-(math.log10(width / 0.125) ** 2)) + rng.normal(0, 0.0002))
        for width in LENGTHS
    }
    rows = [
        _row(posthoc_arm(width), loss, steps, split, {"sigma_rel": width, "profile_error": 0.02})
        for width, loss in losses.items()
        for split in ("validation", "test")
    ]
    best = min(losses, key=losses.__getitem__)
    for arm, width in (("posthoc_chosen", best), ("posthoc_nearby", LENGTHS[LENGTHS.index(best) - 1])):
        rows.append(_row(arm, losses[width], steps, "test", {}))
        rows.append({**rows[-1], "metric": "chosen_sigma_rel", "unit": "1", "value": width, "inside": True})
    for arm, distance in (("posthoc", 0.05), ("raw", 1.0)):
        value = distance * (1 + rng.normal(0, 0.01))
        rows.append({"metric": "distance_to_followed", "unit": "1", "value": value, "step": steps, "arm": arm})
    for part, seconds in (("steps", 400.0), ("following", 20.0), ("curve", 30.0)):
        value = seconds * (1 + rng.normal(0, 0.01))
        rows.append({"metric": "run_part_sec", "unit": "s", "value": value, "step": steps, "part": part})
    return rows


def _row(arm: str, value: float, step: int, split: str, conditions: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {"value": value, "step": step, "split": split, "arm": arm, **conditions}
