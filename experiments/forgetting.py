"""What does fine-tuning lose: does it forget other text, and overfit, and more so on little data or at a high rate?

Serves the section on classic fine-tuning (seed 004, its pitfalls) in THEORY.md.

Design. Factors: {all weights, LoRA} × cell × seed, on a pretrained decoder. A cell differs from the base cell in one
thing: little data (as many steps, on a tenth of the blocks, each seen ten times instead of once) or a learning rate ten
times as high. A seed draws the training blocks, those of the small cell among those of the base cell, and their order;
it draws LoRA's initial weights too. Recipes are the usual ones of a method, not tuned: forgetting after tuning is a
claim of ``sft_vs_lora_vs_qlora``. Measured before and after: loss on the test split of the domain that is trained on
and of another one (its rise is forgetting), and on the training blocks (its distance to test is overfitting).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.claims import Claim, Estimand, Interaction, Region, RelativeReduction, Selector
from experiments.harness.experiment import Experiment, TrialContext, UserError
from experiments.harness.record import (
    EVAL_LOSS,
    OTHER_LOSS,
    ManipulationCheck,
    Measurements,
    Observation,
    TrialSpec,
)
from experiments.harness.training_run import hidden

if TYPE_CHECKING:
    from experiments.harness.causal_lm import Ingredients
    from experiments.harness.data import Blocks

METHODS = ("full", "lora")
BASE, SMALL_DATA, HIGH_RATE = "base", "small_data", "high_rate"


@dataclass(frozen=True)
class Cells(CausalLMRun):
    """The base cell, and what each of the others changes in it."""

    method: Annotated[Literal["full", "lora"], hidden()] = "full"
    """Unused: both are run."""
    learning_rate: float = 5e-5
    """Peak learning rate where all weights train."""
    lora_learning_rate: float = 5e-4
    """Peak learning rate of LoRA."""
    high_rate_factor: float = 10.0
    """How many times as high the learning rate of the cell with a high one is."""
    steps: int = 40
    """Optimizer steps of every cell; the base cell sees each of its blocks once."""
    passes: int = 10
    """How often the cell with little data sees each of its blocks; a divisor of the steps."""
    other_dataset: str = "state_of_the_union"
    """The domain on which forgetting is measured."""
    test_blocks: int = 24
    """Blocks of each evaluation: of both domains, and of the training text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("steps", "passes")
        if not self.lora_learning_rate > 0:
            raise UserError(f"lora_learning_rate must be positive, got {self.lora_learning_rate}")
        if not self.high_rate_factor > 1:
            raise UserError(f"high_rate_factor must be above 1, got {self.high_rate_factor}")
        if self.steps % self.passes:
            raise UserError(
                f"passes must divide steps = {self.steps}, got {self.passes}; that often each block "
                "of the cell with little data is seen"
            )


@dataclass(frozen=True)
class Settings:
    """Options of one campaign."""

    seeds: int
    """Number of seeds, the unit of replication."""
    cells: Cells
    """The cells."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")


SCALES = {
    "smoke": Settings(
        seeds=2,
        cells=Cells(
            model="tiny-random", random_init=True, steps=4, batch_size=2, sequence_length=32, precision="fp32",
            passes=4, validation_blocks=2, test_blocks=2,
        ),
    ),
    "laptop": Settings(seeds=3, cells=Cells(steps=20, test_blocks=16)),
    "cpu": Settings(seeds=5, cells=Cells()),
    "gpu": Settings(
        seeds=10, cells=Cells(steps=500, batch_size=8, sequence_length=256, validation_blocks=64, test_blocks=128)
    ),
}  # fmt: skip

COST = {
    "smoke": "under 1 min on 1 core, no download",
    "laptop": "planned for 20 core-min; not yet measured",
    "cpu": "about 35 min on 2 cores with --workers 2",
    "gpu": "planned for 1 h on one 80 GB GPU; not yet measured",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """Method × cell, seed by seed, so that an early stop leaves whole pairs."""
    shared = {"cells": dataclasses.asdict(settings.cells)}
    return [
        EXPERIMENT.spec(scale, seed, {"method": method, "cell": cell}, shared)
        for seed in range(settings.seeds)
        for method in METHODS
        for cell in (BASE, SMALL_DATA, HIGH_RATE)
    ]


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Train one cell; look at both domains and at the training blocks before and after."""
    from experiments.harness.causal_lm import prepare
    from experiments.harness.training import train

    began = time.monotonic()
    run = _run(spec)
    ingredients = prepare(run, spec.seed)
    passes = run.passes if spec.factors["cell"] == SMALL_DATA else 1
    seen = ingredients.train.drawn(run.steps * run.batch_size // passes, spec.seed)
    before = {name: p.detach().clone() for name, p in ingredients.model.named_parameters() if p.requires_grad}
    into = Measurements(tokens=run.steps * run.batch_size * run.sequence_length, digests=ingredients.digests)
    evaluation_sec = _observe(into, run, ingredients, seen, 0, "initial")
    plan = run.plan(spec.seed, run.steps, "cosine")
    outcome = train(ingredients.model, seen, ingredients.validation, plan, context)
    context.report(run.steps, run.steps, phase="test evaluation")
    evaluation_sec += _observe(into, run, ingredients, seen, run.steps, "trained")
    moved = [name for name, p in ingredients.model.named_parameters() if name in before and (p != before[name]).any()]
    into.checks = ManipulationCheck.each(
        optimizer_steps=(run.steps, outcome.trainer.state.global_step),
        passes_over_the_data=(passes, outcome.trainer.state.epoch),
        peak_learning_rate=(f"{run.learning_rate:.3e}", f"{outcome.trainer.lr_scheduler.base_lrs[0]:.3e}"),
        something_moved=(True, bool(moved)),
    )
    into.seconds = {"training": outcome.training_sec, "evaluation": evaluation_sec}
    into.seconds["overhead"] = max(0.0, time.monotonic() - began - sum(into.seconds.values()))
    return into


def _run(spec: TrialSpec) -> Cells:
    """The settings of a trial's method and cell."""
    run = Cells(**{**spec.settings["cells"], "method": spec.factors["method"]})
    rate = run.lora_learning_rate if run.method == "lora" else run.learning_rate
    factor = run.high_rate_factor if spec.factors["cell"] == HIGH_RATE else 1.0
    return dataclasses.replace(run, learning_rate=rate * factor)


def _observe(into: Measurements, run: Cells, ingredients: Ingredients, seen: Blocks, step: int, arm: str) -> float:
    """Test losses on both domains, and the loss on the training blocks; returns the seconds that it took."""
    from experiments.harness.causal_lm import losses_on_test, observe_domains

    test_sec = observe_domains(into, run, ingredients, run.other_dataset, step, arm)
    trained_on = dataclasses.replace(ingredients, test=seen.spread(run.test_blocks))
    losses, train_sec = losses_on_test(run, trained_on, {arm: nullcontext})
    if math.isfinite(losses[arm].loss):
        into.observations.append(Observation.of(EVAL_LOSS, losses[arm].loss, step, split="train", arm=arm))
    return test_sec + train_sec


_TRAINED: Selector = {"arm": "trained"}
_WORDS = {"full": "все веса, 5e-5", "lora": "LoRA, 5e-4"}
_MORE = Region(low=0.0)


def _claims(method: str) -> Iterator[Claim]:
    """What the guide says of its pitfalls, for one method; a share is positive where the sentence is true."""

    def claim(id: str, statement: str, source: str, estimand: Estimand) -> Claim:
        return Claim(
            f"forgetting-{id}-{method}", statement, "classic", source, estimand, _MORE, condition=_WORDS[method]
        )

    where: Selector = {"method": method, "split": "test"}
    pitfall = "seed 004, «Catastrophic forgetting — … если fine-tune на маленьком датасете»"
    yield claim(
        "on-small-data",
        "Модель забывает, если fine-tune на маленьком датасете: loss на чужом домене растёт",
        pitfall,
        RelativeReduction(OTHER_LOSS.name, {"arm": "initial"}, _TRAINED, {**where, "cell": SMALL_DATA}),
    )
    own = "собственное утверждение"
    for cell, id, words, source in (
        (SMALL_DATA, "more-on-small-data", "На маленьком датасете модель забывает больше", pitfall),
        (HIGH_RATE, "more-at-high-rate", "С learning rate в 10 раз выше модель забывает больше", own),
    ):
        yield claim(
            id,
            f"{words}: loss на чужом домене после обучения больше",
            source,
            RelativeReduction(OTHER_LOSS.name, {"cell": BASE}, {"cell": cell}, {**where, **_TRAINED}),
        )
    gap = RelativeReduction(EVAL_LOSS.name, {"split": "train"}, {"split": "test"}, {"method": method, **_TRAINED})
    overfitting = "seed 004, «Overfitting — особенно если мало данных и нет регуляризации»"
    yield claim(
        "overfits-on-small-data",
        "На маленьком датасете модель переобучается: разрыв между loss на тесте и на обучении больше",
        overfitting,
        Interaction(gap, {"cell": SMALL_DATA}, {"cell": BASE}),
    )
    yield claim(
        "small-data-harms-test",
        "Переобучение вредит: после обучения на маленьком датасете loss на тесте того же домена больше",
        overfitting,
        RelativeReduction(EVAL_LOSS.name, {"cell": BASE}, {"cell": SMALL_DATA}, {**where, **_TRAINED}),
    )


CLAIMS = tuple(claim for method in METHODS for claim in _claims(method))

EXPERIMENT = Experiment(
    name="forgetting",
    version=1,
    question="Does fine-tuning forget other text and overfit, and more so on little data or at a high learning rate?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
