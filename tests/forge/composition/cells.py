"""The matrix: every technique × method × memory tactic × shape of model × number of processes, and one training run."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.utils import logging

from forge.layers import find_layers
from forge.presets import Preset, get_preset
from tests.forge.composition.shapes import SHAPES, examples, load_model
from tests.forge.tensors import weights_of

STEPS, SAVED_AT, GLOBAL_BATCH = 4, 2, 4
TECHNIQUES = ("ema", "freezing", "monitor")
METHODS = {"full": "sft", "lora": "lora", "qlora": "qlora"}
"""Method → name of its preset."""
TACTICS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16_autocast": {"bf16": True},
}
"""Memory tactic → options of the preset."""
PROCESSES = (1, 2)


@dataclass(frozen=True)
class Setting:
    """What is trained and how, whatever the technique."""

    method: str
    tactic: str
    shape: str
    processes: int

    def preset(self, **options: Any) -> Preset:
        """The method's preset with the tactic; the global batch is the same in every setting."""
        tactic = {"gradient_checkpointing": False, "gradient_accumulation_steps": 1, "bf16": False}
        tactic |= TACTICS[self.tactic]
        per_device = GLOBAL_BATCH // self.processes // tactic["gradient_accumulation_steps"]
        training = {"learning_rate": 1e-2, "warmup_steps": 0, "max_grad_norm": 0.1}
        training |= {"per_device_train_batch_size": per_device}
        return get_preset(METHODS[self.method], **(tactic | training | options))


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix."""

    technique: str
    setting: Setting

    @property
    def id(self) -> str:
        s = self.setting
        return f"{self.technique}-{s.method}-{s.tactic}-{s.shape}-{s.processes}"


CELLS = {
    cell.id: cell
    for cell in (
        Cell(technique, Setting(*levels))
        for technique, *levels in product(TECHNIQUES, METHODS, TACTICS, SHAPES, PROCESSES)
    )
}


@dataclass
class Run:
    """What one training run left, as recorded by a witness that knows nothing of ``forge``."""

    model: nn.Module
    start: dict[str, Tensor] = field(default_factory=dict)
    trajectory: list[dict[str, Tensor]] = field(default_factory=list)
    """Trainable weights after each optimizer step."""
    norms: list[float] = field(default_factory=list)
    """L2 norm of all gradients together, in float64 and before clipping, at each optimizer step."""
    losses: list[float] = field(default_factory=list)
    """Training loss of each optimizer step, as the Trainer logs it."""
    passes: list[bool] = field(default_factory=list)
    """Every forward pass of the last layer, recomputation included: whether under autocast."""
    averages: dict[str, Tensor] = field(default_factory=dict)
    """Averages of the weights, where there are any."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """All weights now, trainable or not."""
        return weights_of(self.model)


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, no progress bars, and fast garbage collection: every ``Trainer.train()`` collects all there is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logging.enable_progress_bar()
        logging.set_verbosity_warning()
        torch.set_num_threads(threads)


def build(
    models: Path, setting: Setting, *, dropout: float = 0.0, freeze_ratio: float = 0.0, seed: int = 0
) -> nn.Module:
    """The model of a setting, ready to train."""
    adapter = {} if setting.method == "full" else {"lora_dropout": dropout}
    preset = setting.preset(freeze_ratio=freeze_ratio, **adapter)
    quantisation = {"quantization_config": preset.get_bnb_config()} if setting.method == "qlora" else {}
    model = load_model(models, setting.shape, dropout, **quantisation)
    set_seed(seed)
    prepared: nn.Module = preset.prepare(model)
    return prepared


class Witness(TrainerCallback):
    """Copies the weights at the start and after each optimizer step."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.start = weights_of(self.run.model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainable = {n: p.detach().clone() for n, p in self.run.model.named_parameters() if p.requires_grad}
        self.run.trajectory.append(trainable)


def train(
    model: nn.Module,
    setting: Setting,
    folder: Path,
    *callbacks: TrainerCallback,
    save: bool = True,
    resume: bool = False,
) -> Run:
    """Train to the end, from the start or from the checkpoint in the middle that an earlier call left in ``folder``.

    Adam's ε is large, so that a step is a smooth function of the gradient: with the usual one a gradient of rounding
    noise moves a weight as far as any other, and no two ways to add up one gradient could be compared.
    """
    run = Run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the preset's, of this learning rate and of bf16 on a CPU
        arguments = setting.preset(output_dir=str(folder)).get_training_args(
            max_steps=STEPS,
            save_strategy="steps" if save else "no",
            save_steps=SAVED_AT,
            adam_epsilon=1e-3,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
    witnesses = [*callbacks, Witness(run)]
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(setting.shape), callbacks=witnesses)
    _witness_norms(trainer, run)
    _witness_passes(run)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AT}") if resume else None)
    run.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return run


def _witness_norms(trainer: Trainer, run: Run) -> None:
    """Measure the gradients whenever the Trainer is about to clip them."""
    clip = trainer.accelerator.clip_grad_norm_

    def witnessed(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        squares = [p.grad.double().square().sum() for p in run.model.parameters() if p.grad is not None]
        run.norms.append(torch.stack(squares).sum().sqrt().item())
        return clip(parameters, max_norm, *args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = witnessed


def _witness_passes(run: Run) -> None:
    """Watch the first innermost module of the last layer: checkpointing recomputes what is inside a layer."""
    inside = find_layers(run.model)[-1].module.modules()
    first = next(module for module in inside if not list(module.children()))
    first.register_forward_pre_hook(lambda *_: run.passes.append(torch.is_autocast_enabled("cpu")))
