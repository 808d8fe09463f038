"""An arm that is trained at each of several learning rates: its scores, its tuned outcome, its usable band."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.harness import causal_lm, classification
from experiments.harness.classification import ACCURACY, CLASSIFIER_LOSS, ClassificationRun
from experiments.harness.lora import LoraArm, add_lora, lora_facts
from experiments.harness.record import EVAL_LOSS, TRAINABLE_PARAMS, ManipulationCheck, Measurements, Metric, Observation
from experiments.harness.tasks import Run, collator_of, prepare

if TYPE_CHECKING:
    from torch import nn

EVALUATION_BATCH = 32
USABLE_WITHIN = 0.05
"""Share by which the test loss may exceed that at the best learning rate."""

TUNED_LOSS = Metric("tuned_loss", "nats", "minimize")
TUNED_ACCURACY = Metric("tuned_accuracy", "1", "maximize")
"""Test outcomes at the learning rate that validation chose."""
CHOSEN_RATE = Metric("chosen_learning_rate", "1", "none")
CHOSEN_AT_EDGE = Metric("chosen_at_edge", "1", "minimize")
"""1 where it is the least or the greatest of those to choose among."""
USABLE_DECADES = Metric("usable_decades", "1", "maximize")
"""Width of the usable band in powers of ten."""
HIGHEST_USABLE = Metric("highest_usable_learning_rate", "1", "maximize")
NO_GAIN = Metric("no_gain", "1", "minimize")
"""1 where the trained model is no better on test than the best constant answer."""

Scores = Mapping[str, Mapping[Metric, float]]
"""By split: the loss first, then whatever else the task measures."""


@dataclass(frozen=True)
class Arm:
    """Everything about a run but its task, its seed and its learning rate."""

    lora: LoraArm | None
    """None: all weights train."""
    batch_size: int
    schedule: str = "cosine"
    """As in ``TrainingPlan``."""
    warmup_ratio: float = 0.1
    long_grid: bool = False
    """Whether its learning-rate curve is of interest beyond the best rate."""

    @property
    def conditions(self) -> dict[str, Any]:
        """What describes it in the observations."""
        own = {"batch_size": self.batch_size, "schedule": self.schedule, "warmup_ratio": self.warmup_ratio}
        if self.lora is None:
            return own
        lora = {"rank_on_qkvo": self.lora.rank, "alpha_ratio": self.lora.alpha_ratio, "targets": self.lora.targets}
        return own | lora


def begin(into: Measurements, run: Run, arm: Arm, seed: int) -> Any:
    """The ingredients with the model as every run of the arm begins with it; the proof of what trains in it.

    Args:
        into: gets the proof, the number of trainable parameters and the digests.
        run: task and recipe, with all weights training.
        arm: whether and where there is LoRA.
        seed: of the data, the head and the adapters.
    """
    ingredients: Any = prepare(run, seed)
    model = ingredients.model
    if arm.lora is None:
        facts: dict[str, tuple[object, object]] = {
            "params_frozen": (0, sum(not p.requires_grad for p in model.parameters()))
        }
    else:
        model = add_lora(copy.deepcopy(model), arm.lora, seed)
        facts = lora_facts(ingredients.model, model, arm.lora, with_head=isinstance(run, ClassificationRun))
    into.checks += ManipulationCheck.each(**facts)
    into.digests = ingredients.digests
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    into.observations.append(Observation.of(TRAINABLE_PARAMS, trainable, 0, **arm.conditions))
    return dataclasses.replace(ingredients, model=model)


def train_at(
    rate: float, into: Measurements, run: Run, arm: Arm, steps: int, ingredients: Any, seed: int, work_dir: Path
) -> Scores:
    """Train a copy of the model at one learning rate.

    Args:
        rate: peak of the schedule.
        into: gets the seconds and the proof that the run was as the arm says.
        run: task and recipe; the arm decides batch size, schedule and warm-up.
        arm: as it is to be.
        steps: optimizer steps.
        ingredients: with the model as it begins, which is left as it is.
        seed: of data order and dropout.
        work_dir: of this run alone.

    Returns:
        The scores on validation and test.
    """
    from experiments.harness.cost import Part
    from experiments.harness.training import train

    model = copy.deepcopy(ingredients.model)
    run = dataclasses.replace(run, batch_size=arm.batch_size, learning_rate=rate, warmup_ratio=arm.warmup_ratio)
    plan, collator = run.plan(seed, steps, arm.schedule), collator_of(ingredients)
    outcome = train(model, ingredients.train, ingredients.validation, plan, Part(work_dir), collator=collator)
    state, arguments = outcome.trainer.state, outcome.trainer.args
    checks = {
        "examples": (steps * arm.batch_size, state.global_step * arguments.train_batch_size),
        "schedule": schedule_facts(arm, rate, steps, outcome.trainer.lr_scheduler),
        "frozen_weights_that_moved": ([], frozen_weights_that_moved(ingredients.model, model)),
    }
    into.checks += ManipulationCheck.each(**{f"{name} at {rate:g}": check for name, check in checks.items()})
    began = time.monotonic()
    trained = dataclasses.replace(ingredients, model=model)
    scores = {split: scores_on(split, run, trained) for split in ("validation", "test")}
    into.seconds["training"] += outcome.training_sec
    into.seconds["evaluation"] += time.monotonic() - began
    return scores


def scores_on(split: str, run: Run, ingredients: Any) -> dict[Metric, float]:
    """Loss, and of a classifier the accuracy; in batches of one size, whatever the arm's."""
    held_out = dataclasses.replace(ingredients, test=getattr(ingredients, split))
    run, arms = dataclasses.replace(run, batch_size=EVALUATION_BATCH), {split: nullcontext}
    if isinstance(run, ClassificationRun):
        metrics = classification.outcomes_on_test(run, held_out, arms)[0][split].metrics
        return {CLASSIFIER_LOSS: metrics["cross_entropy"], ACCURACY: metrics["accuracy"]}
    return {EVAL_LOSS: causal_lm.losses_on_test(run, held_out, arms)[0][split].loss}


def loss_without_skill(run: Run, ingredients: Any) -> float:
    """Test loss of the best constant answer: the entropy of the labels, of a language model that of the tokens."""
    import numpy as np

    test = ingredients.test
    labels = test.labels if isinstance(run, ClassificationRun) else test.input_ids[:, 1:]
    share = np.unique(labels, return_counts=True)[1] / np.size(labels)
    return float(-(share * np.log(share)).sum())


def schedule_facts(arm: Arm, rate: float, steps: int, scheduler: Any) -> tuple[list[float], list[float]]:
    """Share of the peak at the first step and three quarters down the decay, and the last rate: due and found."""
    warmup = round(arm.warmup_ratio * steps)
    late = warmup + 3 * (steps - warmup) // 4
    progress = (late - warmup) / max(1, steps - warmup)
    decayed = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[arm.schedule]
    due = [0.0 if warmup else 1.0, decayed, rate if arm.schedule == "constant" else 0.0]
    (share,) = scheduler.lr_lambdas[:1]
    found = [share(0), share(late), scheduler.get_last_lr()[0]]
    return [round(value, 9) for value in due], [round(value, 9) for value in found]


def frozen_weights_that_moved(before: nn.Module, after: nn.Module) -> list[str]:
    """Names of weights that should not have trained and are not what they were."""
    old = dict(before.named_parameters())
    frozen = [(name, p) for name, p in after.named_parameters() if not p.requires_grad]
    return [name for name, p in frozen if not bool((p == old[name].to(p.device)).all())]


def observe_curve(
    into: Measurements, arm: Arm, steps: int, scores: Mapping[float, Scores], small: Sequence[float], no_skill: float
) -> None:
    """Add every run's scores, the arm's tuned ones, and on a long grid its band of usable learning rates.

    Args:
        into: gets the outcome, or the note that the arm diverged where a loss is not finite.
        arm: what was trained.
        steps: optimizer steps of each run.
        scores: by learning rate, rising.
        small: the rates among which the arm's is chosen.
        no_skill: test loss from which on training has brought nothing.
    """
    losses = {rate: {split: next(iter(of.values())) for split, of in both.items()} for rate, both in scores.items()}
    if broken := [rate for rate, both in losses.items() if not all(map(math.isfinite, both.values()))]:
        into.diverged = f"the loss is not finite at learning rate {broken[0]:g}"
        return
    conditions, add = arm.conditions, into.observations.append
    for rate, both in scores.items():
        for split, values in both.items():
            for metric, value in values.items():
                add(Observation.of(metric, value, steps, split=split, learning_rate=rate, **conditions))
        no_gain = float(losses[rate]["test"] >= no_skill)
        add(Observation.of(NO_GAIN, no_gain, steps, split="test", learning_rate=rate, **conditions))
    chosen = min(small, key=lambda rate: losses[rate]["validation"])
    tuned = dict(zip((TUNED_LOSS, TUNED_ACCURACY), scores[chosen]["test"].values(), strict=False))
    tuned |= {CHOSEN_RATE: chosen, CHOSEN_AT_EDGE: float(chosen in (small[0], small[-1]))}
    if arm.long_grid:
        low, high = usable_band(list(losses), [both["test"] for both in losses.values()], USABLE_WITHIN)
        tuned |= {USABLE_DECADES: math.log10(high / low), HIGHEST_USABLE: high}
    for metric, value in tuned.items():
        add(Observation.of(metric, value, steps, split="test", **conditions))


def usable_band(rates: Sequence[float], losses: Sequence[float], within: float) -> tuple[float, float]:
    """Ends of the interval of rates around the best in which the loss is at most ``(1 + within)`` times the least.

    Between two grid points the loss is linear in log10(rate); at an end of the grid the band ends too.

    Args:
        rates: rising.
        losses: one a rate, positive.
        within: share of the least loss.
    """
    best = min(range(len(losses)), key=losses.__getitem__)
    limit = (1 + within) * losses[best]

    def end(step: int) -> float:
        inside = best
        while 0 <= inside + step < len(rates) and losses[inside + step] <= limit:
            inside += step
        outside = inside + step
        if not 0 <= outside < len(rates):
            return rates[inside]
        share = (limit - losses[inside]) / (losses[outside] - losses[inside])
        return float(rates[inside] * (rates[outside] / rates[inside]) ** share)

    return end(-1), end(+1)
