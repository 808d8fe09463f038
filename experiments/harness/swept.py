"""A preset on a task: a sweep over its options, then its defaults and the tuned setting, trained on a fresh seed.

All training goes the way of a preset's user: ``get_preset``, ``prepare``, ``get_training_args``, ``Trainer``.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from experiments.harness import causal_lm, classification
from experiments.harness.classification import CLASSIFIER_LOSS
from experiments.harness.cost import stop_between_parts
from experiments.harness.experiment import TrialContext
from experiments.harness.methods import build, checks_before
from experiments.harness.record import EVAL_LOSS, ManipulationCheck, Measurements, Metric, Observation, Scalar
from experiments.harness.sweep import (
    IMPORTANCE,
    PRUNED_RUNS,
    RATE_DISTANCE,
    STEPS_SPENT,
    Levels,
    Rates,
    Reports,
    Space,
    SweepRun,
    best_run,
    importances,
    sweep,
)
from experiments.harness.tasks import collator_of
from experiments.harness.tuned import Subject
from experiments.harness.tuning import CHOSEN_RATE, FIRST_TUNING_SEED
from forge.presets import Preset, get_preset

DEFAULTS, TUNED = "defaults", "tuned"

RATE_AND_NEXT = "learning_rate + next"
"""In the place of an option: the importance of the learning rate and of the most important other one together."""

_LEVELS: Mapping[str, Levels] = {
    "warmup_steps": (0.0, 0.1, 0.3),
    "lr_scheduler_type": ("linear", "cosine", "constant_with_warmup"),
    "weight_decay": (0.0, 0.01, 0.1),
    "lora_r": (4, 16, 64),
    "lora_alpha": (16, 32, 64),
    "lora_dropout": (0.0, 0.1),
    "target_modules": ("attention", "all-linear"),
}
"""What is tried of every option of a preset's recipe beside the learning rate; the preset's own value joins it."""

_HELD = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm")
"""Options of a recipe that stay the preset's own: but for the last, they decide what a run costs."""

_OF_LORA = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
"""What PEFT calls them."""


def space_of(name: str, rates: Rates, runs: int, looks: int) -> Space:
    """What is searched for a preset: its learning rate and the levels of its other options, from its defaults on.

    Args:
        name: of the preset.
        rates: bounds of the learning rate.
        runs: training runs of the study.
        looks: at validation, in every run.

    Raises:
        UserError: if the preset's own learning rate is out of bounds.
    """
    preset = get_preset(name)
    own = {option: getattr(preset, option) for option in _LEVELS if option in preset.option_names()}
    levels = {option: _LEVELS[option] + (value,) * (value not in _LEVELS[option]) for option, value in own.items()}
    start = {"learning_rate": preset.learning_rate, **own}
    return Space({"learning_rate": rates, **levels}, start, runs, looks)


class Watch(TrainerCallback):
    """Looks at validation at evenly spread steps, the last one the end of the run, and stops the run when told to."""

    def __init__(self, subject: Subject, looks: int, report: Reports) -> None:
        self._subject = subject
        self._looks = looks
        self._report = report
        self.evaluation_sec = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look, if it is one of the steps."""
        if state.global_step in {state.max_steps * look // self._looks for look in range(1, self._looks + 1)}:
            figures, seconds = self._subject.on_validation()
            self.evaluation_sec += seconds
            control.should_training_stop = self._report(figures["eval_loss"]) or control.should_training_stop


def measure_swept(into: Measurements, subject: Subject, space: Space, seed: int, context: TrialContext) -> None:
    """Run the study of a preset on one seed, then train its defaults and its best setting on another, for test.

    Between two runs it may stop; finished runs of the study are not repeated at the next call.

    Args:
        into: gets observations, checks, seconds and tokens.
        subject: the preset (its ``method``) on its task.
        space: what the study searches.
        seed: of the final runs and of the sampler, below ``FIRST_TUNING_SEED``.
        context: of the trial.

    Raises:
        Preempted: if the context asks to stop.
    """

    def before_each(number: int) -> None:
        stop_between_parts(context)
        context.report(number, space.runs + 2, phase=f"run {number + 1} of the study")

    train = partial(_study_run, subject, space.looks, FIRST_TUNING_SEED + seed, context.work_dir / "study")
    runs = sweep(train, space, seed, context.work_dir / "study.json", before_each)
    for run in runs:
        _account(into, run.figures)
    best = best_run(runs)
    _observe_study(into, CLASSIFIER_LOSS if subject.classifies else EVAL_LOSS, runs, best, space)
    into.checks += _checks_of_study(runs, space)
    if best is None:
        into.diverged = f"none of {len(runs)} runs of the study has a finite validation loss"
        return
    for done, (arm, values) in enumerate(((DEFAULTS, {}), (TUNED, best.values))):
        stop_between_parts(context)
        context.report(space.runs + done, space.runs + 2, phase=f"final run of {arm}")
        _final_run(into, subject, arm, values, space, seed, context.work_dir / arm)


def prepared(
    subject: Subject, values: Mapping[str, Any], seed: int, work_dir: Path
) -> tuple[Subject, Preset, TrainingArguments]:
    """A preset with some options changed: with its model, drawn from a seed, and what goes to the Trainer."""
    gc.collect()  # a Trainer holds its model in cycles: the last one goes before the next one comes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a sweep goes where a preset warns of
        preset = get_preset(subject.method, **values)
        arguments = preset.get_training_args(
            output_dir=str(work_dir),
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_nan_inf_filter=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        )
        model = build(subject.run, subject.ingredients, seed, preset)
    run = dataclasses.replace(subject.run, precision="bf16" if arguments.bf16 else "fp32")
    return dataclasses.replace(subject, run=run).with_model(model), preset, arguments


def _fit(subject: Subject, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> dict[str, float]:
    """Train to the end of the arguments, unless a callback stops it; what it took."""
    data = subject.ingredients
    trainer = Trainer(
        model=data.model,
        args=arguments,
        data_collator=collator_of(data),
        train_dataset=data.train,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    trainer.train()
    return {
        "training_sec": time.monotonic() - began,
        "evaluation_sec": 0.0,
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "tokens": float(trainer.state.epoch or 0.0) * data.train.tokens,
    }


def _study_run(
    subject: Subject, looks: int, seed: int, work_dir: Path, values: dict[str, Scalar], reports: Reports
) -> dict[str, float]:
    """Train one setting under the eyes of the pruner."""
    tried, preset, arguments = prepared(subject, values, seed, work_dir)
    watch = Watch(tried, looks, reports)
    figures = _fit(tried, arguments, [*preset.callbacks(), watch])
    figures["training_sec"] -= watch.evaluation_sec
    return {**figures, "evaluation_sec": watch.evaluation_sec}


def _account(into: Measurements, figures: Mapping[str, float]) -> None:
    for part in ("training", "evaluation"):
        into.seconds[part] += figures[f"{part}_sec"]
    into.tokens += round(figures["tokens"])


def _observe_study(
    into: Measurements, loss: Metric, runs: Sequence[SweepRun], best: SweepRun | None, space: Space
) -> None:
    """Every run of the study with its setting, what pruning stopped and spent, the importance of every option, and how
    far the chosen learning rate is from the preset's own.
    """
    steps = max(round(run.figures["planned_steps"]) for run in runs)
    for number, run in enumerate(runs):
        if math.isfinite(run.last_loss):
            at = {"run": number, "pruned": run.pruned, "chosen": run is best, **run.values}
            into.observations.append(Observation.of(loss, run.last_loss, steps, split="validation", arm="study", **at))
    shares = importances(runs, space)
    rate = shares["learning_rate"]
    shares[RATE_AND_NEXT] = rate + max(share for option, share in shares.items() if option != "learning_rate")
    spent = {PRUNED_RUNS: float(sum(run.pruned for run in runs)), STEPS_SPENT: sum(r.figures["steps"] for r in runs)}
    if best is not None:
        own: Any = space.start["learning_rate"]
        rates: dict[str, Any] = {"chosen": best.values["learning_rate"], "threefold": 3 * own}
        far = {which: abs(math.log10(rate / own)) for which, rate in rates.items()}
        into.observations += [Observation.of(RATE_DISTANCE, d, steps, arm="study", rate=w) for w, d in far.items()]
    into.observations += [
        *(Observation.of(IMPORTANCE, share, steps, arm="study", option=option) for option, share in shares.items()),
        *(Observation.of(metric, value, steps, arm="study") for metric, value in spent.items()),
    ]


def _checks_of_study(runs: Sequence[SweepRun], space: Space) -> list[ManipulationCheck]:
    """Proof that the defaults came first, and that pruned runs alone were cut short."""
    whole = [run for run in runs if run.figures["steps"] == run.figures["planned_steps"]]
    looked = [run for run in runs if len(run.losses) == space.looks]
    finished = [run for run in runs if not run.pruned]
    return ManipulationCheck.each(
        first_run=(dict(space.start), runs[0].values),
        whole_runs=(len(finished), len(whole)),
        runs_looked_at_to_the_end=(len(finished), len(looked)),
    )


def _final_run(
    into: Measurements,
    subject: Subject,
    arm: str,
    values: Mapping[str, Scalar],
    space: Space,
    seed: int,
    work_dir: Path,
) -> None:
    """Train one setting without a look, and then look at test."""
    final, preset, arguments = prepared(subject, values, seed, work_dir)
    model = final.ingredients.model
    expected = {option: values.get(option, getattr(get_preset(subject.method), option)) for option in _HELD}
    expected |= {o: values.get(o, space.start[o]) for o in space.options if o != "target_modules"}
    checks = checks_before(final.run, subject.ingredients, model, preset)
    checks += ManipulationCheck.each(options=(expected, {o: _in_effect(o, arguments, model) for o in expected}))
    figures = _fit(final, arguments, preset.callbacks())
    _account(into, figures)
    steps = round(figures["steps"])
    checks += ManipulationCheck.each(optimizer_steps=(round(figures["planned_steps"]), steps))
    into.checks += [check.model_copy(update={"name": f"{arm} {check.name}"}) for check in checks]
    into.observations.append(Observation.of(CHOSEN_RATE, preset.learning_rate, steps, arm=arm))
    into.seconds["evaluation"] += _observe_test(into, final, arm, steps)


def _in_effect(option: str, arguments: TrainingArguments, model: Any) -> Any:
    """The value of an option in what trains: PEFT's configuration, or the Trainer's arguments."""
    if option in _OF_LORA:
        return getattr(model.peft_config["default"], _OF_LORA[option])
    value = getattr(arguments, option)
    return getattr(value, "value", value)


def _observe_test(into: Measurements, final: Subject, arm: str, steps: int) -> float:
    """Outcome on the test split; returns the seconds that it took."""
    if final.classifies:
        outcomes, seconds = classification.outcomes_on_test(final.run, final.ingredients, {arm: nullcontext})
        classification.observe(into, outcomes[arm], steps, arm)
        return seconds
    losses, seconds = causal_lm.losses_on_test(final.run, final.ingredients, {arm: nullcontext})
    causal_lm.observe(into, losses[arm], EVAL_LOSS, steps, arm)
    return seconds
