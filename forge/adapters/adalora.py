"""AdaLoRA's rank update, really called: PEFT leaves it to the training loop (section «AdaLoRA» of THEORY.md).

Source: Zhang et al., arXiv:2303.10512 §3; the method itself is PEFT's ``AdaLoraConfig``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import AdaLoraModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from forge.trainer_call import saved_checkpoint, trainer_call

STATE_FILE = "adalora_state.safetensors"
"""File name of the importance scores and of the rank pattern inside a Trainer checkpoint."""

_SCORES = ("exp_avg_ipt", "exp_avg_unc")
_PATTERN = "rank_pattern"


class AdaLoraCallback(TrainerCallback):
    """Calls ``update_and_allocate`` after every optimizer step, while the gradients are still there.

    ``Trainer(callbacks=[AdaLoraCallback()])`` is all there is to do: once per optimizer step whatever the gradient
    accumulation, with ``total_step`` taken from the run. Importance scores, which PEFT keeps in dictionaries outside
    the model, go into every checkpoint and come back with ``resume_from_checkpoint``.

    During training the rank pattern is kept here instead of in the config: with it there, PEFT writes checkpoints of
    the reduced ranks, which do not load into the model that is being trained. ``on_train_end`` puts it into the config,
    so that the adapter that is saved at the end has the reduced ranks.

    PEFT adds ``orth_reg_weight`` times the orthogonality penalty to the loss of every forward pass, if the config has a
    ``task_type``. The Trainer sums the losses of micro-batches when the model normalises by tokens itself (Llama,
    GPT-2), so that under accumulation over G of them the penalty counts G times: divide ``orth_reg_weight`` by G.
    """

    def __init__(self) -> None:
        self._rank_pattern: dict[str, list[bool]] | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every adapted module as last allocated, by the name of its ``lora_E`` (empty before ``tinit``)."""
        return {name: sum(mask) for name, mask in (self._rank_pattern or {}).items()}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Fit the schedule to this run, and take over the scores of the checkpoint that training resumes from."""
        tuner = _adalora_model(kw["model"])
        config = tuner.peft_config[tuner.trainable_adapter_name]
        _check_schedule(config, state.max_steps)
        if type(kw["model"]) is PeftModel and config.orth_reg_weight > 0:
            raise ValueError(
                f"AdaLoraConfig must have a task_type for its penalty to be added, got None with orth_reg_weight="
                f"{config.orth_reg_weight}, which PEFT then leaves out; give task_type, or orth_reg_weight=0"
            )
        tuner.rankallocator.set_total_step(state.max_steps)
        tuner.rankallocator.reset_ipt()
        config.rank_pattern = self._rank_pattern = None
        if state.global_step > 0:
            folder = trainer_call("resume_from_checkpoint")["resume_from_checkpoint"]
            self._restore(tuner, Path(folder))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Update the scores and the ranks; the optimizer has stepped, the gradients are not zeroed yet."""
        tuner = _adalora_model(kw["model"])
        config = tuner.peft_config[tuner.trainable_adapter_name]
        step = state.global_step + 1
        reads_gradients = step < config.total_step - config.tfinal
        if reads_gradients and getattr(kw["optimizer"], "step_was_skipped", False):
            return  # fp16 overflow: Inf would stay in the scores for good
        if reads_gradients and not any(p.grad is not None for p in tuner.parameters()):
            return  # MonitorCallback dropped the gradients of this step
        config.rank_pattern = self._rank_pattern
        tuner.update_and_allocate(step)
        self._rank_pattern, config.rank_pattern = config.rank_pattern, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Write scores and ranks into the checkpoint that the Trainer has just written."""
        if args.should_save:
            allocator = _adalora_model(kw["model"]).rankallocator
            tensors = {f"{kind}/{n}": t for kind in _SCORES for n, t in getattr(allocator, kind).items()}
            tensors |= {f"{_PATTERN}/{n}": torch.tensor(mask) for n, mask in (self._rank_pattern or {}).items()}
            path = saved_checkpoint(state.global_step) / STATE_FILE
            save_file({k: t.contiguous() for k, t in tensors.items()}, path)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Put the rank pattern of the weights that the model now has into the config."""
        tuner = _adalora_model(kw["model"])
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore(tuner, Path(state.best_model_checkpoint))
        tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = self._rank_pattern

    def _restore(self, tuner: Any, folder: Path) -> None:
        path = folder / STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {STATE_FILE}; use a checkpoint written with AdaLoraCallback")
        device = next(p.device for n, p in tuner.named_parameters() if "lora_E" in n)
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for kind in _SCORES:
            setattr(tuner.rankallocator, kind, _of_kind(tensors, kind))
        tuner.rankallocator.ipt = {n: torch.zeros_like(t) for n, t in tuner.rankallocator.exp_avg_ipt.items()}
        self._rank_pattern = {n: mask.tolist() for n, mask in _of_kind(tensors, _PATTERN).items()} or None


def _of_kind(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{kind}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{kind}/")}


def _adalora_model(model: nn.Module) -> Any:
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, AdaLoraModel) or not hasattr(tuner, "rankallocator"):
        raise ValueError(
            f"AdaLoraCallback needs a model with a trainable AdaLoRA adapter, got {type(tuner).__name__}; use "
            "get_peft_model(model, AdaLoraConfig(...))"
        )
    return tuner


def _check_schedule(config: Any, max_steps: int) -> None:
    """What PEFT would answer with a division by zero, a budget that is never met or an error of ``kthvalue``."""
    if config.tinit + config.tfinal >= max_steps:
        raise ValueError(
            f"tinit + tfinal must be below the {max_steps} steps of this run, got {config.tinit} + {config.tfinal}; "
            "ranks are reduced in the steps between: lower them"
        )
    if config.target_r >= config.init_r:
        raise ValueError(
            f"target_r must be below init_r, got {config.target_r} and {config.init_r}; there is nothing to reduce"
        )
