"""A method that is tuned and then trained once more: its study, its final run, and what both of them show.

A run here is a ``CausalLMRun`` or a ``ClassificationRun`` with ``steps``, ``tuning_runs``, and a fixed quality
``target`` (validation accuracy; for language models the share by which the validation loss falls below the untrained
model's), and, for language models, ``other_dataset``, on which forgetting is measured.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from experiments.harness import causal_lm, classification
from experiments.harness.classification import ACCURACY, CLASSIFIER_LOSS, ClassificationRun
from experiments.harness.cost import MEASURED_STEP, Part, stop_between_parts
from experiments.harness.experiment import TrialContext
from experiments.harness.methods import (
    build,
    callbacks_of,
    checks_after,
    checks_before,
    preset_of,
    rank_budget,
    ranks_of,
    saved_bytes,
)
from experiments.harness.record import (
    EVAL_LOSS,
    PEAK_MEMORY,
    TRAINABLE_PARAMS,
    ManipulationCheck,
    Measurements,
    Metric,
    Observation,
)
from experiments.harness.tasks import collator_of
from experiments.harness.training import TrainingOutcome, train
from experiments.harness.tuning import (
    BYTES_TO_TARGET,
    CHOSEN_RATE,
    CHOSEN_SIZE,
    DIVERGED_RUNS,
    FIRST_TUNING_SEED,
    RANK_BUDGET,
    RANK_SUM,
    RATE_MEAN,
    REACHED,
    SAVED,
    SECONDS_TO_TARGET,
    TRAINABLE_SHARE,
    Candidate,
    Space,
    TuningRun,
    best_of,
    mean_over_rates,
    tune,
)
from forge.memory import MeasureMemory
from forge.presets import Preset

LOOKS = 4
"""Evaluations on validation during the final run."""


@dataclass(frozen=True)
class Subject:
    """A method on a task."""

    method: str
    run: Any
    ingredients: Any
    """Data, and the plain model of the trial's seed."""

    @property
    def classifies(self) -> bool:
        """Whether the task is classification."""
        return isinstance(self.run, ClassificationRun)

    def with_model(self, model: nn.Module) -> Subject:
        """The same with another model in its ingredients."""
        return dataclasses.replace(self, ingredients=dataclasses.replace(self.ingredients, model=model))

    def prepared(self, candidate: Candidate, seed: int) -> tuple[Subject, Preset, list[TrainerCallback]]:
        """The same at a setting of the method: with its learning rate and its model, drawn from a seed."""
        gc.collect()  # a Trainer holds its model in cycles: the last one goes before the next one comes
        preset = preset_of(self.method, candidate.size, self.run.steps)
        model = build(self.run, self.ingredients, seed, preset)
        run = dataclasses.replace(self.run, learning_rate=candidate.learning_rate)
        return (
            dataclasses.replace(self, run=run).with_model(model),
            preset,
            callbacks_of(preset, model, self.run.steps),
        )

    def train(self, seed: int, work_dir: Path, callbacks: Sequence[TrainerCallback]) -> TrainingOutcome:
        """Train the model to the end of the run."""
        data, plan = self.ingredients, self.run.plan(seed, self.run.steps, "cosine")
        part = Part(work_dir)
        return train(data.model, data.train, data.validation, plan, part, callbacks, collator=collator_of(data))

    def on_validation(self) -> tuple[dict[str, float], float]:
        """Loss, and of classes accuracy, on the validation split; and the seconds that it took."""
        held_out = dataclasses.replace(self.ingredients, test=self.ingredients.validation)
        if not self.classifies:
            losses, seconds = causal_lm.losses_on_test(self.run, held_out, {"only": nullcontext})
            return {"eval_loss": losses["only"].loss}, seconds
        outcomes, seconds = classification.outcomes_on_test(self.run, held_out, {"only": nullcontext})
        metrics = outcomes["only"].metrics
        return {"eval_loss": metrics["cross_entropy"], "accuracy": metrics["accuracy"]}, seconds


class Looks(TrainerCallback):
    """Looks at validation at evenly spread steps, the last one the end of the run; goes after other callbacks.

    The Trainer's own evaluation will not do: its loss holds AdaLoRA's penalty.
    """

    def __init__(self, subject: Subject, looks: int) -> None:
        self._subject = subject
        self._steps = {max(1, subject.run.steps * look // looks) for look in range(1, looks + 1)}
        self.figures: dict[int, dict[str, float]] = {}
        """By step."""
        self.evaluation_sec = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look, if it is one of the steps."""
        if state.global_step in self._steps:
            self.figures[state.global_step], seconds = self._subject.on_validation()
            self.evaluation_sec += seconds


def measure_tuned(into: Measurements, subject: Subject, space: Space, seed: int, context: TrialContext) -> None:
    """Run the study of a method on one seed, then train it with its best setting on another, and look at test.

    Between two runs it may stop; finished tuning runs are not repeated at the next call.

    Args:
        into: gets observations, checks, seconds and tokens.
        subject: the method on its task.
        space: what the study searches.
        seed: of the final run and of the sampler, below ``FIRST_TUNING_SEED``.
        context: of the trial.

    Raises:
        Preempted: if the context asks to stop.
    """

    def before_each(number: int) -> None:
        stop_between_parts(context)
        context.report(number, space.runs + 1, phase=f"tuning run {number + 1}")

    run, tuning_seed = subject.run, FIRST_TUNING_SEED + seed
    train_one = partial(_tuning_run, subject, tuning_seed, context.work_dir / "tuning")
    runs = tune(train_one, space, seed, context.work_dir / "tuning.json", before_each)
    _observe_tuning(into, subject, runs)
    for part in ("training", "evaluation"):
        into.seconds[part] += sum(each.figures[f"{part}_sec"] for each in runs)
    into.checks += ManipulationCheck.each(
        tuning_steps=(run.tuning_runs * run.steps, round(sum(each.figures["steps"] for each in runs))),
    )
    per_step = run.batch_size * subject.ingredients.train.tokens / len(subject.ingredients.train)
    into.tokens += round((space.runs + 1) * run.steps * per_step)
    best = best_of(runs)
    if best is None:
        into.diverged = f"none of {len(runs)} tuning runs has a finite validation loss"
        return
    stop_between_parts(context)
    context.report(space.runs, space.runs + 1, phase="final run")
    _final_run(into, subject, best.candidate, seed, context.work_dir)


def _tuning_run(subject: Subject, seed: int, work_dir: Path, candidate: Candidate) -> dict[str, float]:
    """Train one candidate and look at validation."""
    tried, _, callbacks = subject.prepared(candidate, seed)
    outcome = tried.train(seed, work_dir, callbacks)
    figures, evaluation_sec = tried.on_validation()
    seconds = {"training_sec": outcome.training_sec, "evaluation_sec": evaluation_sec}
    return {**figures, **seconds, "steps": outcome.trainer.state.global_step}


def _observe_validation(
    into: Measurements, subject: Subject, figures: Mapping[str, float], arm: str, step: int, **at: Any
) -> None:
    """Loss and accuracy on validation, where they are finite."""
    for metric in (CLASSIFIER_LOSS, ACCURACY) if subject.classifies else (EVAL_LOSS,):
        if math.isfinite(figures[metric.name]):
            into.observations.append(
                Observation.of(metric, figures[metric.name], step, split="validation", arm=arm, **at)
            )


def _observe_tuning(into: Measurements, subject: Subject, runs: list[TuningRun]) -> None:
    """Every run of the study, for learning-rate curves; how much depends on the rate; what diverged."""
    steps = subject.run.steps
    for number, each in enumerate(runs):
        size = {} if each.candidate.size is None else {"size": each.candidate.size}
        at = {"tuning_run": number, "learning_rate": each.candidate.learning_rate, "common": each.common, **size}
        _observe_validation(into, subject, each.figures, "tuning", steps, **at)
    figures = {DIVERGED_RUNS: float(sum(not math.isfinite(each.score) for each in runs))}
    if subject.classifies:
        figures[RATE_MEAN] = mean_over_rates(runs, ACCURACY.name)
    into.observations += [Observation.of(metric, value, steps, arm="tuning") for metric, value in figures.items()]


def _final_run(into: Measurements, subject: Subject, chosen: Candidate, seed: int, work_dir: Path) -> None:
    """Train with the chosen setting; test quality, forgetting, cost, size, and the way to the fixed quality."""
    untrained = None if subject.classifies else _untrained_loss(subject, seed)
    final, preset, callbacks = subject.prepared(chosen, seed)
    model, steps = final.ingredients.model, final.run.steps
    into.checks += checks_before(final.run, subject.ingredients, model, preset)
    before = _on_host(model)
    trains = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    measure, looks = MeasureMemory(MEASURED_STEP), Looks(final, LOOKS)
    outcome = final.train(seed, work_dir / "final", [*callbacks, measure, looks])
    training_sec = outcome.training_sec - looks.evaluation_sec
    moved = {name for name, p in _on_host(model, clone=False).items() if not torch.equal(p, before[name])}
    into.checks += checks_after(model, preset, callbacks) + ManipulationCheck.each(
        optimizer_steps=(steps, outcome.trainer.state.global_step),
        frozen_weights_that_moved=([], sorted(moved - trains.keys())),
        something_moved=(True, bool(moved)),
    )
    into.seconds["training"] += training_sec
    into.seconds["evaluation"] += looks.evaluation_sec + _observe_quality(into, final)
    memory: Any = measure.measured
    into.memory_bytes = {k.removesuffix("_bytes"): v for k, v in vars(memory).items() if k.endswith("_bytes")}
    figures: dict[Metric, float] = {
        TRAINABLE_PARAMS: sum(trains.values()),
        TRAINABLE_SHARE: sum(trains.values()) / sum(p.numel() for p in subject.ingredients.model.parameters()),
        PEAK_MEMORY: memory.peak_bytes,
        SAVED: saved_bytes(model, work_dir / "saved"),
        CHOSEN_RATE: chosen.learning_rate,
        **_way_to_target(into, final, looks.figures, untrained, training_sec, memory.peak_bytes),
    }
    if chosen.size is not None:
        figures[CHOSEN_SIZE] = chosen.size
    if subject.method == "adalora":
        ranks = ranks_of(callbacks)
        figures |= {RANK_SUM: sum(ranks.values()), RANK_BUDGET: rank_budget(preset, ranks)}
    into.observations += [Observation.of(metric, value, steps, arm="final") for metric, value in figures.items()]


def _on_host(model: nn.Module, *, clone: bool = True) -> dict[str, torch.Tensor]:
    """Parameters by name, in host memory, so that they do not count as memory of the device."""
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    return {name: p.clone() for name, p in weights.items()} if clone else weights


def _untrained_loss(subject: Subject, seed: int) -> float:
    """Validation loss of a language model before training, to which its fixed quality is relative."""
    return subject.with_model(build(subject.run, subject.ingredients, seed, None)).on_validation()[0]["eval_loss"]


def _observe_quality(into: Measurements, final: Subject) -> float:
    """Test outcome of the final run, of language models on the other domain too; returns the seconds that it took."""
    run, trained = final.run, final.ingredients
    if final.classifies:
        outcomes, seconds = classification.outcomes_on_test(run, trained, {"final": nullcontext})
        classification.observe(into, outcomes["final"], run.steps, "final", per_example=(ACCURACY,))
        return seconds
    return causal_lm.observe_domains(into, run, trained, run.other_dataset, run.steps, "final")


def _way_to_target(
    into: Measurements,
    final: Subject,
    looks: Mapping[int, Mapping[str, float]],
    untrained: float | None,
    training_sec: float,
    peak_bytes: int,
) -> dict[Metric, float]:
    """Validation during the final run and at its end, and what the fixed quality took in seconds and bytes, if reached.

    Seconds are those of training alone, at the mean pace of the run.
    """
    target, steps, reached = final.run.target, final.run.steps, []
    for step, figures in looks.items():
        _observe_validation(into, final, figures, "final" if step == steps else "curve", step)
        good = figures["accuracy"] >= target if untrained is None else figures["eval_loss"] <= (1 - target) * untrained
        reached += [step] if good else []
    if not reached:
        return {REACHED: 0.0}
    return {REACHED: 1.0, SECONDS_TO_TARGET: training_sec * reached[0] / steps, BYTES_TO_TARGET: peak_bytes}
