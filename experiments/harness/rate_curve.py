"""An arm that is trained at each of several learning rates: its scores, its tuned outcome, its usable band."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
"""Test outcomes at the learning rate that validation chose; none where it chose an end of those that were tried."""
CHOSEN_RATE = Metric("chosen_learning_rate", "1", "none")
CHOSEN_AT_EDGE = Metric("chosen_at_edge", "1", "minimize")
"""1 where it is the least or the greatest of those that were tried."""
USABLE_DECADES = Metric("usable_decades", "1", "maximize")
"""Width of the usable band in powers of ten."""
HIGHEST_USABLE = Metric("highest_usable_learning_rate", "1", "maximize")
NO_GAIN = Metric("no_gain", "1", "minimize")
"""1 where the trained model is no better on test than the best constant answer, or its loss is not finite."""


@dataclass(frozen=True)
class RateRun:
    """What training at one learning rate came to; of JSON's types throughout."""

    learning_rate: float
    scores: Mapping[str, Sequence[float]]
    """By split, in the order of ``metrics_of``: the loss first."""
    checks: Mapping[str, Sequence[Any]]
    """Proof that the run was as the arm says: due and found."""
    training_sec: float
    evaluation_sec: float

    def loss(self, split: str) -> float:
        """Infinite where it is not finite."""
        loss = self.scores[split][0]
        return loss if math.isfinite(loss) else math.inf


def metrics_of(run: Run) -> tuple[Metric, ...]:
    """What a run of the task is scored by, the loss first."""
    return (CLASSIFIER_LOSS, ACCURACY) if isinstance(run, ClassificationRun) else (EVAL_LOSS,)


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


def train_at(rate: float, run: Run, arm: Arm, steps: int, ingredients: Any, seed: int, work_dir: Path) -> RateRun:
    """Train a copy of the model at one learning rate.

    Args:
        rate: peak of the schedule.
        run: task and recipe; the arm decides batch size, schedule and warm-up.
        arm: as it is to be.
        steps: optimizer steps.
        ingredients: with the model as it begins, which is left as it is.
        seed: of data order and dropout.
        work_dir: of this run alone.
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
    began = time.monotonic()
    trained = dataclasses.replace(ingredients, model=model)
    scores = {split: scores_on(split, run, trained) for split in ("validation", "test")}
    return RateRun(rate, scores, checks, outcome.training_sec, time.monotonic() - began)


def scores_on(split: str, run: Run, ingredients: Any) -> list[float]:
    """Values of ``metrics_of`` the run; in batches of one size, whatever the arm's."""
    held_out = dataclasses.replace(ingredients, test=getattr(ingredients, split))
    run, arms = dataclasses.replace(run, batch_size=EVALUATION_BATCH), {split: nullcontext}
    if isinstance(run, ClassificationRun):
        metrics = classification.outcomes_on_test(run, held_out, arms)[0][split].metrics
        return [metrics["cross_entropy"], metrics["accuracy"]]
    return [causal_lm.losses_on_test(run, held_out, arms)[0][split].loss]


def enclose(loss_at: Callable[[float], float], middle: float, factor: float, most: int) -> list[float]:
    """Try learning rates a factor apart, from ``middle`` on, until the best of them has a worse one on either side.

    Args:
        loss_at: trains at a rate and says the loss by which it is judged.
        middle: where to begin, with its two neighbours.
        factor: between neighbours, above 1.
        most: how many are tried at most, at least 3.

    Returns:
        What was tried, rising; the best one is at an end only if ``most`` were too few.
    """

    def nth(n: int) -> float:
        return float(f"{middle * factor**n:.2g}")

    losses = {n: loss_at(nth(n)) for n in (-1, 0, 1)}
    while len(losses) < most:
        best = min(losses, key=losses.__getitem__)
        if min(losses) < best < max(losses):
            break
        n = best - 1 if best == min(losses) else best + 1
        losses[n] = loss_at(nth(n))
    return [nth(n) for n in sorted(losses)]


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
    into: Measurements,
    run: Run,
    arm: Arm,
    steps: int,
    runs: Sequence[RateRun],
    tried: Sequence[float],
    long_grid: Sequence[float],
    no_skill: float,
) -> None:
    """Add every run's scores and checks, the arm's tuned ones, and on a long grid its band of usable learning rates.

    Args:
        into: gets the outcome, or the note that the arm diverged where no loss is finite.
        run: the task.
        arm: what was trained.
        steps: optimizer steps of each run.
        runs: learning rates rising.
        tried: the rates among which validation chooses, rising.
        long_grid: the rates of the learning-rate curve; none where it is of no interest.
        no_skill: test loss from which on training has brought nothing.
    """
    for part in ("training", "evaluation"):
        into.seconds[part] += sum(getattr(each, f"{part}_sec") for each in runs)
    into.checks += ManipulationCheck.each(
        **{f"{name} at {each.learning_rate:g}": pair for each in runs for name, pair in each.checks.items()}
    )
    add = into.observations.append
    for each in runs:
        at = {"learning_rate": each.learning_rate, "grid": "long" if each.learning_rate in long_grid else "search"}
        for split, values in each.scores.items():
            for metric, value in zip(metrics_of(run), values, strict=True):
                if math.isfinite(value):
                    add(Observation.of(metric, value, steps, split=split, **at, **arm.conditions))
        no_gain = float(each.loss("test") >= no_skill)
        add(Observation.of(NO_GAIN, no_gain, steps, split="test", **at, **arm.conditions))
    chosen = min((each for each in runs if each.learning_rate in tried), key=lambda each: each.loss("validation"))
    if not math.isfinite(chosen.loss("validation")):
        into.diverged = f"the loss is not finite at any learning rate from {tried[0]:g} to {tried[-1]:g}"
        return
    at_edge = chosen.learning_rate in (tried[0], tried[-1])
    tuned = {CHOSEN_RATE: chosen.learning_rate, CHOSEN_AT_EDGE: float(at_edge)}
    if not at_edge:
        tuned |= dict(zip((TUNED_LOSS, TUNED_ACCURACY), chosen.scores["test"], strict=False))
    if long_grid:
        low, high = usable_band([r.learning_rate for r in runs], [r.loss("test") for r in runs], USABLE_WITHIN)
        tuned |= {USABLE_DECADES: math.log10(high / low), HIGHEST_USABLE: high}
    for metric, value in tuned.items():
        add(Observation.of(metric, value, steps, split="test", **arm.conditions))


def usable_band(rates: Sequence[float], losses: Sequence[float], within: float) -> tuple[float, float]:
    """Ends of the interval of rates around the best in which the loss is at most ``(1 + within)`` times the least.

    Between two grid points the loss is linear in log10(rate); at an end of the grid the band ends too.

    Args:
        rates: rising.
        losses: one a rate, positive; infinite where training broke.
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
