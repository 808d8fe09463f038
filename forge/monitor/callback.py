"""Gradient health and loss inside the Hugging Face ``Trainer``, at every optimizer step, before clipping."""

from __future__ import annotations

import functools
import json
import logging
import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from forge.checks import check_whole
from forge.monitor.gradients import (
    GradientFinding,
    GradientReport,
    NoGradientsError,
    check_gradient_health,
    check_thresholds,
    describe,
    why_no_gradients,
)
from forge.trainer_call import saved_checkpoint, trainer_call

logger = logging.getLogger(__name__)

HISTORY_FILE = "monitor_history.json"
"""File name of the history inside a Trainer checkpoint."""

LossProblem = Literal["loss_nonfinite", "loss_spike"]
OnUnhealthy = Literal["warn", "skip", "stop"]

LOSS_ADVICE: Mapping[LossProblem, str] = {
    "loss_nonfinite": "look for rows whose labels are all -100 and for NaN in the data; try a lower learning rate, "
    "and bf16 in place of fp16",
    "loss_spike": "look at the batch; where spikes return, try a lower learning rate, a longer warm-up, clipping",
}

_HARMFUL = {"nan", "inf", "exploding", "loss_nonfinite"}
_SPIKE_WINDOW, _SPIKE_LEAST = 50, 10
_FINDINGS_KEPT = 5


@dataclass(frozen=True)
class MonitorRecord:
    """What one check saw."""

    step: int
    """Optimizer step, from 1: ``state.global_step`` after it."""
    loss: float | None
    """Mean training loss of the step over micro-batches and processes; None where the loss is not checked."""
    grad_norm: float | None
    """Norm of all gradients before clipping; None where gradients are not checked."""
    counts: Mapping[str, int]
    """Parameters of each kind of finding; 1 for ``loss_nonfinite`` and ``loss_spike``. Empty if healthy."""
    findings: tuple[GradientFinding, ...]
    """The first five."""
    action: Literal["none", "warn", "skip", "stop"]


class MonitorCallback(TrainerCallback):
    """Checks gradients and loss during ``Trainer.train()``, and warns, skips the step, or stops.

    It sees the accumulated gradient of the whole optimizer step (after the reduction over processes, before clipping;
    under fp16 with the loss scale taken out). The figures join the Trainer's own logs as ``monitor/…``, so that every
    integration of ``report_to`` gets them. A skipped step drops the gradients: parameters and optimizer state stay
    bitwise as they are, while the step counter and the learning-rate schedule move on.

    Skipping and stopping (which skips that step too) answer NaN, Inf and exploding gradients and a loss that is not
    finite; vanishing gradients and loss spikes only warn. Non-finite gradients under an fp16 ``GradScaler`` only warn
    as well: the scaler skips such steps itself and lowers its scale, which is how it works.

    Args:
        check_gradients: check the norm of every parameter's gradient, see ``check_gradient_health``.
        check_loss: check the loss for NaN, Inf and spikes. (The Trainer's log hides NaN losses unless
            ``logging_nan_inf_filter=False``.)
        every: check at every so many optimizer steps.
        on_unhealthy: ``warn``, ``skip`` the step, or ``stop`` training.
        history: number of latest checks kept in ``history`` and in checkpoints.
        vanishing_below: norm of a parameter's gradient.
        exploding_above: norm of a parameter's gradient.
        spike_deviations: a loss so many robust standard deviations (1.4826 MAD, at least 1 % of the median) above the
            median of the last 50 checks, once there are 10, is a spike.
        on_report: called with the optimizer step and the report of every check, to keep norms by parameter.

    Raises:
        TypeError, ValueError: at once for wrong options; at the start of training under FSDP or DeepSpeed, which shard
            gradients.
        NoGradientsError: at the start of training if nothing trains, at the first check if nothing has a gradient.
    """

    def __init__(
        self,
        check_gradients: bool = True,
        *,
        check_loss: bool = True,
        every: int = 1,
        on_unhealthy: OnUnhealthy = "warn",
        history: int = 1000,
        vanishing_below: float = 1e-7,
        exploding_above: float = 1e3,
        spike_deviations: float = 6.0,
        on_report: Callable[[int, GradientReport], None] | None = None,
    ) -> None:
        check_thresholds(vanishing_below, exploding_above)
        _check_options(check_gradients, check_loss, on_unhealthy, spike_deviations)
        for name, value in {"every": every, "history": history}.items():
            check_whole(name, value, hint="the default is fine for most")
        self._check_gradients, self._check_loss = check_gradients, check_loss
        self._every, self._on_unhealthy = every, on_unhealthy
        self._thresholds = {"vanishing_below": vanishing_below, "exploding_above": exploding_above}
        self._spike_deviations = spike_deviations
        self._on_report = on_report
        self.history: deque[MonitorRecord] = deque(maxlen=history)
        self._unlogged: list[MonitorRecord] = []
        self._loss: Tensor | None = None
        self._current: MonitorRecord | None = None
        self._trainer: Trainer | None = None
        self._totals: Counter[str] = Counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Start watching; take over the history of the checkpoint that training resumes from, if it has one."""
        call = trainer_call("resume_from_checkpoint")
        if call["self"].is_fsdp_enabled or call["self"].is_deepspeed_enabled:
            raise ValueError(
                "MonitorCallback needs whole gradients on every process, got FSDP or DeepSpeed; train with DDP"
            )
        if self._check_gradients and not any(p.requires_grad for p in kw["model"].parameters()):
            raise NoGradientsError(why_no_gradients(kw["model"]))
        self._follow(call["self"])
        self._unlogged, self._loss, self._current, self._totals = [], None, None, Counter()
        self.history.clear()
        if state.global_step > 0:
            self.history.extend(_load_history(Path(call["resume_from_checkpoint"]) / HISTORY_FILE))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Drop the gradients of a step that is to be skipped, and stop where that is asked for."""
        record, self._current = self._current, None
        if record is None or record.action not in ("skip", "stop"):
            return
        for parameter in kw["model"].parameters():
            parameter.grad = None
        if record.action == "stop":
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Write the history into the checkpoint that the Trainer has just written."""
        if args.should_save:
            path = saved_checkpoint(state.global_step) / HISTORY_FILE
            path.write_text(json.dumps([asdict(record) for record in self.history]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """One line on the whole run, if anything was unhealthy."""
        if self._totals["unhealthy"] and state.is_world_process_zero:
            kinds = ", ".join(
                f"{kind} in {n}" for kind, n in self._totals.items() if kind not in ("checks", "unhealthy")
            )
            logger.warning(
                "monitor: %d of %d checks unhealthy (%s)", self._totals["unhealthy"], self._totals["checks"], kinds
            )

    def _follow(self, trainer: Trainer) -> None:
        """Wrap ``training_step``, after whose last micro-batch the whole gradient exists unclipped, and ``log``.

        No event of the Trainer lies between backward and clipping. Wrappers stay, and do nothing for a trainer that is
        no longer followed, or from which this callback was removed.
        """
        if self._trainer is trainer:
            return
        self._trainer = trainer
        training_step, log = trainer.training_step, trainer.log

        @functools.wraps(training_step)
        def watched_step(*args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = training_step(*args, **kwargs)
            if self._follows(trainer):
                self._after_backward(trainer, loss)
            return loss

        @functools.wraps(log)
        def extended_log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if self._follows(trainer) and "loss" in logs:
                logs.update(_metrics(self._unlogged))
                self._unlogged = []
            log(logs, *args, **kwargs)

        for name, wrapper in {"training_step": watched_step, "log": extended_log}.items():
            setattr(trainer, name, wrapper)

    def _follows(self, trainer: Trainer) -> bool:
        return self._trainer is trainer and self in trainer.callback_handler.callbacks

    def _after_backward(self, trainer: Trainer, loss: Tensor) -> None:
        """Add up the micro-batches' losses; after the last one, check."""
        if trainer.state.global_step % self._every:
            return
        self._loss = loss if self._loss is None else self._loss + loss
        if trainer.accelerator.sync_gradients:
            whole, self._loss = self._loss, None
            self._check(trainer, trainer.model, whole)

    def _check(self, trainer: Trainer, model: Any, loss: Tensor) -> None:
        scaler = trainer.accelerator.scaler
        value = float(trainer.accelerator.reduce(loss, "mean")) if self._check_loss else None
        report = None
        if self._check_gradients:
            scale = 1.0 if scaler is None else scaler.get_scale()
            report = check_gradient_health(model, **self._thresholds, scale=scale)
            if self._on_report is not None:
                self._on_report(trainer.state.global_step + 1, report)
        counts: Counter[str] = Counter(finding.kind for finding in report.findings) if report else Counter()
        if (problem := self._loss_problem(value)) is not None:
            counts[problem] = 1
        harmful = _HARMFUL & counts.keys()
        if scaler is not None:
            harmful -= {"nan", "inf"}
        record = MonitorRecord(
            step=trainer.state.global_step + 1,
            loss=value,
            grad_norm=report.total_norm if report else None,
            counts=dict(counts),
            findings=report.findings[:_FINDINGS_KEPT] if report else (),
            action="none" if not counts else self._on_unhealthy if harmful else "warn",
        )
        if trainer.is_world_process_zero():
            self._say(record, report)
        self._keep(record)

    def _loss_problem(self, loss: float | None) -> LossProblem | None:
        if loss is None:
            return None
        if not math.isfinite(loss):
            return "loss_nonfinite"
        recent = [r.loss for r in self.history if r.loss is not None and math.isfinite(r.loss)][-_SPIKE_WINDOW:]
        if len(recent) < _SPIKE_LEAST:
            return None
        median = statistics.median(recent)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in recent)
        spread = max(deviation, 0.01 * abs(median))
        return "loss_spike" if loss > median + self._spike_deviations * spread else None

    def _keep(self, record: MonitorRecord) -> None:
        self._current = record
        self.history.append(record)
        self._unlogged.append(record)
        self._totals["checks"] += 1
        if record.counts:
            self._totals.update(["unhealthy", *record.counts])

    def _say(self, record: MonitorRecord, report: GradientReport | None) -> None:
        """Warn at the first of a row of checks with the same problems, and whenever a step is skipped."""
        before = self.history[-1].counts.keys() if self.history else set()
        if not record.counts or (record.action == "warn" and record.counts.keys() == before):
            return
        what = {"skip": "step skipped", "stop": "step skipped, training stops"}.get(record.action, "unhealthy")
        lines = [f"monitor: step {record.step}: {what}", *describe(report.findings if report else ())]
        lines += [
            f"  {problem} ({record.loss:.3g}); {LOSS_ADVICE[problem]}"
            for problem in LOSS_ADVICE
            if problem in record.counts
        ]
        logger.warning("\n".join(lines))


def _check_options(check_gradients: bool, check_loss: bool, on_unhealthy: str, spike_deviations: float) -> None:
    for name, value in {"check_gradients": check_gradients, "check_loss": check_loss}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if not (check_gradients or check_loss):
        raise ValueError(
            "check_gradients or check_loss must be True, got False for both; leave the callback out instead"
        )
    if on_unhealthy not in get_args(OnUnhealthy):
        raise ValueError(f"on_unhealthy must be one of {', '.join(get_args(OnUnhealthy))}, got {on_unhealthy!r}")
    if isinstance(spike_deviations, bool) or not isinstance(spike_deviations, int | float) or not spike_deviations > 0:
        raise ValueError(f"spike_deviations must be a positive number, got {spike_deviations!r}; the default is 6")


def _metrics(records: list[MonitorRecord]) -> dict[str, float]:
    """Figures since the last log: the latest and the largest norm, the most parameters of a kind, numbers of steps."""
    metrics: dict[str, float] = {}
    norms = [record.grad_norm for record in records if record.grad_norm is not None]
    if norms:
        metrics |= {"monitor/grad_norm": norms[-1], "monitor/grad_norm_max": max(norms, key=_nan_is_largest)}
        for name, kinds in {
            "vanishing": ["vanishing"],
            "exploding": ["exploding"],
            "nonfinite": ["nan", "inf"],
        }.items():
            metrics[f"monitor/{name}"] = max(sum(r.counts.get(kind, 0) for kind in kinds) for r in records)
    if any(record.loss is not None for record in records):
        for problem in get_args(LossProblem):
            metrics[f"monitor/{problem}_steps"] = sum(problem in record.counts for record in records)
    if records:
        metrics["monitor/unhealthy_steps"] = sum(bool(record.counts) for record in records)
        metrics["monitor/skipped_steps"] = sum(record.action in ("skip", "stop") for record in records)
    return metrics


def _nan_is_largest(norm: float) -> float:
    return math.inf if math.isnan(norm) else norm


def _load_history(path: Path) -> list[MonitorRecord]:
    """History of a checkpoint; a checkpoint written without the monitor has none."""
    if not path.is_file():
        return []
    return [
        MonitorRecord(**{**entry, "findings": tuple(GradientFinding(**finding) for finding in entry["findings"])})
        for entry in json.loads(path.read_text())
    ]
