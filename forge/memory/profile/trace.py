"""Log of a step on fake tensors: every storage with its birth, death, size and origin, and the memory that follows.

A ``TorchDispatchMode`` sees the results of every operation, in the forward and in the backward pass; the end of a
storage's life comes from a weak reference to it. The curve of memory is the running sum of both, as an allocator
without rounding has it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forge.memory.profile.cuda import flash_backward_buffers

Phase = Literal["forward", "backward", "optimizer"]
Component = Literal["parameters", "gradients", "optimizer_state", "activations", "temporaries", "inputs"]


@dataclass(eq=False)
class Allocation:
    """One storage, from its allocation to its release."""

    bytes: int
    phase: Phase
    operation: str
    """That made it, such as ``aten::mm``."""
    module: str
    """Whose forward pass made it; empty elsewhere."""
    in_forward_code: bool
    """Made by the forward pass, or by its repetition within the backward pass under checkpointing."""
    node: tuple[str, int] | None
    """Of the graph whose formula made it; None elsewhere."""
    kept_for_backward: bool = False
    """Alive when forward code gave way to the formulas of the backward pass."""
    alive: bool = True
    label: Component | None = None
    """What the step calls it; None until told: an activation or a temporary."""

    @property
    def component(self) -> Component:
        """An activation is made by forward code and lives on in the backward pass; the rest are temporaries."""
        if self.label is not None:
            return self.label
        return "activations" if self.in_forward_code and self.kept_for_backward else "temporaries"


@dataclass(frozen=True)
class Event:
    """Birth (+1) or death (−1) of a storage."""

    sign: int
    allocation: Allocation
    phase: Phase


_CHEAPER: dict[str, Callable[..., Any]] = {
    "aten::detach": torch.ops.aten.alias.default,
    "aten::_unsafe_view": torch.ops.aten.view.default,
    "bitsandbytes::dequantize_4bit": lambda a, absmax, blocksize, kind, shape, dtype: a.new_empty(shape, dtype=dtype),
    "bitsandbytes::dequantize_blockwise": lambda a, absmax, code, blocksize, dtype: torch.empty_like(a, dtype=dtype),
}
"""Frequent operations that ``FakeTensorMode`` is slow at, by others that do the same to memory."""


def _current_node() -> tuple[str, int] | None:
    """Name and number of the node of the autograd graph that is being evaluated."""
    node = torch._C._current_autograd_node()
    return None if node is None else (node.name(), node._sequence_nr())


class DataDependentError(ValueError):
    """The step's course depends on the values of tensors, which fake ones do not have."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Logs allocations and releases while it is active.

    Args:
        truth: the answer to ``if tensor:`` in the model's code, which fake tensors cannot give.
    """

    def __init__(self, *, truth: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Phase = "forward"
        self.log: list[Event] = []
        self.start = 0
        """Index of the step's first event."""
        self._truth = truth
        self._live: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._modules: list[str] = []
        self._was_forward_code = False
        self._summed: tuple[Allocation, int] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: no guard against the compiler around every operation."""
        return False

    def label(self, tensors: Iterable[Tensor], component: Component) -> None:
        """Say what tensors are; those that were not seen yet are logged as allocated now."""
        for tensor in tensors:
            self._observe(tensor, component).label = component

    def erase(self, tensor: Tensor) -> None:
        """Rewrite the log as if the tensor had never been."""
        _, erased = self._live.pop(id(tensor.untyped_storage()))
        self.start -= sum(event.allocation is erased for event in self.log[: self.start])
        self.log = [event for event in self.log if event.allocation is not erased]

    def settle(self, end: int) -> None:
        """Rewrite the log as if what lives on from the events since ``end`` had been there when the step began.

        So a step that follows another can be had from one run: the optimizer's first update makes its state, and
        nothing else of that update remains.
        """
        survivors = [event for event in self.log[end:] if event.sign > 0 and event.allocation.alive]
        self.log[end:] = []
        self.log[self.start : self.start] = survivors

    @contextmanager
    def names_of(self, model: nn.Module) -> Iterator[None]:
        """Know which module of the model is at work."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name)))
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        yield
        for handle in handles:
            handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and log what it allocates."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        name = str(func._schema.name)
        if name == "aten::_local_scalar_dense":
            return self._scalar(args[0])
        self._note_turn(self._in_forward_code())
        self._summed = None
        if name == "bitsandbytes::gemm_4bit":
            with self:
                return _dequantise_and_multiply(*args, **(kwargs or {}))
        buffers: list[Tensor] = []
        if name == "aten::_scaled_dot_product_flash_attention_backward":
            with self:
                buffers = flash_backward_buffers(args[1], args[2])
        result = _CHEAPER.get(name, func)(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._observe(leaf, name)
        if name == "aten::add" and self.phase == "backward":
            self._note_sum(args[0])
        del buffers
        return result

    def _note_sum(self, gradient: Tensor) -> None:
        """Mark a gradient to which the engine adds another one that belongs to the same node.

        It does so in place if nobody else holds the gradient, but never while a mode such as this one is active
        (``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp). If nobody did, the gradient dies next, and
        its death counts as before the birth of the sum. A sum within a formula adds to what the same node made.
        """
        if not self._in_forward_code() and not gradient._is_view():
            allocation = self._observe(gradient, "")
            self._summed = (allocation, len(self.log) - 1) if allocation.node != _current_node() else None

    def _leave(self) -> None:
        self._modules.pop()

    def _in_forward_code(self) -> bool:
        return self.phase == "forward" or (self.phase == "backward" and torch.is_grad_enabled())

    def _note_turn(self, forward_code: bool) -> None:
        if self._was_forward_code and not forward_code:
            for _, allocation in self._live.values():
                allocation.kept_for_backward = True
        self._was_forward_code = forward_code

    def _observe(self, tensor: Tensor, origin: str) -> Allocation:
        storage = tensor.untyped_storage()
        known = self._live.get(id(storage))
        if known is not None:
            return known[1]
        made = Allocation(
            bytes=int(storage.nbytes()),
            phase=self.phase,
            operation=origin,
            module=self._modules[-1] if self._modules else "",
            in_forward_code=self._in_forward_code(),
            node=_current_node(),
        )
        self._live[id(storage)] = (weakref.ref(storage, self._at_death_of(id(storage), made)), made)
        self.log.append(Event(1, made, self.phase))
        return made

    def _at_death_of(self, key: int, allocation: Allocation) -> Any:
        def note(_: object) -> None:
            del self._live[key]
            allocation.alive = False
            summed, place = self._summed or (None, 0)
            self.log.insert(place if summed is allocation else len(self.log), Event(-1, allocation, self.phase))

        return note

    def _scalar(self, tensor: Tensor) -> bool | float:
        """What the step does with the value: branches on it (masks), or computes with it (AdamW's step count)."""
        if tensor.dtype == torch.bool:
            return self._truth
        if tensor.dtype.is_floating_point:
            return 1.0
        raise DataDependentError(
            f"the step must not depend on the values of tensors, got a read of an integer one in "
            f"{self._modules[-1] if self._modules else 'the step'}; measure this model's step with MeasureMemory"
        )


def _dequantise_and_multiply(
    a: Tensor,
    b: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """bitsandbytes' 4-bit product in the parts that it is made of for more than a few rows, whose buffers then show."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        scales = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = scales + absmax_offset
    return nn.functional.linear(a, ops.dequantize_4bit(b, absmax, blocksize, quant_type, shape, a.dtype), bias)


@dataclass(frozen=True)
class Curve:
    """Memory over one step."""

    balances: tuple[int, ...]
    """Bytes after each event."""
    phases: tuple[Phase, ...]
    """Of each event."""
    peak_index: int
    alive_at_peak: tuple[Allocation, ...]
    """Largest first."""


def curve(log: Sequence[Event], start: int, *, round_to: int) -> Curve:
    """Memory from an event on, with sizes rounded up to multiples, and what was alive at its highest point."""
    changes = (event.sign * rounded_up(event.allocation.bytes, round_to) for event in log)
    balances = list(accumulate(changes))[start:]
    index = balances.index(max(balances))
    alive: dict[int, Allocation] = {}
    for event in log[: start + index + 1]:
        if event.sign > 0:
            alive[id(event.allocation)] = event.allocation
        else:
            del alive[id(event.allocation)]
    return Curve(
        balances=tuple(balances),
        phases=tuple(event.phase for event in log[start:]),
        peak_index=index,
        alive_at_peak=tuple(sorted(alive.values(), key=lambda a: a.bytes, reverse=True)),
    )


def rounded_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below the size."""
    return -(-size // multiple) * multiple
