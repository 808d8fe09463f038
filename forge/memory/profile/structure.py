"""A copy of a model's structure: the same modules, ties, hooks and flags, on other tensors; on fake ones, no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from forge.memory.storage import stored_tensors


def structural_copy(model: nn.Module, device: str = "cpu") -> Any:
    """The model with new tensors, all zeros, in place of its own, which may be anywhere, on ``meta`` too.

    Under ``FakeTensorMode`` the new ones are fake and need no memory. What is shared stays shared: a tied weight, a
    storage under two views. Parameters keep what hangs on them (bitsandbytes' quantisation state), modules their hooks
    and attributes. Gradients are left behind, and so is the autocast that an Accelerator has put around ``forward``.

    Raises:
        ValueError: if the model is spread over devices by hooks, or has weights packed otherwise than in 4 bits.
    """
    memo: dict[int, Any] = {}
    bases: dict[int, Tensor] = {}
    for tensor in _tensors(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = _zeros_like(tensor, bases, device)
    for parameter in model.parameters():
        for name, value in vars(parameter).items():
            setattr(memo[id(parameter)], name, copy.deepcopy(value, memo))
    copied = copy.deepcopy(model, memo)
    if (own_forward := vars(copied).pop("_original_forward", None)) is not None:
        copied.forward = own_forward
    return copied


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """All tensors of the model: stored ones, and those in plain attributes of modules (PEFT's virtual tokens)."""
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"the model must be whole on one device, got {type(module).__name__} with hooks that move its weights; "
                "load it without device_map, or pass its config"
            )
        yield from _inside(vars(module))
    for parameter in model.parameters():
        if hasattr(parameter, "__tensor_flatten__") or hasattr(parameter, "SCB"):
            raise ValueError(
                f"weights must be plain tensors or 4-bit ones of bitsandbytes, got {type(parameter).__name__}; measure "
                "the step with MeasureMemory instead"
            )
    yield from stored_tensors(model)


def _inside(value: object) -> Iterator[Tensor]:
    """Tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _inside(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _inside(item)


def _zeros_like(tensor: Tensor, bases: dict[int, Tensor], device: str) -> Tensor:
    """Zeros of the same layout, in a storage of the same size; ``bases`` has those that were made before."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key not in bases:
        bases[key] = torch.zeros(storage.nbytes(), dtype=torch.uint8, device=device)
    made = torch.empty(0, dtype=tensor.dtype, device=device)
    made.set_(bases[key].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made
