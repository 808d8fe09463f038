"""Exponential moving averages of model weights (section «EMA» of THEORY.md).

    θ_ema(t) = β · θ_ema(t−1) + (1 − β) · θ(t),    θ_ema(0) = θ(0)                                             (1)

``EMAModel`` follows one or many decays β along one training trajectory in a custom loop; ``EMACallback`` does the same
inside the Hugging Face ``Trainer``. Averages are kept in fp32 whatever the dtype of the weights: in bf16, with eight
bits of mantissa, a step of (1 − 0.9999) is below half a unit in the last place and the average never moves.

Source: Polyak & Juditsky (1992) for uniform averaging, which (1) is not; (1) with constant β forgets geometrically.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

if TYPE_CHECKING:
    from transformers import Trainer

STATE_FILE = "ema_state.safetensors"
"""File name of the averages inside a Trainer checkpoint."""

_BLOCK_ELEMENTS = 1 << 17
"""Elements updated at a time when several decays share one read of the weights: 512 KiB of fp32, which stays in a
core's L2 cache, so that the weights are read from memory once whatever the number of decays."""


def compute_optimal_decay(total_steps: int) -> float:
    """Decay whose half-life is a tenth of the run: β = 0.5^(1 / (0.1 · T)); 0.99931 at 10,000 steps.

    Args:
        total_steps: length T of the run in optimizer steps.

    Raises:
        ValueError: if ``total_steps`` is not a positive whole number.
    """
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
    return float(0.5 ** (1 / (0.1 * total_steps)))


def averaging_horizon(decay: float) -> float:
    """Mean age of the weights in the average, 1 / (1 − β), in optimizer steps."""
    return 1 / (1 - decay)


def initial_weight_share(decay: float, steps: int) -> float:
    """Share of θ(0) that is left in the average after ``steps`` updates, β^t (equation 1 unrolled)."""
    return float(decay**steps)


def decay_label(decay: float) -> str:
    """Short name of a decay in metric names and state keys: ``0.999``, ``0.999307`` (six significant digits)."""
    return f"{decay:.6g}"


class EMAModel:
    """Averages of a model's parameters along one trajectory, for a custom training loop.

    Each parameter is averaged once, however many modules share it (tied embeddings). Buffers are not averaged. Under
    LoRA the trainable parameters are the adapters, so only they are averaged.

    Args:
        model: the model being trained. Parameters are followed by identity; weights are read at each ``update()``.
        decay: β in (0, 1), or several of them, all followed along the same trajectory.
        bias_correction: start from nothing instead of θ(0): the average after t updates is the normalised sum
            Σ β^(t−k) θ(k) / Σ β^(t−k) over k = 1…t.
        update_every: update at every n-th call with β^n, so that the half-life in optimizer steps stays the same.
        update_after_step: until this step the average equals the weights; equation (1) starts there.
        trainable_only: average only parameters with ``requires_grad``; otherwise every floating-point parameter.
        device: where the averages live; by default beside each parameter.

    Raises:
        ValueError: if a decay is outside (0, 1) or repeated, an interval is out of range, or nothing is averaged.
        NotImplementedError: if parameters are sharded (FSDP2 DTensor, DeepSpeed ZeRO-3).
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Sequence[float] = 0.999,
        *,
        bias_correction: bool = False,
        update_every: int = 1,
        update_after_step: int = 0,
        trainable_only: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        self.decays = _validated_decays(decay)
        if update_every < 1:
            raise ValueError(f"update_every must be at least 1, got {update_every}")
        if update_after_step < 0:
            raise ValueError(f"update_after_step must be at least 0, got {update_after_step}")
        self.bias_correction = bias_correction
        self.update_every = update_every
        self.update_after_step = update_after_step
        self.trainable_only = trainable_only
        self.step = 0
        self._parameters = dict(_averaged_parameters(model, trainable_only))
        self._shadows = {
            d: [_new_shadow(p, device) for p in self._parameters.values()] for d in self.decays
        }
        self._backup: list[Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Count one optimizer step and move every average towards the current weights (equation 1).

        Raises:
            RuntimeError: if averaged weights are applied: averaging them into themselves would be a silent error.
        """
        if self._backup is not None:
            raise RuntimeError("update() while averaged weights are applied; leave use_ema() or call restore() first")
        self.step += 1
        steps = self.step - self.update_after_step
        if steps <= 0:
            self._lerp([1.0] * len(self.decays))
        elif steps % self.update_every == 0:
            self._lerp([self._weight(d, steps // self.update_every) for d in self.decays])

    def _weight(self, decay: float, updates: int) -> float:
        """Weight of the current θ in update number ``updates`` (from 1)."""
        effective = decay**self.update_every
        if self.bias_correction:
            return (1 - effective) / -math.expm1(updates * math.log(effective))
        return 1 - effective

    def _lerp(self, weights: list[float]) -> None:
        shadows = [self._shadows[d] for d in self.decays]
        parameters = [p.detach() for p in self._parameters.values()]
        if len(shadows) == 1 and all(p.dtype == s.dtype and p.device == s.device for p, s in zip(parameters, shadows[0])):
            torch._foreach_lerp_(shadows[0], parameters, weights[0])
            return
        for parameter, *averages in zip(parameters, *shadows, strict=True):
            blocks = [average.view(-1).split(_BLOCK_ELEMENTS) for average in averages]
            for block, *targets in zip(parameter.reshape(-1).split(_BLOCK_ELEMENTS), *blocks, strict=True):
                source = block.to(device=targets[0].device, dtype=torch.float32)
                for target, weight in zip(targets, weights, strict=True):
                    target.lerp_(source, weight)

    @torch.no_grad()
    def apply_ema(self, decay: float | None = None, *, backup: bool = True) -> None:
        """Write averaged weights into the model.

        Args:
            decay: which average; may be left out when only one is followed.
            backup: keep the raw weights for ``restore()``, at the cost of one more copy.

        Raises:
            ValueError: if ``decay`` is not one that is followed, or is left out where several are.
            RuntimeError: if averaged weights are applied already with a backup.
        """
        shadows = self._shadows[self._pick(decay)]
        if self._backup is not None:
            raise RuntimeError("averaged weights are already applied; call restore() first")
        if backup:
            self._backup = [p.detach().clone() for p in self._parameters.values()]
        for parameter, shadow in zip(self._parameters.values(), shadows, strict=True):
            parameter.copy_(shadow)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the raw weights that ``apply_ema`` replaced.

        Raises:
            RuntimeError: if there is no backup.
        """
        if self._backup is None:
            raise RuntimeError("nothing to restore; apply_ema() has not been called with backup=True")
        for parameter, raw in zip(self._parameters.values(), self._backup, strict=True):
            parameter.copy_(raw)
        self._backup = None

    @contextmanager
    def use_ema(self, decay: float | None = None) -> Iterator[None]:
        """Averaged weights inside the block, raw weights again after it (also after an error)."""
        self.apply_ema(decay)
        try:
            yield
        finally:
            self.restore()

    def averages(self, decay: float | None = None) -> dict[str, Tensor]:
        """Name → average (fp32, shape of the parameter); the live tensors, not copies."""
        return dict(zip(self._parameters, self._shadows[self._pick(decay)], strict=True))

    @property
    def extra_bytes(self) -> int:
        """Bytes that the averages occupy."""
        return sum(s.untyped_storage().nbytes() for shadows in self._shadows.values() for s in shadows)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and CPU tensors: survives ``torch.save`` and ``torch.load(weights_only=True)``."""
        return {
            "step": self.step,
            "decays": list(self.decays),
            "averages": {
                decay_label(d): {name: t.detach().to("cpu", copy=True) for name, t in self.averages(d).items()}
                for d in self.decays
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: if decays, parameter names or shapes differ from this model's; nothing is changed then.
        """
        if [decay_label(d) for d in state["decays"]] != [decay_label(d) for d in self.decays]:
            raise ValueError(f"the saved EMA follows decays {list(state['decays'])}, this one {list(self.decays)}")
        for decay in self.decays:
            _check_same_parameters(self._parameters, state["averages"][decay_label(decay)])
        for decay in self.decays:
            saved = state["averages"][decay_label(decay)]
            for name, average in self.averages(decay).items():
                average.copy_(saved[name])
        self.step = int(state["step"])

    def _pick(self, decay: float | None) -> float:
        if decay is None:
            if len(self.decays) > 1:
                raise ValueError(f"several decays are followed; choose one of {list(self.decays)}")
            return self.decays[0]
        for known in self.decays:
            if decay_label(known) == decay_label(decay):
                return known
        raise ValueError(f"decay {decay} is not followed; choose one of {list(self.decays)}")


class EMACallback(TrainerCallback):
    """Follows averages during ``Trainer.train()`` and evaluates them whenever the Trainer evaluates.

    ``Trainer(callbacks=[EMACallback(decay=(0.99, 0.999))])`` is all there is to do: one update per optimizer step
    (whatever the gradient accumulation), metrics ``eval_ema_0.999_loss`` beside ``eval_loss`` (with everything that
    ``compute_metrics`` adds), the state in every checkpoint and restored by ``resume_from_checkpoint``.

    Args:
        decay: β or several of them, see ``EMAModel``.
        evaluate: evaluate the averages too; each costs as much as evaluating the raw weights.
        **options: further options of ``EMAModel``.
    """

    def __init__(self, decay: float | Sequence[float] = 0.999, *, evaluate: bool = True, **options: Any) -> None:
        self.decays = _validated_decays(decay)
        self._evaluate = evaluate
        self._options = options
        self._ema: EMAModel | None = None
        self._loaded: Mapping[str, Any] | None = None

    @property
    def ema(self) -> EMAModel:
        """The averages of the current or last training run.

        Raises:
            RuntimeError: before training has begun and before a state is applied.
        """
        if self._ema is None:
            raise RuntimeError("there is no EMA yet; train first, or load_ema_state() and apply_ema(model)")
        return self._ema

    def apply_ema(self, model: nn.Module, decay: float | None = None, *, backup: bool = True) -> None:
        """Write averaged weights into ``model``: the trained one, or any of the same parameters (by name)."""
        self._bound_to(model).apply_ema(decay, backup=backup)

    def restore(self) -> None:
        """Put back the raw weights that ``apply_ema`` replaced."""
        self.ema.restore()

    def use_ema(self, decay: float | None = None) -> Any:
        """Context manager: averaged weights inside the block, raw ones after it."""
        return self.ema.use_ema(decay)

    def get_ema_state(self) -> dict[str, Any]:
        """State for ``torch.save``; see ``EMAModel.state_dict``."""
        if self._ema is None and self._loaded is not None:
            return dict(self._loaded)
        return self.ema.state_dict()

    def load_ema_state(self, state: Mapping[str, Any]) -> None:
        """Take over a state from ``get_ema_state()``; it is checked against the model as soon as one is known.

        Before training it becomes the state that training continues from when it resumes at the same step.

        Raises:
            ValueError: if the state follows other decays, or (with a known model) other parameters.
        """
        if [decay_label(d) for d in state["decays"]] != [decay_label(d) for d in self.decays]:
            raise ValueError(f"the saved EMA follows decays {list(state['decays'])}, this one {list(self.decays)}")
        if self._ema is not None:
            self._ema.load_state_dict(state)
        self._loaded = state

    def _bound_to(self, model: nn.Module) -> EMAModel:
        """The averages bound to ``model``'s parameters: today's if it is the trained model, else carried over."""
        parameters = dict(_averaged_parameters(model, self._options.get("trainable_only", True)))
        if self._ema is not None and all(self._ema._parameters.get(n) is p for n, p in parameters.items()):
            return self._ema
        state = self.get_ema_state()
        ema = EMAModel(model, self.decays, **self._options)
        ema.load_state_dict(state)
        self._ema = ema
        return ema

    # Trainer events -------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from θ(0), or from the checkpoint that training resumes from."""
        self._ema = EMAModel(kwargs["model"], self.decays, **self._options)
        if state.global_step > 0:
            self._ema.load_state_dict(self._resumed_state(args, state.global_step))
        self._loaded = None

    def _resumed_state(self, args: TrainingArguments, step: int) -> Mapping[str, Any]:
        if self._loaded is not None and self._loaded["step"] == step:
            return self._loaded
        folders = [args.resume_from_checkpoint, Path(str(args.output_dir)) / f"checkpoint-{step}"]
        for folder in folders:
            if isinstance(folder, (str, Path)) and (Path(folder) / STATE_FILE).is_file():
                saved = load_ema_file(Path(folder) / STATE_FILE)
                if saved["step"] == step:
                    return saved
        raise FileNotFoundError(
            f"training resumes at step {step}, but {folders[-1]} holds no {STATE_FILE} of that step; "
            "resume from a checkpoint that was written with EMACallback, or call load_ema_state() before train()"
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One optimizer step has been taken (gradient accumulation counts once)."""
        self.ema.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the averages into the checkpoint that the Trainer has just written."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            save_ema_file(self.ema.state_dict(), folder / STATE_FILE)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate each average with the Trainer's own loop and add its metrics to those of the raw weights."""
        if not self._evaluate or self._ema is None or self._ema._backup is not None:
            return
        trainer, metrics = _calling_trainer(), kwargs["metrics"]
        prefix = next(key for key in metrics if key.endswith("_runtime")).removesuffix("_runtime")
        for decay in self.decays:
            with self.ema.use_ema(decay):
                output = trainer.evaluation_loop(
                    kwargs["eval_dataloader"],
                    description=f"Evaluation of EMA {decay_label(decay)}",
                    prediction_loss_only=True if trainer.compute_metrics is None else None,
                    metric_key_prefix=f"{prefix}_ema_{decay_label(decay)}",
                )
            trainer.log(output.metrics)
            metrics.update(output.metrics)


def save_ema_file(state: Mapping[str, Any], path: Path) -> None:
    """Write an EMA state as safetensors."""
    tensors = {f"{label}/{name}": t for label, named in state["averages"].items() for name, t in named.items()}
    save_file(tensors, path, metadata={"ema": json.dumps({"step": state["step"], "decays": state["decays"]})})


def load_ema_file(path: Path) -> dict[str, Any]:
    """Read a state written by ``save_ema_file``."""
    with safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["ema"])
        state["averages"] = {decay_label(d): {} for d in state["decays"]}
        for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            label, name = key.split("/", 1)
            state["averages"][label][name] = file.get_tensor(key)
    return state


def _validated_decays(decay: float | Sequence[float]) -> tuple[float, ...]:
    decays = (decay,) if isinstance(decay, (int, float)) else tuple(decay)
    if not decays:
        raise ValueError("at least one decay is needed, got none")
    for d in decays:
        if not 0 < d < 1:
            raise ValueError(f"decay must be in (0, 1), got {d}")
    if len({decay_label(d) for d in decays}) < len(decays):
        raise ValueError(f"decays must differ, got {', '.join(map(str, decays))}")
    return tuple(float(d) for d in decays)


def _averaged_parameters(model: nn.Module, trainable_only: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters to average, each once (``named_parameters`` skips the second name of a tied one)."""
    empty = True
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or (trainable_only and not parameter.requires_grad):
            continue
        if hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor":
            raise NotImplementedError(
                f"{name} is sharded; EMA follows whole parameters: use DDP, or FSDP/ZeRO without parameter sharding"
            )
        empty = False
        yield name, parameter
    if empty:
        raise ValueError("the model has no trainable floating-point parameters to average; unfreeze some first")


def _new_shadow(parameter: nn.Parameter, device: torch.device | str | None) -> Tensor:
    target = parameter.device if device is None else device
    return torch.empty(parameter.shape, dtype=torch.float32, device=target).copy_(parameter.detach())


def _check_same_parameters(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    differing = sorted(set(parameters) ^ set(saved))
    if differing:
        raise ValueError(f"the saved EMA is of other parameters: {len(differing)} differ, the first is {differing[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != saved[name].shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, the saved EMA {tuple(saved[name].shape)}")


def _calling_trainer() -> Trainer:
    """The Trainer whose event is being handled. Callbacks are not given it, and only it can evaluate as it does."""
    from transformers import Trainer

    frame = sys._getframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("EMACallback.on_evaluate must be called by a transformers Trainer")
