"""Training through the Hugging Face ``Trainer``: seeded, preemptible, resumable with an identical outcome."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from experiments.harness.data import Blocks, Examples
from experiments.harness.experiment import Preempted, TrialContext

Precision = Literal["fp32", "bf16"]

_SCHEDULERS = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
"""What ``TrainingArguments`` calls the schedules of a plan."""

_COMPLETE = "forge_complete"
"""Written last into a checkpoint: a checkpoint without it was interrupted while being saved, and is not used."""


@dataclass(frozen=True)
class TrainingPlan:
    """Everything about one training run that is not the model or the data."""

    steps: int
    batch_size: int
    learning_rate: float
    schedule: str
    """``constant``, ``cosine`` or ``linear`` (both to 0), after the warm-up."""
    warmup_ratio: float
    weight_decay: float
    precision: Precision
    """``bf16`` is autocast over fp32 weights."""
    seed: int
    """Of the data order and of dropout."""
    evaluate_at: tuple[int, ...] = ()
    """Optimizer steps after which the Trainer evaluates."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; a run that is asked to stop writes one in any case."""


@dataclass(frozen=True)
class TrainingOutcome:
    """What a finished run leaves beside the trained model."""

    evaluations: list[dict[str, float]]
    """One dict of metrics (with ``step``) per evaluation of raw or averaged weights, in order."""
    training_sec: float
    evaluation_sec: float
    trainer: Trainer


class _HarnessCallback(TrainerCallback):
    """Evaluates at the planned steps, reports progress, and stops with a checkpoint when asked to."""

    def __init__(self, plan: TrainingPlan, context: TrialContext, tokens_per_step: float) -> None:
        self._plan = plan
        self._context = context
        self._tokens_per_step = tokens_per_step
        self._began: tuple[float, int] | None = None
        self._loss: float | None = None
        self._evaluation_began = 0.0
        self.evaluation_sec = 0.0
        self.preempted = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step in self._plan.evaluate_at
        if self._began is None:
            self._began = (time.monotonic(), state.global_step)
        seconds = time.monotonic() - self._began[0]
        rate = self._tokens_per_step * (state.global_step - self._began[1]) / seconds if seconds > 0 else 0.0
        phase = "evaluation" if control.should_evaluate else "training"
        self._context.report(state.global_step, self._plan.steps, loss=self._loss, tokens_per_second=rate, phase=phase)
        if self._context.should_stop() and state.global_step < self._plan.steps:
            self.preempted = control.should_save = control.should_training_stop = True
        self._evaluation_began = time.monotonic()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after the EMA's own handler, so that its evaluations are counted too; once per evaluated split."""
        now = time.monotonic()
        self.evaluation_sec += now - self._evaluation_began
        self._evaluation_began = now

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._loss = kwargs["logs"].get("loss", self._loss)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()


def autocast(precision: Precision) -> Callable[[], AbstractContextManager[object]]:
    """The context under which a model of this precision is trained and evaluated."""
    if precision == "fp32":
        return nullcontext
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda: torch.autocast(device, torch.bfloat16)


def train(
    model: nn.Module,
    train_data: Blocks | Examples,
    evaluation_data: Blocks | Examples | Mapping[str, Blocks | Examples],
    plan: TrainingPlan,
    context: TrialContext,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]] | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
) -> TrainingOutcome:
    """Train a model to the end of the plan, from the last complete checkpoint if there is one.

    Args:
        model: built after the seed was set.
        train_data: packed text or labelled examples; the order is drawn from ``plan.seed``.
        evaluation_data: for the evaluations at ``plan.evaluate_at``; of several splits by name (``{"test": …}``) each
            is evaluated, with keys such as ``eval_test_loss`` and, with averages, ``eval_test_ema_0.99_loss``.
        plan: the run.
        context: work folder, progress, the wish to stop.
        callbacks: run before the harness's own, so that an EMA is updated before it is evaluated.
        collator: makes a batch of examples; needed where they differ in length.
        compute_metrics: adds metrics to the loss of each evaluation, from the logits and labels of a whole split.

    Raises:
        Preempted: if the context asked to stop; a checkpoint holds the run.
    """
    harness = _HarnessCallback(plan, context, plan.batch_size * train_data.tokens / len(train_data))
    trainer = Trainer(
        model=model,
        args=_arguments(plan, context),
        data_collator=collator,
        train_dataset=train_data,
        eval_dataset=dict(evaluation_data) if isinstance(evaluation_data, Mapping) else evaluation_data,
        compute_metrics=compute_metrics,
        callbacks=[*callbacks, harness],
    )
    trainer.remove_callback(PrinterCallback)
    spent = context.work_dir / "seconds.json"
    before = json.loads(spent.read_text()) if spent.is_file() else {"training": 0.0, "evaluation": 0.0}
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=_last_complete_checkpoint(context.work_dir / "checkpoints"))
    evaluation_sec = before["evaluation"] + harness.evaluation_sec
    training_sec = before["training"] + time.monotonic() - began - harness.evaluation_sec
    if harness.preempted:
        spent.write_text(json.dumps({"training": training_sec, "evaluation": evaluation_sec}))
        raise Preempted(f"stopped at step {trainer.state.global_step} of {plan.steps}")
    evaluations = [row for row in trainer.state.log_history if any(key.startswith("eval_") for key in row)]
    return TrainingOutcome(evaluations, training_sec, evaluation_sec, trainer)


def _arguments(plan: TrainingPlan, context: TrialContext) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(context.work_dir / "checkpoints"),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=_SCHEDULERS[plan.schedule],
        warmup_steps=round(plan.warmup_ratio * plan.steps),
        weight_decay=plan.weight_decay,
        bf16=plan.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=plan.seed,
        data_seed=plan.seed,
        eval_strategy="no",
        save_strategy="steps" if plan.checkpoint_every else "no",
        save_steps=plan.checkpoint_every or plan.steps,
        save_total_limit=1,
        logging_steps=max(1, plan.steps // 20),
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="wandb" if context.wandb_run_id() else "none",
        disable_tqdm=True,
    )


def _last_complete_checkpoint(folder: Path) -> str | None:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    for checkpoint in reversed(checkpoints):
        if (checkpoint / _COMPLETE).exists():
            return str(checkpoint)
        shutil.rmtree(checkpoint)
    return None
