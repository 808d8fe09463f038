"""Averages of a model's parameters under one or many decays, for a custom training loop (section «EMA» of THEORY.md).

Equation numbers refer to ``forge.ema``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forge.checks import check_whole

_BLOCK = 1 << 12
"""Elements averaged under every decay before the next are read: 16 KiB of fp32, which stay in a core's first cache."""

_CHUNK_BLOCKS = 1 << 10
"""Blocks converted to fp32 at a time when the weights are of another dtype: at most 16 MiB of scratch memory."""


def compute_optimal_decay(total_steps: int) -> float:
    """Decay whose half-life is a tenth of the run: β = 0.5^(1 / (0.1 · T)); 0.99931 at 10,000 steps.

    Args:
        total_steps: length T of the run in optimizer steps.

    Raises:
        ValueError: if ``total_steps`` is not a positive whole number.
    """
    check_whole("total_steps", total_steps)
    return float(0.5 ** (1 / (0.1 * total_steps)))


def averaging_horizon(decay: float) -> float:
    """Mean age of the weights in the average, 1 / (1 − β), in optimizer steps (the newest weights count as age 1)."""
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
    LoRA the trainable parameters are the adapters, so only they are averaged; quantised weights never are.

    Args:
        model: the model being trained. Parameters are followed by identity; weights are read at each ``update()``.
        decay: β in (0, 1), or several of them, all followed along the same trajectory.
        bias_correction: start from nothing instead of θ(0): the average after t updates is the normalised sum
            Σ β^(t−k) θ(k) / Σ β^(t−k) over k = 1…t.
        update_every: update at every n-th call with β^n, so that the half-life in optimizer steps stays the same.
        update_after_step: until this step the average equals the weights; equation (1) starts there.
        trainable_only: average only parameters with ``requires_grad``; otherwise every floating-point parameter.
        names: average exactly the parameters of these names, instead of those that ``trainable_only`` selects.
        device: where the averages live; by default beside each parameter, wherever it moves.

    Raises:
        ValueError: if a decay is outside (0, 1) or repeated, an interval is out of range, or nothing is averaged.
        NotImplementedError: if parameters are sharded (FSDP, DTensor, DeepSpeed ZeRO-3).
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
        names: Collection[str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.decays = validated_decays(decay)
        check_whole("update_every", update_every)
        check_whole("update_after_step", update_after_step, at_least=0)
        self.bias_correction = bias_correction
        self.update_every = update_every
        self.update_after_step = update_after_step
        self.step = 0
        parameters = _averaged_parameters(model, trainable_only, names)
        self._tracks = {name: _Track(p, len(self.decays), device) for name, p in parameters.items()}
        self._backup: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Count one optimizer step and move every average towards the current weights (equation 1).

        Raises:
            RuntimeError: if averaged weights are applied: they would be averaged into themselves.
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
        log_decay = self.update_every * math.log(decay)
        return math.expm1(log_decay) / (math.expm1(updates * log_decay) if self.bias_correction else -1.0)

    def _lerp(self, weights: list[float]) -> None:
        tracks = list(self._tracks.values())
        for track in tracks:
            track.follow_device()
        if len(weights) == 1 and all(track.alike for track in tracks):
            torch._foreach_lerp_([t.average(0) for t in tracks], [t.parameter for t in tracks], weights[0])
            return
        columns: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for track in tracks:
            kind = (track.values.dtype, track.values.device)
            if kind not in columns:
                columns[kind] = torch.tensor(weights, dtype=kind[0], device=kind[1]).view(-1, 1)
            track.lerp(columns[kind])

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
        index = self._index(decay)
        if self._backup is not None:
            raise RuntimeError("averaged weights are already applied; leave use_ema() or call restore() first")
        if backup:
            self._backup = {name: track.parameter.detach().clone() for name, track in self._tracks.items()}
        for track in self._tracks.values():
            track.parameter.copy_(track.average(index))

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the raw weights that ``apply_ema`` replaced (RuntimeError if there is no backup of them)."""
        if self._backup is None:
            raise RuntimeError("nothing to restore; call apply_ema() with backup=True first")
        for name, track in self._tracks.items():
            track.parameter.copy_(self._backup[name])
        self._backup = None

    @contextmanager
    def use_ema(self, decay: float | None = None) -> Iterator[None]:
        """Averaged weights inside the block, raw weights again after it (also after an error)."""
        self.apply_ema(decay)
        try:
            yield
        finally:
            self.restore()

    def follows(self, model: nn.Module) -> bool:
        """Whether the averaged parameters are those of ``model``, the same objects under the same names."""
        named = dict(model.named_parameters())
        return all(named.get(name) is track.parameter for name, track in self._tracks.items())

    def averages(self, decay: float | None = None) -> dict[str, Tensor]:
        """Name → average (fp32 at least, shape of the parameter), to read only: a view under one decay, else a copy."""
        return {name: track.average(self._index(decay)) for name, track in self._tracks.items()}

    @property
    def extra_bytes(self) -> int:
        """Bytes that the averages occupy."""
        return sum(track.values.untyped_storage().nbytes() for track in self._tracks.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and CPU tensors: survives ``torch.save`` and ``torch.load(weights_only=True)``."""
        averages = {
            decay_label(d): {n: t.to("cpu", copy=True) for n, t in self.averages(d).items()} for d in self.decays
        }
        return {"step": self.step, "decays": list(self.decays), "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state. Weights that the model holds now count as the raw ones: a backup is dropped.

        Raises:
            ValueError: if decays, parameter names or shapes differ from this model's; nothing is changed then.
        """
        check_same_decays(state, self.decays)
        saved = [state["averages"][decay_label(d)] for d in self.decays]
        for averages in saved:
            _check_same_parameters({n: t.parameter for n, t in self._tracks.items()}, averages)
        for index, averages in enumerate(saved):
            for name, track in self._tracks.items():
                track.set_average(index, averages[name])
        self.step = int(state["step"])
        self._backup = None

    def _index(self, decay: float | None) -> int:
        labels = [decay_label(known) for known in self.decays]
        if decay is None and len(labels) == 1:
            return 0
        if decay is None or decay_label(decay) not in labels:
            raise ValueError(f"decay must be one of those followed, {list(self.decays)}, got {decay}")
        return labels.index(decay_label(decay))


class _Track:
    """A parameter and its averages under k decays.

    The averages lie block by block, the k of one block together, the incomplete block last. So one kernel call updates
    all and reads the weights from memory once: 28 bytes of traffic per fp32 weight and three decays, not 36.
    """

    def __init__(self, parameter: Tensor, decays: int, device: torch.device | str | None) -> None:
        self.parameter = parameter
        self._decays = decays
        self._follows_device = device is None
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._hold(torch.empty(decays * parameter.numel(), dtype=dtype, device=device or parameter.device))
        for index in range(decays):
            self.set_average(index, parameter.detach())

    def _hold(self, values: Tensor) -> None:
        """Keep the averages and views of them: the whole blocks (m, k, _BLOCK) and what is left (1, k, rest)."""
        self.values, size = values, self.parameter.numel()
        whole = size // _BLOCK * _BLOCK
        parts = [(slice(0, whole), _BLOCK), (slice(whole, size), size - whole)]
        self._pieces = [
            (values[part.start * self._decays : part.stop * self._decays].view(-1, self._decays, width), part)
            for part, width in parts
            if part.stop > part.start
        ]
        self._only = values.view(self.parameter.shape) if self._decays == 1 else None

    @property
    def alike(self) -> bool:
        """Whether parameter and averages are of one dtype on one device."""
        return self.values.dtype == self.parameter.dtype and self.values.device == self.parameter.device

    def follow_device(self) -> None:
        """Move the averages to where the parameter is now, unless they were given a device of their own."""
        if self._follows_device and self.values.device != self.parameter.device:
            self._hold(self.values.to(self.parameter.device))

    def lerp(self, weights: Tensor) -> None:
        """Move the average number i towards the parameter by ``weights[i]``; weights of shape (k, 1)."""
        alike, flat = self.alike, self.parameter.reshape(-1)
        for piece, part in self._pieces:
            new = (flat if len(self._pieces) == 1 else flat[part]).view(len(piece), 1, -1)
            if alike:
                piece.lerp_(new, weights)
                continue
            for some, new_some in zip(torch.split(piece, _CHUNK_BLOCKS), torch.split(new, _CHUNK_BLOCKS), strict=True):
                some.lerp_(new_some.to(some), weights)

    def average(self, index: int) -> Tensor:
        """One average in the parameter's shape: a view if there is only one decay, else a copy."""
        if self._only is not None:
            return self._only
        average = self.values.new_empty(self.parameter.shape)
        for piece, part in self._pieces:
            average.view(-1)[part].view(len(piece), -1).copy_(piece[:, index])
        return average

    def set_average(self, index: int, average: Tensor) -> None:
        """Overwrite one average."""
        flat = average.reshape(-1)
        for piece, part in self._pieces:
            piece[:, index].copy_(flat[part].view(len(piece), -1))


def save_ema_file(state: Mapping[str, Any], path: Path) -> None:
    """Write an EMA state as safetensors, whole or not at all."""
    tensors = {f"{label}/{name}": t for label, named in state["averages"].items() for name, t in named.items()}
    metadata = {"ema": json.dumps({key: value for key, value in state.items() if key != "averages"})}
    unfinished = path.with_name(path.name + ".tmp")
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)


def load_ema_file(path: Path) -> dict[str, Any]:
    """Read a state written by ``save_ema_file``."""
    with safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["ema"])
        state["averages"] = {decay_label(d): {} for d in state["decays"]}
        for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            label, name = key.split("/", 1)
            state["averages"][label][name] = file.get_tensor(key)
    return state


def validated_decays(decay: float | Sequence[float]) -> tuple[float, ...]:
    """The decays as a tuple of floats; ValueError for one outside (0, 1), a repeated one, or none."""
    decays = tuple(decay) if isinstance(decay, Sequence) and not isinstance(decay, str) else (decay,)
    if not decays:
        raise ValueError("at least one decay is needed, got none; pass for example 0.999")
    for d in decays:
        if not isinstance(d, Real) or not 0 < d < 1:
            raise ValueError(f"decay must be a number in (0, 1), got {d!r}; pass for example 0.999")
    if len({decay_label(d) for d in decays}) < len(decays):
        raise ValueError(f"decays must differ in six digits, got {', '.join(map(str, decays))}; drop the repeated one")
    return tuple(float(d) for d in decays)


def _averaged_parameters(model: nn.Module, trainable_only: bool, names: Collection[str] | None) -> dict[str, Tensor]:
    """Parameters to average, each once (``named_parameters`` skips the second name of a tied one)."""
    named = dict(model.named_parameters())
    if names is None:
        names = [n for n, p in named.items() if p.requires_grad or not (trainable_only or _is_quantised(p))]
    if not names:
        raise ValueError("the model has no trainable floating-point parameters to average; unfreeze some first")
    fully_sharded = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    for name in names:
        if name not in named:
            raise ValueError(f"the model has no parameter {name}; near misses: {get_close_matches(name, named)}")
        if fully_sharded or hasattr(named[name], "ds_id") or type(named[name].data).__name__ == "DTensor":
            raise NotImplementedError(
                f"{name} is sharded, EMA follows whole parameters; use DDP, or ZeRO up to stage 2"
            )
    return {name: named[name] for name in names}


def _is_quantised(parameter: nn.Parameter) -> bool:
    """Packed integers, 8-bit floats and the Parameter classes of bitsandbytes and torchao, which may claim bf16."""
    return type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.dtype.itemsize == 1


def check_same_decays(state: Mapping[str, Any], decays: tuple[float, ...]) -> None:
    """Refuse (ValueError) what is not an EMA state, or one that follows other decays."""
    missing = sorted({"step", "decays", "averages"} - set(state))
    if missing:
        raise ValueError(f"an EMA state must have {missing[0]!r}, got {sorted(state)}; pass what get_ema_state() gave")
    if [decay_label(d) for d in state["decays"]] != [decay_label(d) for d in decays]:
        raise ValueError(f"the saved EMA follows decays {list(state['decays'])}, this one {list(decays)}")


def _check_same_parameters(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    differing = sorted(set(parameters) ^ set(saved))
    if differing:
        raise ValueError(f"the saved EMA is of other parameters: {len(differing)} differ, the first is {differing[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != saved[name].shape:
            raise ValueError(
                f"{name} must have the shape of the model, {tuple(parameter.shape)}, got {tuple(saved[name].shape)} in "
                "the saved EMA; load it into the model that it was saved from"
            )
