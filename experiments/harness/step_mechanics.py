"""What a training step costs when memory is short: accumulation, checkpointing, offload, and whether gradients agree.

Gradients are those with which the ``Trainer`` steps, without dropout.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_callback import TrainerCallback

from experiments.harness.classification import ClassificationRun
from experiments.harness.cost import observe_memory, observe_times, stop_between_parts, synchronize
from experiments.harness.experiment import TrialContext
from experiments.harness.mechanics import Batch, full_batch, observe_difference, rows_of
from experiments.harness.record import (
    PEAK_MEMORY,
    STEP_TIME,
    ManipulationCheck,
    Measurements,
    Metric,
    Observation,
    TrialSpec,
)
from experiments.harness.tasks import Run, prepare
from forge.layers import find_layers
from forge.memory import MeasureMemory
from forge.presets import get_preset

TRAINING_FLOPS = Metric("training_step_flops", "FLOP", "minimize")


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout's probability to 0: micro-batches draw other masks than the full batch does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


class _KeepGradient(TrainerCallback):
    """Keeps the gradient with which the optimizer steps, as one vector."""

    gradient: Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.gradient = flat_gradient(kw["model"])


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step of a Trainer's run."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self._began)


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients as one vector, on the host."""
    return torch.cat([p.grad.detach().flatten().cpu() for p in model.parameters() if p.grad is not None])


def run_trainer(
    model: nn.Module, rows: Any, collator: Any, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]
) -> Trainer:
    """Train by the Trainer as it is, with nothing of the harness in between."""
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def arguments_of(folder: Path, steps: int, micro_batch: int, micro_batches: int, **more: Any) -> TrainingArguments:
    """Arguments of a short run in fp32, without clipping; accumulation over ``micro_batches``.

    Args:
        folder: for the Trainer's files.
        steps: optimizer steps.
        micro_batch: examples of a micro-batch.
        micro_batches: of an optimizer step.
        **more: further arguments.
    """
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=micro_batches,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def trainer_gradient(model: nn.Module, rows: Any, collator: Any, micro_batches: int, folder: Path) -> Tensor:
    """The gradient with which the ``Trainer`` steps over all rows at once, which are cut into ``micro_batches``."""
    keep = _KeepGradient()
    size = len(rows) // micro_batches
    arguments = arguments_of(folder, 1, size, micro_batches, learning_rate=0.0, optim="sgd")
    run_trainer(model, rows, collator, arguments, [keep])
    model.zero_grad()
    return keep.gradient


def mean_gradient(model: nn.Module, rows: Sequence[Any], collator: Any, micro_batches: int) -> Tensor:
    """The lecture's accumulation: 1/N Σ ∇L_i, where L_i is the loss of micro-batch i as the model returns it."""
    device = next(model.parameters()).device
    model.train()
    model.zero_grad()
    size = len(rows) // micro_batches
    for first in range(0, len(rows), size):
        batch = collator([rows[i] for i in range(first, first + size)])
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        (loss / micro_batches).backward()
    gradient = flat_gradient(model)
    model.zero_grad()
    return gradient


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """The model with activation checkpointing of every layer."""
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(model, f"{n}_enable"))
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


def observe_compute(into: Measurements, model: Any, batch: Batch, arm: str) -> None:
    """Add the floating-point operations of one forward and backward pass; a check counts the passes of each layer.

    Attention is computed step by step here, since the counter does not know the fused kernels of a CPU.

    Args:
        into: gets the observation and the check.
        model: in fp32, under the context of the arm.
        batch: inputs and labels, on the model's device.
        arm: ``checkpointed``, in which every layer is passed twice, or ``kept``.
    """
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    layers = find_layers(model)
    # A layer's own hooks may stand around what is checkpointed; its first part is within.
    hooks = [next(layer.module.children()).register_forward_pre_hook(count) for layer in layers]
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    model.zero_grad()
    model.set_attn_implementation(kind)
    for hook in hooks:
        hook.remove()
    into.observations.append(Observation.of(TRAINING_FLOPS, counter.get_total_flops(), 0, arm=arm))
    into.checks += ManipulationCheck.each(
        **{f"layer_passes {arm}": ((2 if arm == "checkpointed" else 1) * len(layers), passes)}
    )


def measure_accumulation(
    spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements
) -> None:
    """Gradients of a step, full batch against micro-batches; then the peak memory of both on a large batch."""
    model, parts, folder = ingredients.model, spec.settings["micro_batches"], context.work_dir
    switch_off_dropout(model)
    kinds = ("ragged",) if isinstance(run, ClassificationRun) else ("equal", "ragged")
    data = {lengths: rows_of(run, ingredients, lengths, spec.seed) for lengths in kinds}
    full = {lengths: trainer_gradient(model, *rows, 1, folder) for lengths, rows in data.items()}
    ways: dict[str, Any] = {"formula": mean_gradient, "trainer": partial(trainer_gradient, folder=folder)}
    for way in ("formula", "trainer", "prepared"):
        if way == "prepared":
            get_preset("sft").prepare(model)
        for lengths, (rows, collator) in data.items():
            stop_between_parts(context)
            gradient = ways.get(way, ways["trainer"])(model, rows, collator, parts)
            observe_difference(into, gradient, full[lengths], way=way, lengths=lengths)
    large = dataclasses.replace(run, batch_size=run.batch_size * spec.settings["large_batch"])
    rows, collator = rows_of(large, ingredients, "equal", spec.seed)
    for arm, pieces in (("full", 1), ("accumulated", parts)):
        stop_between_parts(context)
        measure = MeasureMemory()
        arguments = arguments_of(folder, 2, large.batch_size // pieces, pieces, learning_rate=1e-6)
        run_trainer(model, rows, collator, arguments, [measure])
        assert measure.measured is not None
        into.observations.append(Observation.of(PEAK_MEMORY, measure.measured.peak_bytes, 2, arm=arm))


def measure_checkpointing(
    spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements
) -> None:
    """Operations, time and memory of a training step that keeps activations, and of one that computes them again."""
    arms: dict[str, Any] = {"kept": nullcontext, "checkpointed": partial(checkpointed, ingredients.model)}
    batch = full_batch(run, ingredients, spec.seed, 1)
    for arm, entered in arms.items():
        with entered():
            observe_compute(into, ingredients.model, batch, arm)
    stop_between_parts(context)
    observe_times(into, run, ingredients, arms, spec.settings["timed_rounds"], "arm")
    for arm, entered in arms.items():
        stop_between_parts(context)
        with entered():
            observe_memory(into, run, ingredients, spec.seed, context.work_dir / arm, predict=False, arm=arm)


def measure_offload(spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements) -> None:
    """Peak memory and time of a step without offload and with each tactic; the order rotates with the seed."""
    arms = ["none", *spec.settings["offload"]]
    shift, rounds = spec.seed % len(arms), spec.settings["timed_rounds"]
    ingredients.model.to("cpu")  # not to count on the device: every arm has its own
    for arm in arms[shift:] + arms[:shift]:
        stop_between_parts(context)
        preset = get_preset("sft", offload=None if arm == "none" else arm, per_device_train_batch_size=run.batch_size)
        model = preset.prepare(prepare(run, spec.seed).model)
        measure, times = MeasureMemory(), StepTimes()
        more = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        arguments = preset.get_training_args(max_steps=2 + rounds, output_dir=str(context.work_dir / arm), **more)
        trainer = run_trainer(model, ingredients.train, default_data_collator, arguments, [measure, times])
        assert measure.measured is not None and trainer.optimizer is not None
        into.observations.append(Observation.of(PEAK_MEMORY, measure.measured.peak_bytes, 2, arm=arm))
        into.observations.append(Observation.of(STEP_TIME, statistics.median(times.seconds[2:]), 2, arm=arm))
        hooks = [getattr(h, "__qualname__", "") for h in model._forward_pre_hooks.values()]
        found = ["activations"] if any("offload_activations" in name for name in hooks) else []
        found += ["optimizer"] if "paged" in str(arguments.optim) else []
        into.checks += ManipulationCheck.each(**{f"offloaded {arm}": ([] if arm == "none" else [arm], found)})
