"""What a training step of every method costs: memory one by one, time in turn."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from experiments.harness.cost import MEASURED_STEP, observe_memory, step_times, stop_between_parts, times_in_turn
from experiments.harness.experiment import TrialContext
from experiments.harness.methods import METHODS, build, preset_of
from experiments.harness.record import STEP_TIME, TOKENS_PER_SECOND, Measurements, Observation
from experiments.harness.tasks import fixed_length_collator
from experiments.harness.training import autocast
from experiments.harness.tuning import BASE_PARAMS


def observe_costs(
    into: Measurements,
    run: Any,
    ingredients: Any,
    methods: Sequence[str],
    seed: int,
    rounds: int,
    context: TrialContext,
) -> None:
    """Add, for every method at its middle size, the memory of a real step (by component, predicted too) and its time.

    Args:
        into: gets the observations, with the method as their condition.
        run: the recipe, with ``steps``; a method's own recipe goes before it.
        ingredients: of the run, with the plain model.
        methods: names.
        seed: of adapters and data order.
        rounds: steps of each method that are timed.
        context: of the trial.

    Raises:
        Preempted: if the context asks to stop.
    """
    began = time.monotonic()

    def model_of(name: str) -> nn.Module:
        preset = preset_of(name, METHODS[name].middle_size, run.steps)
        return build(run, ingredients, seed, preset)  # type: ignore[no-any-return]

    base_params = sum(p.numel() for p in ingredients.model.parameters())
    for done, name in enumerate(methods):
        stop_between_parts(context)
        context.report(done, len(methods) + 1, phase=f"memory of {name}")
        own = dataclasses.replace(run, **METHODS[name].recipe)
        with_method = dataclasses.replace(ingredients, model=model_of(name))
        observe_memory(into, own, with_method, seed, context.work_dir / name, method=name)
        into.observations.append(Observation.of(BASE_PARAMS, base_params, MEASURED_STEP, method=name))
        del with_method
        if torch.cuda.is_available():
            gc.collect()  # all that lives there counts for the next one
    stop_between_parts(context)
    context.report(len(methods), len(methods) + 1, phase="step times")
    _observe_times(into, run, ingredients, {name: model_of(name) for name in methods}, rounds)
    into.seconds["training"] += time.monotonic() - began


def _observe_times(
    into: Measurements, run: Any, ingredients: Any, models: Mapping[str, nn.Module], rounds: int
) -> None:
    """Median step time of every method, all in turn in rotating order, each timed step after one that is not.

    What callbacks do between steps (AdaLoRA's allocation, WeightLoRA's choice) is not in it.
    """
    rows = [ingredients.train[i] for i in range(run.batch_size)]
    batch = dict(fixed_length_collator(run, ingredients)(rows))
    tokens = run.batch_size * run.sequence_length

    def piece(name: str, _: int) -> float:
        precision = METHODS[name].recipe.get("precision", run.precision)
        return step_times(models[name], [batch] * 2, {name: nullcontext}, run.learning_rate, autocast(precision))[name]

    into.tokens += 2 * tokens * rounds * len(models)
    for name, value in times_in_turn(models, rounds, piece, uncounted=0).items():
        into.observations.append(Observation.of(STEP_TIME, value, rounds, method=name))
        into.observations.append(Observation.of(TOKENS_PER_SECOND, tokens / value, rounds, method=name))
