"""Gradient health, MonitorCallback in the Trainer, and the table of blocks (section «Training Monitor» of THEORY.md).

``torchrun tests/forge/test_monitor.py FOLDER`` trains on two processes, one of which has a poisoned batch.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import rewrite_logs

from forge.monitor import (
    HISTORY_FILE,
    MonitorCallback,
    NoGradientsError,
    check_gradient_health,
    model_blocks,
    print_model_info,
)

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def make_model(**options: Any) -> LlamaForCausalLM:
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=100, use_cache=False, **options)
    return LlamaForCausalLM(config)


def after_backward(model: nn.Module) -> nn.Module:
    rows = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(1))
    model(input_ids=rows, labels=rows).loss.backward()
    return model


@pytest.fixture
def model() -> nn.Module:
    return after_backward(make_model())


def gradient(model: nn.Module, name: str) -> Tensor:
    found = model.get_parameter(name).grad
    assert found is not None
    return found


# check_gradient_health ------------------------------------------------------------------------------------------------


def test_norms_are_those_of_torch_and_a_healthy_model_has_no_findings(model: nn.Module) -> None:
    report = check_gradient_health(model)
    expected = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert report.norms == pytest.approx(expected, rel=1e-6)
    assert report.total_norm == pytest.approx(float(nn.utils.clip_grad_norm_(model.parameters(), math.inf)), rel=1e-6)
    assert report.healthy and report.findings == report.without_gradient == ()
    assert "healthy" in str(report)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(math.nan, "nan"), (math.inf, "inf"), (1e4, "exploding"), (0.0, "vanishing"), (1e-12, "vanishing")],
)
def test_finding_names_the_parameter_its_layer_and_what_to_try(model: nn.Module, value: float, kind: str) -> None:
    gradient(model, UP_PROJ).fill_(value)
    report = check_gradient_health(model)
    [finding] = report.findings
    assert (finding.parameter, finding.layer, finding.kind) == (UP_PROJ, "model.layers.1", kind)
    assert not report.healthy and report.count(finding.kind) == 1
    text = str(report)
    assert f"{kind} in 1 parameter, in model.layers.1: {UP_PROJ}" in text
    assert ("exactly 0" in text) == (value == 0)


def test_one_nan_beside_infinities_is_nan_and_a_parameter_outside_the_layers_has_no_layer(model: nn.Module) -> None:
    gradient(model, "lm_head.weight")[:2, 0] = torch.tensor([math.nan, math.inf])
    [finding] = check_gradient_health(model).findings
    assert (finding.layer, finding.kind) == (None, "nan")


def test_thresholds_are_strict_and_the_loss_scale_is_taken_out(model: nn.Module) -> None:
    bias = nn.Linear(1, 1, bias=False)
    bias.weight.grad = torch.full((1, 1), 8.0)
    assert check_gradient_health(bias, exploding_above=8.0).healthy
    assert check_gradient_health(bias, vanishing_below=8.0).healthy
    assert not check_gradient_health(bias, exploding_above=7.9).healthy
    assert check_gradient_health(bias, scale=4.0).norms == {"weight": 2.0}


def test_norms_take_one_fused_call_per_dtype_and_half_precision_does_not_overflow(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    fused = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda t, *a: (calls.append(len(t)), fused(t, *a))[1])
    norms = check_gradient_health(model).norms
    assert norms == pytest.approx({n: float(p.grad.double().norm()) for n, p in model.named_parameters()}, rel=1e-5)
    half = nn.Linear(300, 300).half()
    assert half.bias is not None
    half.weight.grad, half.bias.grad = torch.full_like(half.weight, 1000.0), torch.ones_like(half.bias)
    report = check_gradient_health(half, exploding_above=1e6)
    assert calls == [2]
    assert report.healthy and report.norms["weight"] == pytest.approx(3e5, rel=1e-4)  # fp16 ends at 65504


def test_model_without_layers_sparse_gradients_and_parameters_outside_the_loss() -> None:
    network = nn.ModuleDict({"table": nn.Embedding(5, 2, sparse=True), "unused": nn.Linear(2, 2)})
    network["table"](torch.tensor([1, 1])).sum().backward()
    report = check_gradient_health(network)
    assert report.norms == pytest.approx({"table.weight": math.sqrt(8)})
    assert report.without_gradient == ("unused.weight", "unused.bias") and report.healthy
    assert "unused.weight" in str(report)
    assert network["table"].weight.grad is not None
    network["table"].weight.grad *= math.nan
    assert check_gradient_health(network).findings[0].layer is None


def test_bad_input_says_rule_value_and_fix(model: nn.Module) -> None:
    fresh = make_model()
    with pytest.raises(NoGradientsError, match=r"got none in its 30 trainable parameters; check after backward\(\)"):
        check_gradient_health(fresh)
    with pytest.raises(NoGradientsError, match="all parameters are frozen; unfreeze"):
        check_gradient_health(fresh.requires_grad_(False))
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got dict"):
        check_gradient_health({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0 < vanishing_below < exploding_above, got 10.0 and 1.0"):
        check_gradient_health(model, vanishing_below=10.0, exploding_above=1.0)
    with pytest.raises(TypeError, match="vanishing_below must be a number, got True"):
        check_gradient_health(model, vanishing_below=True)
    with pytest.raises(ValueError, match="scale must be finite and positive, got 0"):
        check_gradient_health(model, scale=0.0)


# MonitorCallback ------------------------------------------------------------------------------------------------------


class Poisoned(Trainer):
    """Multiplies the loss at given optimizer steps (from 1), on given processes."""

    factors: dict[int, float]
    rank: int | None = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        here = self.rank is None or self.rank == self.args.process_index
        factor = self.factors.get(self.state.global_step + 1, 1.0) if here else 1.0
        return (loss[0] * factor, *loss[1:]) if isinstance(loss, tuple) else loss * factor


class Snapshots(TrainerCallback):
    """Weights and optimizer state before and after every optimizer step."""

    def __init__(self) -> None:
        self.taken: list[tuple[list[Tensor], list[Tensor]]] = []
        self.rates: list[float] = []

    def _take(self, **kwargs: Any) -> None:
        states = kwargs["optimizer"].state_dict()["state"].values()
        self.taken.append(
            (
                [p.detach().clone() for p in kwargs["model"].parameters()],
                [v.clone() for state in states for v in state.values()],
            )
        )
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take(**kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take(**kwargs)


def make_trainer(
    folder: Path, *callbacks: TrainerCallback, poison: dict[int, float] | None = None, **options: Any
) -> Poisoned:
    """Six optimizer steps with clipping, logged one by one."""
    network = options.pop("model", None) or make_model()
    rows = torch.randint(0, 100, (48, 8), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
    }
    fixed = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, "dataloader_pin_memory": False}
    trainer = Poisoned(
        model=network,
        args=TrainingArguments(output_dir=str(folder), **(settings | fixed | options)),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=list(callbacks),
    )
    trainer.factors = poison or {}
    return trainer


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


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
    assert same(snapshots.taken[2][0], [p.detach() for p in trainer.model.parameters()])


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
        ({"every": 0}, ValueError, "every must be an integer of at least 1, got 0"),
        ({"history": True}, ValueError, "history must be an integer of at least 1, got True"),
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
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert left == right
    assert [record["action"] for record in left["history"]] == ["none", "none", "skip", "none"]
    assert left["finite"]


def test_a_model_in_which_nothing_trains_is_refused_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MonitorCallback())
    trainer.model.requires_grad_(False)
    with pytest.raises(NoGradientsError, match="all parameters are frozen; unfreeze"):
        trainer.train()


def train_on_two_processes(folder: Path) -> None:
    monitor = MonitorCallback(on_unhealthy="skip")
    trainer = make_trainer(folder, monitor, poison={3: math.nan}, max_steps=4, gradient_accumulation_steps=2)
    trainer.rank = 1
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    report = {
        "history": [{"grad_norm": str(r.grad_norm), "loss": str(r.loss), "action": r.action} for r in monitor.history],
        "weights": float(weights.double().sum()),
        "finite": bool(weights.isfinite().all()),
    }
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


# print_model_info -----------------------------------------------------------------------------------------------------


def printed(model: nn.Module, **options: Any) -> str:
    console = Console(width=120, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        print_model_info(model, console=console, **options)
    return capture.get()


@pytest.mark.parametrize("breakdown", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_are_a_partition_with_tied_weights_once(tied: bool, breakdown: bool) -> None:
    network = make_model(tie_word_embeddings=tied)
    blocks = [block for block in model_blocks(network, breakdown=breakdown) if block.depth == 0]
    assert sum(block.parameters for block in blocks) == sum(p.numel() for p in network.parameters())
    assert sum(block.stored_bytes for block in blocks) == sum(p.numel() * 4 for p in network.parameters())
    names = [block.name for block in blocks]
    stack = "model.layers.0–2 (3 layers)" if breakdown else "model.layers (3 layers)"
    assert names == ["Embeddings", stack, "Other", *([] if tied else ["Head"])]


def test_breakdown_splits_where_layers_differ_and_adds_up() -> None:
    network = make_model()
    network.model.layers[0].requires_grad_(False)
    network.model.layers[0].bfloat16()
    blocks = model_blocks(network, breakdown=True)
    frozen, rest = (block for block in blocks if block.name.startswith("model.layers"))
    assert (frozen.name, frozen.trainable, frozen.dtypes) == ("model.layers.0", 0, ("bfloat16",))
    assert (rest.name, rest.trainable, rest.dtypes) == ("model.layers.1–2 (2 layers)", rest.parameters, ("float32",))
    parts = blocks[blocks.index(rest) + 1 :][:4]
    assert [part.name for part in parts] == ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
    assert sum(part.parameters for part in parts) == rest.parameters
    text = printed(network, show_breakdown=True)
    assert "self_attn" in text and "bfloat16" in text and f"{sum(p.numel() for p in network.parameters()):,}" in text
    assert "self_attn" not in printed(network)


def test_adapters_are_a_block_of_their_own() -> None:
    network = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    blocks = {block.name: block for block in model_blocks(network)}
    adapters = blocks.pop("Adapters")
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert adapters.parameters == adapters.trainable == trainable
    assert not any(block.trainable for block in blocks.values())
    assert "model.layers (3 layers)" in blocks


def test_quantised_weights_by_real_number_and_bytes(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    network = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=nf4)
    [stack] = [block for block in model_blocks(network) if block.name.startswith("model.layers")]
    linear = [m for m in network.model.layers.modules() if isinstance(m, nn.Linear)]
    assert stack.parameters == sum(m.in_features * m.out_features for m in linear) + 6 * 32
    packed = sum(m.in_features * m.out_features // 2 for m in linear)
    assert stack.stored_bytes > packed + 6 * 32 * 4  # with the quantisation state
    assert stack.dtypes == ("nf4", "float32")


def test_encoder_decoder_and_models_without_layers() -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=50)
    names = [block.name for block in model_blocks(T5ForConditionalGeneration(config))]
    assert names[:3] == ["Embeddings", "encoder.block (2 layers)", "decoder.block (2 layers)"]
    [block] = model_blocks(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert (block.name, block.parameters) == ("Other", 16)
    assert "Total" in printed(nn.ReLU())


def test_model_info_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        print_model_info("gpt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="show_breakdown must be True or False, got 1"):
        print_model_info(make_model(), show_breakdown=1)  # type: ignore[arg-type]


if __name__ == "__main__":
    train_on_two_processes(Path(sys.argv[1]))
