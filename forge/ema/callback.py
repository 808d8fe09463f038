"""Averages inside the Hugging Face ``Trainer``: updated, evaluated, saved and resumed with it."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from forge.ema.model import (
    EMAModel,
    check_same_decays,
    decay_label,
    load_ema_file,
    save_ema_file,
    validated_decays,
)
from forge.trainer_call import saved_checkpoint, trainer_call

STATE_FILE = "ema_state.safetensors"
"""File name of the averages inside a Trainer checkpoint."""


class EMACallback(TrainerCallback):
    """Follows averages during ``Trainer.train()`` and evaluates them whenever the Trainer evaluates.

    ``Trainer(callbacks=[EMACallback(decay=(0.99, 0.999))])`` is all there is to do: one update per optimizer step
    (whatever the gradient accumulation), metrics ``eval_ema_0.999_loss`` beside ``eval_loss`` (with everything that
    ``compute_metrics`` or a trainer of TRL adds), the state in every checkpoint and restored by
    ``resume_from_checkpoint`` and ``load_best_model_at_end``. The trajectory is bitwise the one without the callback:
    random numbers that evaluating the averages draws are given back. Put it before callbacks that read its metrics
    (``EarlyStoppingCallback``).

    Args:
        decay: β or several of them, see ``EMAModel``.
        evaluate: evaluate the averages too; each costs as much as evaluating the raw weights.
        **options: further options of ``EMAModel``.
    """

    _model_class: type[EMAModel] = EMAModel
    _state_file = STATE_FILE

    def __init__(self, decay: float | Sequence[float] = 0.999, *, evaluate: bool = True, **options: Any) -> None:
        shared = {name: value for name, value in options.items() if name != "names"}
        self._model_class(nn.ParameterList([torch.zeros(1)]), decay, **shared)  # refuses wrong options here already
        self.decays = validated_decays(decay)
        self._evaluate = evaluate
        self._options = options
        self._ema: EMAModel | None = None
        self._loaded: Mapping[str, Any] | None = None

    @property
    def ema(self) -> EMAModel:
        """The averages of the current or last training run (RuntimeError before the first)."""
        if self._ema is None:
            raise RuntimeError("there is no EMA yet; train first, or load_ema_state() and apply_ema(model)")
        return self._ema

    def apply_ema(self, model: nn.Module, decay: float | None = None, *, backup: bool = True) -> None:
        """Write averaged weights into ``model``: the trained one, or any with parameters of the same names."""
        self._bound_to(model).apply_ema(decay, backup=backup)

    def restore(self) -> None:
        """Put back the raw weights that ``apply_ema`` replaced."""
        self.ema.restore()

    def use_ema(self, decay: float | None = None) -> AbstractContextManager[None]:
        """Averaged weights inside the block, raw weights again after it (also after an error)."""
        return self.ema.use_ema(decay)

    def get_ema_state(self) -> dict[str, Any]:
        """State for ``torch.save``; see ``EMAModel.state_dict``."""
        return dict(self._loaded) if self._ema is None and self._loaded is not None else self.ema.state_dict()

    def load_ema_state(self, state: Mapping[str, Any]) -> None:
        """Take over a state from ``get_ema_state()``; it is checked against the model as soon as one is known.

        Before training it becomes the state that training continues from when it resumes at the same step. Training
        from step 0 starts its averages anew. Raises as ``EMAModel.load_state_dict`` does.
        """
        check_same_decays(state, self.decays)
        if self._ema is not None:
            self._ema.load_state_dict(state)
        self._loaded = state

    def _bound_to(self, model: nn.Module) -> EMAModel:
        """The averages bound to ``model``'s parameters: today's if it is the trained model, else carried over."""
        if self._ema is None or not self._ema.follows(model):
            if self._ema is not None and self._ema._backup is not None:
                raise RuntimeError("averaged weights are applied to another model; call restore() first")
            state = self.get_ema_state()
            ema = self._new(model, _names_in(state))
            ema.load_state_dict(state)
            self._ema = ema
        return self._ema

    def _new(self, model: nn.Module, names: Collection[str] | None = None) -> EMAModel:
        options = self._options if names is None else {**self._options, "names": names}
        return self._model_class(model, self.decays, **options)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Start from θ(0), or from the checkpoint that training resumes from."""
        self._ema = self._new(kw["model"])
        if state.global_step > 0:
            if self._loaded is None or self._loaded["step"] != state.global_step:
                folder = trainer_call("resume_from_checkpoint")["resume_from_checkpoint"]
                self._loaded = _load_checkpoint(Path(folder) / self._state_file, state.global_step)
            saved = _names_in(self._loaded)
            if self._ema.averages(self.decays[0]).keys() < set(saved):  # WeightLoRA has frozen some since
                self._ema = self._new(kw["model"], saved)
            self._ema.load_state_dict(self._loaded)
        self._loaded = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """One optimizer step has been taken (gradient accumulation counts once)."""
        self.ema.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Write the averages into the checkpoint that the Trainer has just written."""
        if args.should_save:
            save_ema_file(self.ema.state_dict(), saved_checkpoint(state.global_step) / self._state_file)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Evaluate each average with the Trainer's own loop and add its metrics to those of the raw weights."""
        ema = self._ema
        if not self._evaluate or ema is None or ema._backup is not None or not ema.follows(kw["model"]):
            return
        call = trainer_call("metric_key_prefix")
        for decay in self.decays:
            arm = f"ema_{decay_label(decay)}"
            with ema.use_ema(decay), _unchanged_random_state(kw["model"]):
                output = call["self"].evaluation_loop(
                    kw["eval_dataloader"],
                    description=f"Evaluation of EMA {decay_label(decay)}",
                    prediction_loss_only=True if call["self"].compute_metrics is None else None,
                    ignore_keys=call.get("ignore_keys"),
                    metric_key_prefix=f"{call['metric_key_prefix']}_{arm}",
                )
            _prefix_gathered(call["self"], arm)
            metrics = dict(output.metrics or {})
            call["self"].log(metrics)
            kw["metrics"].update(metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Where the Trainer has loaded the weights of the best checkpoint, take the averages of that checkpoint too."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.barrier()  # the first process may still be writing
            self.ema.load_state_dict(_load_checkpoint(Path(state.best_model_checkpoint) / self._state_file))


def _names_in(state: Mapping[str, Any]) -> Collection[str]:
    """Names of the parameters that a state holds averages of."""
    return list(next(iter(state["averages"].values())))


def _load_checkpoint(path: Path, step: int | None = None) -> dict[str, Any]:
    if not path.is_file():
        fix = "use a checkpoint that was written with this callback, or call load_ema_state() before train()"
        raise FileNotFoundError(f"{path.parent} holds no {path.name}; {fix}")
    state = load_ema_file(path)
    if step not in (None, state["step"]):
        raise ValueError(f"{path} must be of step {step}, got step {state['step']}; use an unmixed checkpoint")
    return state


def _prefix_gathered(trainer: Trainer, prefix: str) -> None:
    """Name what TRL's trainers gather during an evaluation, and add to the next log, after the weights it is of."""
    gathered = getattr(trainer, "_metrics", {}).get("eval", {})
    for name in list(gathered):
        gathered[f"{prefix}_{name}"] = gathered.pop(name)


@contextmanager
def _unchanged_random_state(model: nn.Module) -> Iterator[None]:
    """Random state of Python, NumPy, torch and the model's GPUs after the block is that before it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
