"""Averages of any length, chosen after the run (Karras et al. 2024, arXiv:2312.02696; section «EMA» of THEORY.md).

Two averages with power-function profiles are followed during training and stored now and then; any other profile at any
stored step is then a linear combination of the stored ones. Equation numbers are those of the paper:

    θ_γ(t) = β_γ(t) · θ_γ(t−1) + (1 − β_γ(t)) · θ(t),    β_γ(t) = (1 − 1/t)^(γ+1)                              (3)

so that θ(k) has the weight (k^(γ+1) − (k−1)^(γ+1)) / t^(γ+1) in θ_γ(t), and θ(0) has none. The width of a profile as a
share of the run is σ_rel = ((γ+1) / ((γ+2)² (γ+3)))^½: 0.05 and 0.10 are γ = 16.97 and 6.94.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from forge.ema import EMACallback, EMAModel, decay_label, save_ema_file

Array = npt.NDArray[np.float64]

WIDEST = 12**-0.5
"""σ_rel of γ = 0, the uniform average of the whole run; a profile that leans to the end is narrower."""

_START = "start"
"""Label, and file name, of the weights at the beginning of the run."""

_CHUNK_STEPS = 1 << 15
"""Steps whose weights are held at once while profiles are compared."""

_CHUNK_ELEMENTS = 1 << 18
"""Elements of a parameter that are put together at once, from all snapshots."""


def sigma_rel_of(gamma: float) -> float:
    """Width of a power-function profile as a share of the run (the relation above equation 4 of the paper)."""
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}; 0 is the uniform average")
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ of a profile of width σ_rel: the one root ≥ 0 of (γ+2)²(γ+3) σ² = γ+1.

    Raises:
        ValueError: unless ``sigma_rel`` is in (0, 12^-½]; wider profiles would lean to the beginning of the run.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel must be in (0, {WIDEST:.6f}], got {sigma_rel}; the paper uses 0.05 and 0.10")
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


class PowerEMAModel(EMAModel):
    """Averages with power-function profiles, for a custom training loop.

    Used as ``EMAModel`` is; wherever that speaks of a decay, here is σ_rel.

    Args:
        model: the model being trained.
        sigma_rel: widths of the profiles as shares of the run so far, each in (0, 12^-½).
        **options: ``trainable_only``, ``names``, ``device`` and ``update_every`` of ``EMAModel``. With
            ``update_every=n`` the average is that of every n-th θ: t in equation 3 counts updates.
    """

    def __init__(
        self, model: torch.nn.Module, sigma_rel: float | Sequence[float] = (0.05, 0.10), **options: Any
    ) -> None:
        for unknown in sorted(set(options) - {"trainable_only", "names", "device", "update_every"}):
            raise TypeError(
                f"a power-function average takes trainable_only, names, device, update_every, got {unknown}"
            )
        super().__init__(model, sigma_rel, **options)
        self._exponents = {width: gamma_of(width) + 1 for width in self.decays}

    def _weight(self, decay: float, updates: int) -> float:
        """1 − β_γ(t) of equation 3."""
        return -math.expm1(self._exponents[decay] * math.log1p(-1 / updates)) if updates > 1 else 1.0


class PostHocEMACallback(EMACallback):
    """Follows two power-function averages in the ``Trainer`` and stores them every so many optimizer steps.

    Args:
        snapshots: folder of the snapshots, one safetensors file each; made if it does not exist.
        every_steps: optimizer steps between snapshots; the last step of the run has one too.
            A run from step 0 empties the folder of snapshots, one that resumes drops those of later steps.
        sigma_rel: widths of the two profiles.
        dtype: None stores the averages as they are followed (fp32 at least); ``torch.float16`` halves the files.
        relative_to_start: with a ``dtype``, store how far an average has come from the weights at the beginning, which
            lie beside the snapshots in full. False rounds the averages themselves: where training moves weights little,
            as in fine-tuning, their rounding, which a reconstruction multiplies, is as large as what averaging changes.
        **options: as of ``PowerEMAModel``.

    Raises:
        ValueError: for an interval below 1 or no multiple of ``update_every``, fewer than two widths, or a dtype
            without fractions.
    """

    _model_class = PowerEMAModel
    _state_file = "posthoc_ema_state.safetensors"

    def __init__(
        self,
        snapshots: str | Path,
        every_steps: int,
        sigma_rel: Sequence[float] = (0.05, 0.10),
        *,
        dtype: torch.dtype | None = None,
        relative_to_start: bool = True,
        **options: Any,
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be of floating point, got {dtype}; pass for example torch.float16")
        if len(sigma_rel) < 2:
            raise ValueError(f"two profiles or more are needed to reconstruct others, got {list(sigma_rel)}")
        super().__init__(sigma_rel, evaluate=False, **options)
        if every_steps % options.get("update_every", 1):
            raise ValueError(
                f"every_steps must be a multiple of update_every, got {every_steps} and {options['update_every']}"
            )
        self._folder, self._every, self._dtype = Path(snapshots), every_steps, dtype
        self._relative = relative_to_start and dtype is not None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Start from θ(0), or from the checkpoint that training resumes from."""
        super().on_train_begin(args, state, control, **kw)
        if args.should_save:
            for step, path in _snapshots(self._folder).items():
                if step > state.global_step or (step % self._every and step != state.max_steps):
                    path.unlink()
        if self._relative and state.global_step == 0 and args.should_save:
            self._folder.mkdir(parents=True, exist_ok=True)
            beginning = {name: weights.cpu() for name, weights in self.ema.averages(self.ema.decays[0]).items()}
            save_ema_file({"averages": {_START: beginning}}, _start_path(self._folder))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Update the averages and store them when it is time."""
        super().on_step_end(args, state, control, **kw)
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._store(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Store the last step of a run that was stopped early."""
        if state.global_step and not snapshot_path(self._folder, state.global_step).exists():
            self._store(args, state)
        super().on_train_end(args, state, control, **kw)

    def _store(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.should_save:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_ema_file(self._snapshot(), snapshot_path(self._folder, state.global_step))

    def _snapshot(self) -> dict[str, Any]:
        """The state, in the dtype of the files, with the updates that its profiles are counted in."""
        ema = self.ema
        with safe_open(_existing_start(self._folder), framework="pt") if self._relative else nullcontext() as start:
            averages = {
                decay_label(width): {n: self._stored(n, average, start) for n, average in ema.averages(width).items()}
                for width in ema.decays
            }
        told = {"step": ema.step, "decays": list(ema.decays), "update_every": ema.update_every}
        return {**told, "relative_to_start": self._relative, "averages": averages}

    def _stored(self, name: str, average: Tensor, start: Any) -> Tensor:
        """One average as it goes into the file, on the CPU."""
        from_start = average.cpu() if start is None else average.cpu() - start.get_tensor(f"{_START}/{name}")
        return from_start.to(self._dtype)


def _start_path(folder: Path) -> Path:
    return folder / f"{_START}.safetensors"


def _existing_start(folder: Path) -> Path:
    path = _start_path(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"snapshots relative to the start need the weights at the beginning of the run, but {path} is missing; "
            "use the folder that the run began with"
        )
    return path


def snapshot_path(folder: str | Path, step: int) -> Path:
    """File of the snapshot at an optimizer step."""
    return Path(folder) / f"step-{step:09d}.safetensors"


def _snapshots(folder: Path) -> dict[int, Path]:
    """Files of a folder by optimizer step, rising."""
    return {int(path.stem.removeprefix("step-")): path for path in sorted(folder.glob("step-*.safetensors"))}


@dataclass(frozen=True)
class Reconstruction:
    """An average put together from stored ones."""

    averages: dict[str, Tensor]
    """Parameter name → average, fp32 at least, on the CPU."""
    error: float
    """‖profile found − profile wanted‖ / ‖profile wanted‖ over the steps of the run: 0 is exact."""

    @torch.no_grad()
    def apply(self, model: torch.nn.Module) -> None:
        """Write the averages into a model with parameters of these names.

        Raises:
            ValueError: if a parameter is missing or of another shape; nothing is written then.
        """
        named = dict(model.named_parameters())
        for name, average in self.averages.items():
            if name not in named or named[name].shape != average.shape:
                found = tuple(named[name].shape) if name in named else "no such parameter"
                raise ValueError(f"the model must have {name} of shape {tuple(average.shape)}, got {found}")
        for name, average in self.averages.items():
            named[name].copy_(average)


def reconstruct(
    folder: str | Path, *, sigma_rel: float | None = None, decay: float | None = None, step: int | None = None
) -> Reconstruction:
    """The average of a wanted profile, from the snapshots of a run (section 3.2 of the paper: least squares).

    Args:
        folder: the snapshots that ``PostHocEMACallback`` wrote.
        sigma_rel: the wanted width of a power-function profile, or
        decay: the wanted β of an exponential average with bias correction; exactly one of the two.
        step: the optimizer step to average up to, at most that of the last snapshot, which is the default. Between
            two snapshots the error is larger than at one. Snapshots after the first one from there on are not read.

    Raises:
        FileNotFoundError: if the folder holds no snapshot.
        ValueError: unless exactly one profile is named, in range, and ``step`` lies in the run.
    """
    if (sigma_rel is None) == (decay is None):
        raise ValueError(f"name either sigma_rel or decay, got sigma_rel={sigma_rel} and decay={decay}")
    if decay is not None:
        return _reconstructions(folder, step, lambda every, updates: [_exponential(decay, every, updates)])[0]
    assert sigma_rel is not None
    return reconstruct_widths(folder, [sigma_rel], step=step)[0]


def reconstruct_widths(
    folder: str | Path, sigma_rel: Sequence[float], *, step: int | None = None
) -> list[Reconstruction]:
    """Several averages as ``reconstruct`` gives them, in one pass over the snapshots; all are in memory at once."""
    gammas = [gamma_of(width) for width in sigma_rel]
    return _reconstructions(folder, step, lambda _, updates: [power_profile(gamma, updates) for gamma in gammas])


def _reconstructions(
    folder: str | Path, step: int | None, wanted: Callable[[int, int], list[Array]]
) -> list[Reconstruction]:
    """The averages of profiles that ``wanted(update_every, updates)`` gives, over the θ that the updates saw."""
    files = _snapshots(Path(folder))
    if not files:
        raise FileNotFoundError(f"{folder} holds no snapshot; train with PostHocEMACallback")
    told = _told(files)
    every: int = told["update_every"]
    step = max(files) if step is None else step
    if not every <= step <= max(files):
        raise ValueError(f"step must be in [{every}, {max(files)}], where the last snapshot is, got {step}")
    last = min(at for at in files if at >= step)
    stored = [(width, at) for at in files if every <= at <= last for width in told["decays"]]
    profiles = [power_profile(gamma_of(width), at // every) for width, at in stored]
    found = [
        combine(profiles, np.pad(profile, (0, last // every - profile.size)))
        for profile in wanted(every, step // every)
    ]
    parts, shares = [(files[at], decay_label(width)) for width, at in stored], np.array([each for each, _ in found])
    if told["relative_to_start"]:
        parts, shares = [(_existing_start(Path(folder)), _START), *parts], np.insert(shares, 0, 1.0, axis=1)
    sums = _weighted_sums(parts, shares)
    return [Reconstruction(averages, error) for averages, (_, error) in zip(sums, found, strict=True)]


def _told(files: Mapping[int, Path]) -> dict[str, Any]:
    """What all snapshots say of how they were made; ValueError if they differ."""
    told: dict[str, Any] = {}
    for path in files.values():
        with safe_open(path, framework="pt") as file:
            said = {key: value for key, value in json.loads(file.metadata()["ema"]).items() if key != "step"}
        if told and said != told:
            raise ValueError(f"snapshots must be made alike, got {told} and, in {path}, {said}; delete either kind")
        told = said
    return told


def _weighted_sums(stored: Sequence[tuple[Path, str]], shares: Array) -> list[dict[str, Tensor]]:
    """Sums of stored averages (file and label), by rows of shares of shape (sums, stored); fp32 at least."""
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path, _ in stored}
        keys = [key.split("/", 1) for key in files[stored[0][0]].keys()]  # noqa: SIM118 (no mapping)
        sums: list[dict[str, Tensor]] = [{} for _ in shares]
        for name in (name for label, name in keys if label == stored[0][1]):
            parts = [files[path].get_slice(f"{label}/{name}") for path, label in stored]
            for total, tensor in zip(sums, _weighted(parts, shares), strict=True):
                total[name] = tensor
        return sums


def _weighted(stored: Sequence[Any], shares: Array) -> Tensor:
    """Sums of stored tensors, each a slice of a file, a chunk of rows at a time; shape (sums, *shape)."""
    shape = stored[0].get_shape()
    if not shape:
        return _weighted_rows([part[...] for part in stored], shares)
    rows = max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
    begins = range(0, shape[0], rows)
    return torch.cat([_weighted_rows([part[i : i + rows] for part in stored], shares) for i in begins], dim=1)


def _weighted_rows(stored: Sequence[Tensor], shares: Array) -> Tensor:
    dtype = torch.promote_types(stored[0].dtype, torch.float32)
    flat = torch.empty(len(stored), stored[0].numel(), dtype=dtype)
    for row, tensor in zip(flat, stored, strict=True):
        row.copy_(tensor.reshape(-1))
    return (torch.from_numpy(shares).to(dtype) @ flat).view(-1, *stored[0].shape)


def power_profile(gamma: float, step: int) -> Array:
    """Weights of θ(1)…θ(step) in θ_γ(step); shape (step,), sum 1."""
    return np.diff((np.arange(step + 1) / step) ** (gamma + 1))


def exponential_profile(decay: float, step: int) -> Array:
    """Weights of θ(1)…θ(step) in a bias-corrected exponential average; shape (step,), sum 1."""
    log_decay = math.log(decay)
    weights = np.exp(log_decay * np.arange(step - 1, -1, -1.0))
    return np.asarray(weights * (math.expm1(log_decay) / math.expm1(step * log_decay)))


def combine(stored: Sequence[Array], wanted: Array) -> tuple[Array, float]:
    """Shares of the stored profiles whose sum is nearest to the wanted one, and the relative distance that is left.

    The shares sum to 1, as the weights of each profile do: else the sum would scale what all θ have in common, by 2 %
    where the profile itself is 10 % off.
    """
    gram, product = np.zeros((len(stored), len(stored))), np.zeros(len(stored))
    for begin in range(0, wanted.size, _CHUNK_STEPS):
        part = np.zeros((len(stored), min(_CHUNK_STEPS, wanted.size - begin)))
        for row, profile in zip(part, stored, strict=True):
            some = profile[begin : begin + row.size]
            row[: some.size] = some
        gram += part @ part.T
        product += part @ wanted[begin : begin + part.shape[1]]
    first, others = np.eye(1, len(stored))[0], np.vstack([-np.ones(len(stored) - 1), np.eye(len(stored) - 1)])
    free = np.linalg.lstsq(others.T @ gram @ others, others.T @ (product - gram @ first), rcond=None)[0]
    shares = np.asarray(first + others @ free, dtype=np.float64)
    norm = float(wanted @ wanted)
    left = norm - 2 * float(shares @ product) + float(shares @ gram @ shares)
    return shares, math.sqrt(max(0.0, left) / norm)


def _exponential(decay: float, every: int, updates: int) -> Array:
    if not 0 < decay < 1:
        raise ValueError(f"decay must be a number in (0, 1), got {decay}; pass for example 0.999")
    return exponential_profile(decay**every, updates)
