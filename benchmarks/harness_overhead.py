"""What the harness costs: tokens/s of a training run inside it, over those of a bare ``Trainer`` of the same settings.

    python benchmarks/harness_overhead.py --threads 2

Both train a model of SmolLM2-135M's shape on the same blocks, in alternating order: one by ``harness.training.train``
with a worker's context (progress, the wish to stop) and an offline W&B run to which the Trainer logs, as a trial has
them; the other by ``Trainer`` alone. Timed is ``train()``; what a trial does before and after it (data, weights,
evaluation, the record) is no overhead of a step.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from timing import build_model, median_interval, paired_ratio

if TYPE_CHECKING:
    from torch import nn

    from experiments.harness.data import Blocks
    from experiments.harness.training import TrainingPlan

BARE, HARNESS = "Trainer alone", "harness"
TARGET = 0.98
"""Least share of the bare Trainer's tokens/s that an arm should have."""


@dataclass(frozen=True)
class Settings:
    """Measure what the harness costs a training run."""

    model_size: Literal["smollm2-135m", "tiny"] = "smollm2-135m"
    """Shapes of the model."""
    batch_size: int = 4
    """Blocks of a step."""
    sequence_length: int = 128
    """Tokens of a block."""
    steps: int = 10
    """Optimizer steps of a run."""
    threads: int = 1
    """CPU threads of torch."""
    rounds: int = 6
    """Measured rounds; each trains once with and once without the harness."""
    json: Path | None = None
    """File for the figures, in tokens/s."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; the default is a short run")
        if self.rounds < 6:
            raise ValueError(f"rounds must be at least 6 for an interval of the median, got {self.rounds}; give more")


def blocks_of(settings: Settings) -> Blocks:
    """Random tokens as packed text, enough for every step."""
    import numpy as np

    from experiments.harness.data import Blocks

    shape = (settings.batch_size * settings.steps, settings.sequence_length)
    return Blocks(np.random.default_rng(0).integers(0, 1_000, shape), np.zeros(shape, dtype=int), ("random",))


def plan_of(settings: Settings) -> TrainingPlan:
    """The recipe of both."""
    from experiments.harness.causal_lm import CausalLMRun

    run = CausalLMRun(batch_size=settings.batch_size, sequence_length=settings.sequence_length, precision="fp32")
    return run.plan(0, settings.steps, "cosine")


def seconds_bare(model: nn.Module, blocks: Blocks, plan: TrainingPlan, folder: Path) -> float:
    """A script as a user would write it."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=plan.schedule,
        warmup_steps=round(plan.warmup_ratio * plan.steps),
        seed=plan.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=blocks)
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


def seconds_in_harness(model: nn.Module, blocks: Blocks, plan: TrainingPlan, folder: Path) -> float:
    """The same in a worker's context."""
    from experiments.harness.record import TrialSpec
    from experiments.harness.tracking import wandb_run
    from experiments.harness.training import train
    from experiments.harness.worker import WorkerContext

    spec = TrialSpec(experiment="overhead", version=1, scale="smoke", seed=0, factors={}, settings={})
    with wandb_run(spec, "offline", folder / "wandb") as run_id:
        context = WorkerContext(folder, run_id, lambda: False)
        return train(model, blocks, blocks, plan, context).training_sec


def main(settings: Settings) -> None:
    """Measure, print and, where asked, store the figures."""
    import torch

    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    if os.getloadavg()[0] > 0.5:
        print(f"the load average is {os.getloadavg()[0]:.1f}: the figures below are of a busy machine", file=sys.stderr)
    plain, blocks, plan = build_model(settings.model_size, "cpu"), blocks_of(settings), plan_of(settings)
    contenders = {BARE: seconds_bare, HARNESS: seconds_in_harness}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    names, tokens = list(contenders), settings.steps * settings.batch_size * settings.sequence_length
    for turn in range(1 + settings.rounds):
        for name in names if turn % 2 else reversed(names):
            with tempfile.TemporaryDirectory() as folder:
                seconds = contenders[name](copy.deepcopy(plain), blocks, plan, Path(folder))
            if turn:  # the first round is not counted
                rates[name].append(tokens / seconds)
    share, (low, high) = paired_ratio(rates[HARNESS], rates[BARE])
    for name, values in rates.items():
        least, most = median_interval(values)
        print(f"{name}: {statistics.median(values):.1f} [{least:.1f}, {most:.1f}] tokens/s")
    met = "met" if low >= TARGET else "met within noise" if high >= TARGET else "missed"
    print(f"harness / Trainer alone: {share:.4f} [{low:.4f}, {high:.4f}] (target {TARGET}: {met})")
    if settings.json is not None:
        settings.json.write_text(json.dumps({"tokens_per_second": rates, "share": share, "interval": [low, high]}))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings))
