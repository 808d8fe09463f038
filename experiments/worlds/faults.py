"""Faults to inject into a training run: what a gradient monitor should notice."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forge.layers import find_layers


class Fault(TrainerCallback):
    """Breaks a training run at the planned step.

    Args:
        kind: ``high_lr``, ``nan_batch``, ``dead_layer`` or ``fp16_overflow``; with any other nothing is injected.
        step: optimizer step, from 1, at which the fault comes.
        model: the model being trained.
    """

    def __init__(self, kind: str, step: int, model: nn.Module) -> None:
        self._kind, self._step, self._model = kind, step, model
        self._hooks: list[Any] = []
        self.done = kind in ("healthy", "vanishing_depth")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Inject the fault when its step has come; a bad batch is one step long, the others last."""
        now = state.global_step + 1
        if self._kind == "high_lr" and now >= self._step:
            for group in kw["optimizer"].param_groups:
                group["lr"] *= 1_000
            self.done = True
        if now == self._step and not self.done:
            getattr(self, f"_{self._kind}")()
            self.done = True
        elif now > self._step and self._kind == "nan_batch":
            self._remove()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Leave no hook behind."""
        self._remove()

    def _nan_batch(self) -> None:
        self._hooks.append(
            self._model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits * math.nan)
        )

    def _dead_layer(self) -> None:
        with torch.no_grad():
            for name, parameter in find_layers(self._model)[0].module.named_parameters():
                if "mlp" in name:
                    parameter.zero_()

    def _fp16_overflow(self) -> None:
        """Gradients pass through fp16 with a loss scale that is far too large, as after a wrong scaler update."""
        scale = 2.0**30
        self._hooks += [p.register_hook(lambda g: (g * scale).half().float() / scale) for p in self._model.parameters()]

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def without_residuals(model: Any, depth: int, seed: int) -> Any:
    """A deeper model of the same shape whose layers pass on only what they add."""
    torch.manual_seed(seed)
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": depth})
    deep = type(model)(config)
    deep.config.use_cache = False
    for layer in deep.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: output - inputs[0])
    return deep
