"""What parameters and buffers really occupy: tied ones once, packed ones by their real bytes and their real number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterStorage:
    """One parameter as it is stored."""

    name: str
    numel: int
    """Weights that it stands for: two in each byte of a 4-bit one."""
    stored_bytes: int
    """Bytes of its data and of the state that dequantises it."""
    dtype: str
    """``float32``, ``bfloat16``, …; ``nf4``, ``fp4`` or ``int8`` for weights that bitsandbytes has quantised."""
    trainable: bool


def parameter_storage(model: nn.Module) -> list[ParameterStorage]:
    """Every parameter of the model, tied ones once, with what it occupies.

    Weights of bitsandbytes count with their quantisation state: block maxima, code book, the second level of double
    quantisation, the scales of int8. Formats that keep packed weights in buffers (GPTQ, AWQ) show in ``buffer_bytes``.
    """
    counted: set[int] = set()
    return [_stored(name, p, counted) for name, p in model.named_parameters()]


def buffer_bytes(model: nn.Module) -> int:
    """Bytes of all buffers, shared ones once, and of the scales that ``Linear8bitLt`` holds after its first forward."""
    counted = {_key(s) for p in model.parameters() if isinstance(s := getattr(p, "SCB", None), Tensor)}
    return _bytes([*model.buffers(), *_scales(model)], counted)


def stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that ``parameter_storage`` and ``buffer_bytes`` count; those that are shared may come twice."""
    for parameter in model.parameters():
        yield from _tensors(parameter)
    yield from model.buffers()
    yield from _scales(model)


def _scales(model: nn.Module) -> list[Tensor]:
    held = (getattr(module, "state", None) for module in model.modules())
    return [s for state in held if isinstance(s := getattr(state, "SCB", None), Tensor)]


def _stored(name: str, parameter: nn.Parameter, counted: set[int]) -> ParameterStorage:
    numel, dtype = parameter.numel(), str(parameter.dtype).removeprefix("torch.")
    quantised = getattr(parameter, "quant_state", None)
    if quantised is not None:
        numel, dtype = math.prod(quantised.shape), str(quantised.quant_type)
    return ParameterStorage(name, numel, _bytes(_tensors(parameter), counted), dtype, parameter.requires_grad)


def _tensors(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The parameter's data and the tensors that bitsandbytes hangs on it."""
    if hasattr(parameter, "__tensor_flatten__"):  # torchao and others: a tensor made of inner tensors
        yield from (getattr(parameter, inner) for inner in parameter.__tensor_flatten__()[0])
        return
    yield parameter
    first = getattr(parameter, "quant_state", None)
    for state in (first, getattr(first, "state2", None)):
        held = (getattr(state, part, None) for part in ("absmax", "code", "offset"))
        yield from (tensor for tensor in held if isinstance(tensor, Tensor))
    if isinstance(scales := getattr(parameter, "SCB", None), Tensor):
        yield scales


def _bytes(tensors: Iterable[Tensor], counted: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if _key(tensor) not in counted:
            counted.add(_key(tensor))
            total += tensor.numel() * tensor.element_size()
    return total


def _key(tensor: Tensor) -> int:
    """Identity of what is stored; tensors on ``meta`` store nothing and go by themselves."""
    return id(tensor) if tensor.device == torch.device("meta") else tensor.untyped_storage().data_ptr()
