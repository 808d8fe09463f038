"""MonitorCallback in the Trainer and in two processes (section «Training Monitor» of THEORY.md)."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from forge.monitor import HISTORY_FILE, MonitorCallback, MonitorRecord, NoGradientsError
from tests.forge.monitor_process import make_model, make_trainer
from tests.forge.processes import succeeded, torchrun
from tests.forge.tensors import same, weights_of


class Snapshots(TrainerCallback):
    """Weights and optimizer state before and after every optimizer step."""

    def __init__(self) -> None:
        self.taken: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.rates: list[float] = []

    def _take(self, **kwargs: Any) -> None:
        states = kwargs["optimizer"].state_dict()["state"].items()
        copies = {f"{index}/{name}": v.clone() for index, state in states for name, v in state.items()}
        self.taken.append((weights_of(kwargs["model"]), copies))
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take(**kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take(**kwargs)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.0},
        {"optim": "adafactor"},
    ],
    ids=str,
)
def test_it_sees_the_whole_unclipped_gradient_and_the_loss_of_the_step(tmp_path: Path, options: dict[str, Any]) -> None:
    """The Trainer logs the norm that clipping saw before it clipped."""
    monitor = MonitorCallback()
    trainer = make_trainer(tmp_path, monitor, **options)
    trainer.train()
    assert [record.step for record in monitor.history] == [1, 2, 3, 4, 5, 6]
    assert [record.grad_norm for record in monitor.history] == pytest.approx(logged(trainer, "grad_norm"), rel=1e-5)
    assert [record.loss for record in monitor.history] == pytest.approx(logged(trainer, "loss"), rel=1e-5)
    assert all(record.action == "none" and not record.counts for record in monitor.history)
    assert logged(trainer, "monitor/grad_norm") == [record.grad_norm for record in monitor.history]


@pytest.mark.parametrize("on_unhealthy", ["warn", "skip", "stop"])
def test_a_healthy_run_is_bitwise_the_one_without_the_monitor(tmp_path: Path, on_unhealthy: Any) -> None:
    watched, plain = Snapshots(), Snapshots()
    make_trainer(tmp_path, MonitorCallback(on_unhealthy=on_unhealthy), watched).train()
    make_trainer(tmp_path, plain).train()
    assert all(same(a[0], b[0]) and same(a[1], b[1]) for a, b in zip(watched.taken, plain.taken, strict=True))


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e7])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}], ids=str)
def test_skipping_leaves_weights_and_optimizer_bitwise_unchanged(
    tmp_path: Path, factor: float, options: dict[str, Any]
) -> None:
    monitor, snapshots = MonitorCallback(on_unhealthy="skip"), Snapshots()
    trainer = make_trainer(tmp_path, monitor, snapshots, poison={3: factor}, **options)
    trainer.train()
    moved = [not same(before[0], after[0]) for before, after in zip(snapshots.taken, snapshots.taken[1:], strict=False)]
    assert moved == [True, True, False, True, True, True]
    assert same(snapshots.taken[2][1], snapshots.taken[3][1])
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert trainer.state.global_step == 6 and snapshots.rates[3] < snapshots.rates[2]  # the schedule moves on
    assert [record.action for record in monitor.history] == ["none", "none", "skip", "none", "none", "none"]
    assert logged(trainer, "monitor/skipped_steps") == [0, 0, 1, 0, 0, 0]


def test_stopping_keeps_the_weights_of_the_step_before(tmp_path: Path) -> None:
    snapshots = Snapshots()
    trainer = make_trainer(tmp_path, MonitorCallback(on_unhealthy="stop"), snapshots, poison={3: math.nan})
    trainer.train()
    assert trainer.state.global_step == 3
    assert same(snapshots.taken[2][0], weights_of(trainer.model))


def test_warning_lets_the_step_happen_and_says_once_what_to_try(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = MonitorCallback()
    trainer = make_trainer(tmp_path, monitor, poison={2: math.nan})
    with caplog.at_level(logging.WARNING, logger="forge.monitor.callback"):
        trainer.train()
    assert not any(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert [record.action for record in monitor.history] == ["none"] + ["warn"] * 5
    first, last = (message for message in caplog.messages if message.startswith("monitor:"))
    assert "step 2: unhealthy" in first and "nan in 30 parameters" in first and "labels are all -100" in first
    assert "loss_nonfinite (nan)" in first
    assert last == "monitor: 5 of 6 checks unhealthy (nan in 5, loss_nonfinite in 5)"
    assert len(monitor.history[-1].findings) == 5 and monitor.history[-1].counts["nan"] == 30


def test_figures_since_the_last_log_reach_every_integration(tmp_path: Path) -> None:
    class Integration(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen.append(rewrite_logs(dict(logs)))

    seen: list[dict[str, float]] = []
    monitor = MonitorCallback(on_unhealthy="skip")
    make_trainer(tmp_path, Integration(), monitor, poison={2: 1e7}, logging_steps=3).train()
    norms = [record.grad_norm for record in monitor.history]
    first, second, summary = seen
    assert first["train/monitor/grad_norm"] == norms[2] and first["train/monitor/grad_norm_max"] == norms[1]
    assert first["train/monitor/exploding"] == 30 and first["train/monitor/nonfinite"] == 0
    assert (first["train/monitor/unhealthy_steps"], first["train/monitor/skipped_steps"]) == (1, 1)
    assert (second["train/monitor/unhealthy_steps"], second["train/monitor/vanishing"]) == (0, 0)
    assert not any("monitor" in name for name in summary)


def test_every_checks_some_steps_only_and_history_is_bounded(tmp_path: Path) -> None:
    monitor = MonitorCallback(every=2, history=2)
    trainer = make_trainer(tmp_path, monitor, gradient_accumulation_steps=2)
    trainer.train()
    assert [record.step for record in monitor.history] == [3, 5]
    assert [record.loss for record in monitor.history] == pytest.approx([logged(trainer, "loss")[i] for i in (2, 4)])


def test_lora_begins_with_zero_gradients_of_a_which_only_warn(tmp_path: Path) -> None:
    network = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0))
    monitor = MonitorCallback(on_unhealthy="stop")
    make_trainer(tmp_path, monitor, model=network).train()
    first, *later = monitor.history
    assert (first.counts, first.action) == ({"vanishing": 3}, "warn")
    assert all("lora_A" in finding.parameter for finding in first.findings)
    assert {finding.layer for finding in first.findings} == {f"base_model.model.model.layers.{i}" for i in range(3)}
    assert len(later) == 5 and not any(record.counts for record in later)


def test_loss_spike_and_loss_alone(tmp_path: Path) -> None:
    monitor = MonitorCallback(check_gradients=False, on_unhealthy="stop")
    trainer = make_trainer(tmp_path, monitor, poison={12: 1.5}, max_steps=14)
    trainer.train()
    assert [record.step for record in monitor.history if record.counts] == [12]
    record = monitor.history[11]
    assert (dict(record.counts), record.action, record.grad_norm) == ({"loss_spike": 1}, "warn", None)
    assert not logged(trainer, "monitor/grad_norm") and sum(logged(trainer, "monitor/loss_spike_steps")) == 1


@pytest.mark.parametrize(
    ("losses", "limit"),
    [
        ([*range(1, 12)], 6 + 6 * 1.4826 * 3),  # median 6, median distance from it 3
        ([2.0] * 10, 2 + 6 * 0.02),  # a hundredth of the median at least
        ([2.0] * 10 + [math.nan, math.inf] * 20, 2 + 6 * 0.02),
        ([50.0] * 60 + [2.0] * 50, 2 + 6 * 0.02),  # the last 50 alone
        ([2.0] * 9 + [math.nan], math.inf),  # too few to tell
    ],
    ids=["spread", "no spread", "not finite", "window", "few"],
)
def test_a_spike_by_hand(losses: list[float], limit: float) -> None:
    monitor = MonitorCallback()
    monitor.history.extend(MonitorRecord(1, loss, None, {}, (), "none") for loss in losses)
    assert monitor._loss_problem(min(limit, 1e9) - 0.001) is None
    assert limit == math.inf or monitor._loss_problem(limit + 0.001) == "loss_spike"


def test_history_survives_a_resume(tmp_path: Path) -> None:
    whole = MonitorCallback()
    make_trainer(tmp_path / "whole", whole, poison={2: 1e5}, save_strategy="steps", save_steps=4).train()
    resumed = MonitorCallback()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    make_trainer(tmp_path / "resumed", resumed).train(resume_from_checkpoint=str(checkpoint))
    assert [asdict(record) for record in resumed.history] == [asdict(record) for record in whole.history]
    assert resumed.history[1].counts["exploding"] and resumed.history[1].findings[0].kind == "exploding"

    (checkpoint / HISTORY_FILE).unlink()
    late = MonitorCallback()
    make_trainer(tmp_path / "late", late).train(resume_from_checkpoint=str(checkpoint))
    assert [record.step for record in late.history] == [5, 6]


def test_one_callback_serves_one_trainer_after_another(tmp_path: Path) -> None:
    monitor = MonitorCallback()
    first, second = make_trainer(tmp_path, monitor), make_trainer(tmp_path, monitor)
    for trainer in (first, second, second):
        trainer.train()
        assert [record.step for record in monitor.history] == [1, 2, 3, 4, 5, 6]
        assert len(logged(trainer, "monitor/grad_norm")) == 6


def test_a_callback_that_was_removed_sees_nothing_more(tmp_path: Path) -> None:
    monitor = MonitorCallback()
    trainer = make_trainer(tmp_path, monitor)
    trainer.train()
    trainer.remove_callback(monitor)
    trainer.train()
    assert [record.step for record in monitor.history] == [1, 2, 3, 4, 5, 6]
    assert len(logged(trainer, "monitor/grad_norm")) == 0


def test_under_a_loss_scaler_norms_are_unscaled_and_overflow_is_left_to_it(tmp_path: Path) -> None:
    """fp16 autocast with a real GradScaler on the CPU, where accelerate by itself would refuse it."""

    def train(poison: dict[int, float]) -> tuple[MonitorCallback, Trainer]:
        monitor = MonitorCallback(on_unhealthy="stop")
        trainer = make_trainer(tmp_path, monitor, poison=poison)
        accelerator = trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        try:
            trainer.train()
        finally:
            accelerator.state._mixed_precision = "no"
        return monitor, trainer

    monitor, trainer = train({})
    assert [record.grad_norm for record in monitor.history] == pytest.approx(logged(trainer, "grad_norm"), rel=1e-4)
    monitor, trainer = train({2: math.inf})
    assert trainer.state.global_step == 2  # the loss itself is not finite: no loss scale helps
    monitor, trainer = train({2: 1e37})
    assert (monitor.history[1].action, trainer.state.global_step) == ("warn", 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_unhealthy": "ignore"}, ValueError, "on_unhealthy must be one of warn, skip, stop, got 'ignore'"),
        ({"every": 0}, ValueError, "every must be a whole number of at least 1, got 0"),
        ({"history": True}, ValueError, "history must be a whole number of at least 1, got True"),
        ({"check_gradients": 1}, TypeError, "check_gradients must be True or False, got 1"),
        ({"check_gradients": False, "check_loss": False}, ValueError, "leave the callback out"),
        ({"exploding_above": -1.0}, ValueError, "0 < vanishing_below < exploding_above"),
        ({"spike_deviations": 0}, ValueError, "spike_deviations must be a positive number, got 0"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MonitorCallback(**options)


def test_two_processes_decide_alike(tmp_path: Path) -> None:
    """Rank 1 alone has a NaN loss: both skip that step, and both then have the same weights."""
    succeeded(torchrun("-m", "tests.forge.monitor_process", tmp_path))
    left, right = (json.loads((tmp_path / f"history-{rank}.json").read_text()) for rank in (0, 1))
    assert left == right
    assert [record["action"] for record in left] == ["none", "none", "skip", "none"]
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    assert all(bool(weight.isfinite().all()) for weight in first.values())


def test_a_model_in_which_nothing_trains_is_refused_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MonitorCallback())
    trainer.model.requires_grad_(False)
    with pytest.raises(NoGradientsError, match="all parameters are frozen; unfreeze"):
        trainer.train()
