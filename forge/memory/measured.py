"""Measured memory: the highest sum of allocations over one real training step.

CUDA: the caching allocator's own counters. CPU: torch has no counter there, but its profiler logs every allocation and
release; their running sum, on top of what lived before the step, is the same curve. What other libraries take past
torch's allocators (oneDNN's scratch memory, CUDA's context) shows in neither.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from forge.checks import check_whole
from forge.memory.storage import buffer_bytes, parameter_storage


@dataclass(frozen=True)
class MeasuredMemory:
    """Memory of one real training step, in bytes."""

    peak_bytes: int
    """Highest sum of what was allocated on the device at once."""
    parameters_bytes: int
    """Parameters, buffers and quantisation state as they are stored; tied ones once."""
    gradients_bytes: int
    """All gradients, as they are when the optimizer steps."""
    optimizer_bytes: int
    """State of the optimizer on the device, after the step."""
    device: str
    """Where the parameters are, such as ``cpu`` or ``cuda:0``."""

    @property
    def rest_bytes(self) -> int:
        """What the peak has beyond parameters, gradients and optimizer state; never negative on a CPU.

        These three are all alive when the optimizer steps, so that no peak lies below their sum. Where the peak comes
        earlier, few of the gradients exist yet: activations, temporaries and inputs then fill this rest *and* the room
        of the missing gradients. The rest is what a step costs beyond the other components, no count of activations.
        """
        return self.peak_bytes - self.parameters_bytes - self.gradients_bytes - self.optimizer_bytes


class MeasureMemory(TrainerCallback):
    """Measure the peak of one optimizer step of a ``Trainer`` run.

    ``Trainer(callbacks=[measure := MeasureMemory()])``, then ``measure.measured`` after ``train()``. The step lasts
    from its first micro-batch to the optimizer's update; all its micro-batches are loaded before. On a CPU the profiler
    makes this one step slower, and no other.

    Counted: on CUDA all that the process has allocated. On a CPU the model, optimizer state, the step's batches, and
    all that the step itself allocates; left out is what lived before and belongs to others (the data set, what other
    callbacks keep, such as averages of the weights).

    Args:
        step: the optimizer step that is measured, counted from 1. In the first one the optimizer has no state before
            its update, so that its peak is lower than that of all others.

    Raises:
        ValueError: for a step below 1; from ``train()`` if the model is neither on a CPU nor on CUDA, or the run,
            which may resume from a checkpoint, does not come to the step.
        RuntimeError: from ``train()`` if it is stopped before the step.
    """

    def __init__(self, step: int = 2) -> None:
        check_whole("step", step, hint="2 is the first usual step")
        self.step = step
        self.measured: MeasuredMemory | None = None
        """The result, once the step is done."""
        self._watch: _Watch | None = None
        self._gradients_bytes = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Forget an earlier run."""
        if self._watch is not None:  # a run that broke off within the step
            self._watch.stop()
        self.measured, self._watch = None, None
        if not state.global_step < self.step <= state.max_steps:
            raise ValueError(
                f"step must be one of this run's, {state.global_step + 1} to {state.max_steps}, got {self.step}; pass "
                "MeasureMemory(step=...)"
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Begin to watch, if this is the step."""
        if state.global_step + 1 == self.step:
            self._watch = _Watch(kw["model"], kw["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Read the size of the gradients."""
        if self._watch is not None:
            self._gradients_bytes = _storage_bytes(p.grad for p in kw["model"].parameters() if p.grad is not None)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """The step is done: read the peak."""
        if self._watch is None:
            return
        peak, self._watch, device = self._watch.stop(), None, _device_of(kw["model"])
        self.measured = MeasuredMemory(
            peak_bytes=peak,
            parameters_bytes=_parameters_bytes(kw["model"]),
            gradients_bytes=self._gradients_bytes,
            optimizer_bytes=_storage_bytes(t for t in _state_tensors(kw["optimizer"]) if t.device == device),
            device=str(device),
        )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Refuse to end without a result."""
        if self.measured is None:
            raise RuntimeError(
                f"training must run optimizer step {self.step} for its memory to be measured, got a run that was "
                f"stopped at step {state.global_step}; pass MeasureMemory(step=...)"
            )


def measure_peak_bytes(step: Callable[[], object], *, device: str | torch.device, baseline_bytes: int) -> int:
    """Highest sum of allocations on the device while ``step()`` runs.

    Args:
        step: what is measured, such as one forward and backward pass. Call it once before, so that what the first call
            leaves behind (optimizer state) is there.
        device: ``cpu`` or a CUDA device.
        baseline_bytes: what is allocated before and counts: the tensors that the step works on.

    Raises:
        ValueError: for another kind of device.
    """
    recording = _recording(torch.device(device))
    recording.start()
    try:
        step()
    finally:
        rise = recording.stop()
    return baseline_bytes + rise


class _CpuRecording:
    """Rise of the CPU allocator's balance between start and stop."""

    def start(self) -> None:
        gc.collect()  # what an earlier recording saw allocated would count as released in this one
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self) -> int:
        self._profile.stop()
        recorded = self._profile.profiler
        assert recorded is not None and recorded.kineto_results is not None
        events: list[Any] = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        balance = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.device_type() == torch.profiler.DeviceType.CPU:
                balance += event.nbytes()
                highest = max(highest, balance)
        return highest


class _CudaRecording:
    """Rise of the caching allocator's balance between start and stop."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def stop(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


def _recording(device: torch.device) -> _CpuRecording | _CudaRecording:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"memory can be measured on cpu and cuda, got {device}; move the model there")
    return _CpuRecording() if device.type == "cpu" else _CudaRecording(device)


class _Watch:
    """Records a training step from here on, and knows what is alive already."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        device = _device_of(model)
        self._batches: dict[int, int] = {}
        self._recording = _recording(device)
        self._hook = model.register_forward_pre_hook(self._note_batch, with_kwargs=True)
        if device.type == "cuda":
            self._baseline = torch.cuda.memory_allocated(device)
        else:
            gradients = (p.grad for p in model.parameters() if p.grad is not None)
            state = _state_tensors(optimizer)
            self._baseline = _parameters_bytes(model) + _storage_bytes([*state, *gradients])
        self._on_cpu = device.type == "cpu"
        self._recording.start()

    def _note_batch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The Trainer has loaded the batches of the whole step before it begins; here they can be seen."""
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor):
                self._batches[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    def stop(self) -> int:
        """The peak since the beginning, with what was alive then."""
        self._hook.remove()
        rise = self._recording.stop()
        return self._baseline + rise + (sum(self._batches.values()) if self._on_cpu else 0)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _parameters_bytes(model: nn.Module) -> int:
    return sum(p.stored_bytes for p in parameter_storage(model)) + buffer_bytes(model)


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
