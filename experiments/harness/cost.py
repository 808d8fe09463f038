"""What a training step costs: its peak memory by component, measured and predicted, and its time, arm against arm."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from experiments.harness.experiment import Preempted, TrialContext
from experiments.harness.record import (
    GRADIENT_MEMORY,
    OPTIMIZER_MEMORY,
    PARAMETER_MEMORY,
    PEAK_MEMORY,
    PREDICTED_PEAK,
    STEP_TIME,
    TOKENS_PER_SECOND,
    TRAINABLE_PARAMS,
    ManipulationCheck,
    Measurements,
    Observation,
    Scalar,
)
from experiments.harness.tasks import Run, collator_of, fixed_length_collator

if TYPE_CHECKING:
    from forge.memory import MeasuredMemory

MEASURED_STEP = 2
"""The first one in which the optimizer has state from its beginning."""


@dataclass(frozen=True)
class Part:
    """The context of a part of a trial that is not resumed by itself: its own folder, no W&B, no early stop."""

    work_dir: Path

    def report(self, step: int, total: int, **figures: float | str | None) -> None:
        """Nothing: the trial reports."""

    def should_stop(self) -> bool:
        """Never: the trial asks between its parts."""
        return False

    def wandb_run_id(self) -> str | None:
        """None."""
        return None


@dataclass(frozen=True)
class Whole(Part):
    """The context of a trial whose training is not resumed: no early stop, all else as usual."""

    trial: TrialContext

    def report(self, step: int, total: int, **figures: float | str | None) -> None:
        """As the trial's context does."""
        self.trial.report(step, total, **figures)

    def wandb_run_id(self) -> str | None:
        """Id of the trial's W&B run."""
        return self.trial.wandb_run_id()


def stop_between_parts(context: TrialContext) -> None:
    """Let a trial of many short parts stop early; it begins anew at the next call.

    Raises:
        Preempted: if the context asks to stop.
    """
    if context.should_stop():
        raise Preempted("stopped between two parts")


def observe_memory(
    into: Measurements,
    run: Run,
    ingredients: Any,
    seed: int,
    work_dir: Path,
    *,
    predict: bool = True,
    **conditions: Scalar,
) -> MeasuredMemory:
    """Add the peak memory of a real training step by component, and what is predicted for it.

    The step is the second one of a ``Trainer`` run, on a batch of ``run.sequence_length`` tokens; it trains the model.
    A check says whether the real gradients are as large as what is trainable.

    Args:
        into: gets the observations and the check.
        run: the recipe.
        ingredients: of the run, with the model as it is to be trained.
        seed: of the data order.
        work_dir: for the Trainer's files.
        predict: also predict it.
        **conditions: of the observations.
    """
    from experiments.harness.training import train
    from forge.memory import MeasureMemory, profile_training_memory

    model, figures = ingredients.model, {}
    if predict:
        predicted = profile_training_memory(
            model,
            run.batch_size,
            run.sequence_length,
            autocast=torch.bfloat16 if run.precision == "bf16" else None,
            padding=collator_of(ingredients) is not None,
            target="cuda" if torch.cuda.is_available() else "cpu",
        )
        figures[PREDICTED_PEAK] = predicted.peak_bytes
    measure = MeasureMemory(step=MEASURED_STEP)
    plan = run.plan(seed, MEASURED_STEP, "constant")
    collator = fixed_length_collator(run, ingredients)
    train(model, ingredients.train, ingredients.validation, plan, Part(work_dir), [measure], collator=collator)
    measured = measure.measured
    assert measured is not None  # or train() would have raised
    trainable = [p for p in model.parameters() if p.requires_grad]
    expected = sum(p.numel() * p.element_size() for p in trainable)
    name = " ".join(["gradient_bytes", *map(str, conditions.values())])
    into.checks += ManipulationCheck.each(**{name: (expected, measured.gradients_bytes)})
    figures |= {
        PEAK_MEMORY: measured.peak_bytes,
        PARAMETER_MEMORY: measured.parameters_bytes,
        GRADIENT_MEMORY: measured.gradients_bytes,
        OPTIMIZER_MEMORY: measured.optimizer_bytes,
        TRAINABLE_PARAMS: sum(p.numel() for p in trainable),
    }
    into.observations += [Observation.of(metric, v, MEASURED_STEP, **conditions) for metric, v in figures.items()]
    return measured


def observe_times(
    into: Measurements,
    run: Run,
    ingredients: Any,
    arms: Mapping[str, Callable[[], AbstractContextManager[None]]],
    rounds: int,
    condition: str,
) -> None:
    """Add the time of a training step of every arm, see ``step_times``; its name goes under ``condition``."""
    from torch.utils.data import DataLoader

    from experiments.harness.training import autocast

    loader = DataLoader(
        ingredients.train, batch_size=run.batch_size, collate_fn=fixed_length_collator(run, ingredients)
    )
    batches = [dict(batch) for batch in itertools.islice(itertools.cycle(loader), rounds + 1)]
    seconds = step_times(ingredients.model, batches, arms, run.learning_rate, autocast(run.precision))
    tokens = run.batch_size * run.sequence_length
    into.tokens += tokens * len(batches) * len(arms)
    for arm, value in seconds.items():
        at = {condition: arm}
        into.observations.append(Observation.of(STEP_TIME, value, rounds, **at))
        into.observations.append(Observation.of(TOKENS_PER_SECOND, tokens / value, rounds, **at))


def step_times(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    arms: Mapping[str, Callable[[], AbstractContextManager[None]]],
    learning_rate: float,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, float]:
    """Median seconds of a training step of every arm, all arms on one model in turn.

    Each round runs every arm once, on the same batch, see ``times_in_turn``. A step is forward pass, backward pass,
    AdamW (fused, as the harness trains) and zeroing; parameters that an arm freezes have no gradient, and the optimizer
    passes them over. The first round is not counted.

    Args:
        model: on the device of the run.
        batches: one for each round, at least two.
        arms: context managers that freeze and thaw; entering is not timed.
        learning_rate: of AdamW.
        autocast: as for ``training.autocast``.
    """
    device = next(model.parameters()).device
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, fused=True)

    def step(inputs: Mapping[str, torch.Tensor]) -> None:
        with autocast():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def piece(arm: str, turn: int) -> float:
        inputs = {name: tensor.to(device) for name, tensor in batches[turn].items()}
        with arms[arm]():
            return timed(partial(step, inputs))

    return times_in_turn(arms, len(batches) - 1, piece)


def times_in_turn(
    names: Iterable[str], rounds: int, piece: Callable[[str, int], float], uncounted: int = 1
) -> dict[str, float]:
    """Median seconds of pieces of work; every round does each once, in rotating order, so that a slow minute of the
    machine hits all of them.

    Args:
        names: of the pieces.
        rounds: that count.
        piece: does one in a round (of all, from 0), and returns the seconds that it took, see ``timed``.
        uncounted: rounds before those.
    """
    names = list(names)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(uncounted + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(piece(name, turn))
    return {name: statistics.median(values[uncounted:]) for name, values in seconds.items()}


def timed(work: Callable[[], object]) -> float:
    """Seconds of a piece of work, to the end of what it started on a GPU."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for a GPU, so that a clock can be read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
