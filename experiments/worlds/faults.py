"""Faults to inject into a training run: what a gradient monitor should notice."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forge.layers import find_layers

RATE_FACTORS = {"high_lr": 1_000, "raised_lr": 50}
"""Fault → what the learning rate is multiplied by."""


class Fault(TrainerCallback):
    """Breaks a training run at the planned step.

    Args:
        kind: ``high_lr``, ``raised_lr``, ``nan_batch``, ``dead_layer`` or ``fp16_overflow``; with ``healthy`` and
            ``vanishing_depth``, which the model itself brings along, nothing is injected.
        step: optimizer step, from 1, at which the fault comes.
        model: the model being trained.
    """

    def __init__(self, kind: str, step: int, model: nn.Module) -> None:
        self._kind, self._step, self._model = kind, step, model
        self._hooks: list[Any] = []
        self.done = kind in ("healthy", "vanishing_depth")

    @property
    def visible_from(self) -> int:
        """First optimizer step whose gradient can show the fault.

        A learning rate acts on the weights at the end of its step, so that the next gradient is the first to differ; a
        bad batch, dead weights and an overflow show in the gradient of their own step, a broken model from the start.
        """
        if self._kind == "vanishing_depth":
            return 1
        return self._step + 1 if self._kind in RATE_FACTORS else self._step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Inject the fault when its step has come; a bad batch is one step long, the others last.

        The scheduler sets the learning rate anew after every step. The optimizer moves dead weights on by the momentum
        of the steps before, so that they would come back to life in the next step: they are put out at each.
        """
        now = state.global_step + 1
        if now < self._step or self._kind in ("healthy", "vanishing_depth"):
            return
        if self._kind in RATE_FACTORS:
            for group in kw["optimizer"].param_groups:
                group["lr"] *= RATE_FACTORS[self._kind]
        elif self._kind == "dead_layer":
            self._dead_layer()
        elif now == self._step:
            getattr(self, f"_{self._kind}")()
        elif self._kind == "nan_batch":
            self._remove()
        self.done = True

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
