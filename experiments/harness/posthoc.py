"""A curve of averages followed in one training: timed while it is followed, put together and evaluated afterwards."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from experiments.harness import causal_lm, classification
from experiments.harness.averaging import FOLLOWED, AveragingCurve, posthoc_arm
from experiments.harness.classification import ACCURACY, CLASSIFIER_LOSS, ClassificationRun
from experiments.harness.cost import synchronize
from experiments.harness.record import EVAL_LOSS, ManipulationCheck, Measurements, Metric, Observation
from experiments.harness.tasks import Run
from forge.ema import EMACallback
from forge.posthoc_ema import (
    PostHocEMACallback,
    Reconstruction,
    gamma_of,
    power_profile,
    reconstruct,
    reconstruct_widths,
)

PART_SEC = Metric("run_part_sec", "s", "minimize")
"""Seconds of one ``part`` of the run: ``steps`` (forward, backward, optimizer), ``following`` (updates and snapshots of
the followed averages), ``curve`` (following, and putting the averages together; their evaluation does not count)."""

WEIGHT_DISTANCE = Metric("distance_to_followed", "1", "none")
"""Euclidean distance of weights to an average that was followed step by step."""

SPLITS = ("validation", "test")

_EVALUATION_TOKENS = 2_048
"""Tokens of a batch where weights are evaluated after the training."""

_AT_ONCE = 6
"""Averages in memory at once while they are put together."""


class CurveCallback(PostHocEMACallback):
    """Follows two power-function averages in half-precision snapshots, and times itself and the steps beside it.

    The clock is read at the beginning and the end of a step and of its own work: neither evaluations, nor checkpoints,
    nor other callbacks count, and no two runs are compared. It must be the first of the callbacks.

    Args:
        curve: what is followed.
        steps: optimizer steps of the run.
        work_dir: of the trial; snapshots and clock lie there until it is finished.
        relative_to_start: see ``PostHocEMACallback``. False in version 2 of ``ema_ablation``, whose claim on the error
            found what rounded weights do to fine-tuning.
    """

    def __init__(self, curve: AveragingCurve, steps: int, work_dir: Path, *, relative_to_start: bool = True) -> None:
        self.snapshots = work_dir / "snapshots"
        self._curve, self._clock, self._began = curve, work_dir / "curve_seconds.json", 0.0
        self.seconds = {"steps": 0.0, "following": 0.0}
        self.reconstruction_sec = self.evaluation_sec = 0.0
        super().__init__(
            self.snapshots,
            curve.snapshot_every(steps),
            FOLLOWED,
            dtype=torch.float16,
            relative_to_start=relative_to_start,
            update_every=curve.follow_every,
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Take up the clock where the checkpoint was written; seconds that were lost with steps do not count."""
        super().on_train_begin(args, state, control, **kw)
        if state.global_step > 0 and self._clock.is_file():
            kept = json.loads(self._clock.read_text())
            if kept["step"] == state.global_step:
                self.seconds = kept["seconds"]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """The step begins."""
        synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """The step has ended; what follows is ours."""
        synchronize()
        ended = time.perf_counter()
        super().on_step_end(args, state, control, **kw)
        synchronize()
        self.seconds["steps"] += ended - self._began
        self.seconds["following"] += time.perf_counter() - ended

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """The clock is kept beside the checkpoint."""
        super().on_save(args, state, control, **kw)
        self._clock.write_text(json.dumps({"step": state.global_step, "seconds": self.seconds}))

    def along(self, model: nn.Module, step: int) -> Iterator[dict[str, str | float]]:
        """Put the average of each length into the model in turn; the weights that it had come back at the end.

        Args:
            model: the trained one.
            step: the step up to which is averaged.

        Yields:
            The conditions of the arm whose weights the model has now.
        """
        raw = Reconstruction(copy_of_weights(model), 0.0)
        widths = self._curve.sigma_rel
        for begin in range(0, len(widths), _AT_ONCE):
            began = time.perf_counter()
            some = widths[begin : begin + _AT_ONCE]
            found = reconstruct_widths(self.snapshots, some, step=step)
            self.reconstruction_sec += time.perf_counter() - began
            for width in some:
                average = found.pop(0)
                average.apply(model)
                yield self._conditions(width, average.error, step)
        raw.apply(model)

    def _conditions(self, width: float, error: float, step: int) -> dict[str, str | float]:
        """Arm, length, mean age of the weights in steps (the newest count as age 1), error of the profile."""
        every = self._curve.follow_every
        weights = power_profile(gamma_of(width), step // every)
        age = float(weights @ (step + 1 - every * np.arange(1, weights.size + 1)))
        return {"arm": posthoc_arm(width), "sigma_rel": width, "mean_age_steps": age, "profile_error": error}

    def observe(self, into: Measurements, run: Run, ingredients: Any, step: int) -> dict[str, dict[float, float]]:
        """Add what every length says of both splits.

        Args:
            into: gets the outcomes, or the note that one is not finite.
            run: the task.
            ingredients: with the trained model.
            step: the step up to which is averaged.

        Returns:
            By split, the loss of each length.
        """
        losses: dict[str, dict[float, float]] = {split: {} for split in SPLITS}
        for conditions in self.along(ingredients.model, step):
            for split in SPLITS:
                began = time.perf_counter()
                scores = scores_on(split, run, ingredients)
                self.evaluation_sec += time.perf_counter() - began
                losses[split][float(conditions["sigma_rel"])] = loss = next(iter(scores.values()))
                if not math.isfinite(loss):
                    into.diverged = f"the {split} loss of arm {conditions['arm']} at step {step} is {loss}"
                    continue
                for metric, value in scores.items():
                    into.observations.append(Observation.of(metric, value, step, split=split, **conditions))
        return losses

    def observe_error(
        self,
        into: Measurements,
        step: int,
        model: nn.Module,
        initial: Mapping[str, Tensor],
        followed: EMACallback,
        decay: float,
    ) -> None:
        """Add how far an exponential average put together afterwards is from the followed one, and the raw weights.

        The followed one began at the initial weights and holds decay^steps of them, so as much is put into the other
        one too. It saw every step, the other one did not: that, the profile and the half precision are the error.
        """
        wanted = followed.ema.averages(decay)
        found = reconstruct(self.snapshots, decay=decay, step=step)
        for name, average in found.averages.items():
            average.lerp_(initial[name].to(average), decay**step)
        raw = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for arm, weights, told in (("posthoc", found.averages, {"profile_error": found.error}), ("raw", raw, {})):
            into.observations.append(
                Observation.of(WEIGHT_DISTANCE, weight_distance(weights, wanted), step, arm=arm, decay=decay, **told)
            )

    def observe_seconds(self, into: Measurements, step: int) -> None:
        """Add what the steps, following and the whole curve took."""
        parts = {**self.seconds, "curve": self.seconds["following"] + self.reconstruction_sec}
        for part, seconds in parts.items():
            into.observations.append(Observation.of(PART_SEC, seconds, step, part=part))

    def checks(self, model: nn.Module, steps: int) -> list[ManipulationCheck]:
        """The averages were updated and stored as planned, and the longer one is not the weights themselves."""
        stored = [int(path.stem.removeprefix("step-")) for path in sorted(self.snapshots.glob("step-*.safetensors"))]
        parameters, longer = dict(model.named_parameters()), self.ema.averages(max(FOLLOWED))
        return ManipulationCheck.each(
            curve_updates=(steps // self._curve.follow_every, self.ema.step // self.ema.update_every),
            curve_snapshots=(list(self._curve.snapshot_steps(steps)), stored),
            curve_equals_raw=(False, all(bool((parameters[name] == mean).all()) for name, mean in longer.items())),
        )


def copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that train, as they are now."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def scores_on(split: str, run: Run, ingredients: Any) -> dict[Metric, float]:
    """Loss of the model as it is, and of a classifier its accuracy."""
    held_out = dataclasses.replace(ingredients, test=getattr(ingredients, split))
    run, arms = with_evaluation_batch(run), {split: nullcontext}
    if isinstance(run, ClassificationRun):
        metrics = classification.outcomes_on_test(run, held_out, arms)[0][split].metrics
        return {CLASSIFIER_LOSS: metrics["cross_entropy"], ACCURACY: metrics["accuracy"]}
    return {EVAL_LOSS: causal_lm.losses_on_test(run, held_out, arms)[0][split].loss}


def with_evaluation_batch(run: Run) -> Any:
    """The run with the batch size of the evaluations after the training."""
    return dataclasses.replace(run, batch_size=max(1, _EVALUATION_TOKENS // run.sequence_length))


def weight_distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Euclidean distance of two sets of weights of the same names."""
    squares = (
        torch.linalg.vector_norm(first[name].cpu() - second[name].cpu(), dtype=torch.float64) ** 2 for name in second
    )
    return float(sum(squares) ** 0.5)
