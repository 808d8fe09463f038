"""Weights in four bits, and what that does to a model: formats, errors, stored bits.

One small quantiser serves every format, since bitsandbytes has only NF4 and FP4: blocks of 64 weights are divided by
their largest magnitude and rounded to the nearest of at most 16 levels (QLoRA, arXiv:2305.14314, section 2). Double
quantisation stores these block maxima in 8 bits by bitsandbytes' own blockwise quantiser (section 3). Where
bitsandbytes has the format, the weights are the same. Its layers are not used to compute: on a CPU, bitsandbytes 0.50
applies wrong scales where the inputs of a layer are not a multiple of the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from experiments.harness.experiment import UserError

if TYPE_CHECKING:
    from experiments.harness.data import Examples

BLOCK_WEIGHTS = 64
"""Weights that share a scale: bitsandbytes' default, and QLoRA's choice."""
BLOCK_SCALES = 256
"""Scales that share a second-level scale under double quantisation."""

_MAGNITUDES = {
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "e3m0": (0.0, *(2.0**power for power in range(7))),
    "int4": tuple(map(float, range(8))),
}
"""Formats that bitsandbytes lacks: a sign bit, and exponent and mantissa bits or an integer."""
IN_BITSANDBYTES = ("nf4", "fp4")
FORMATS = (*IN_BITSANDBYTES, *_MAGNITUDES)


@dataclass(frozen=True)
class Scheme:
    """How weights are stored, and in which dtype their layers compute."""

    name: str
    """One of ``FORMATS``."""
    double: bool = False
    """Whether the block maxima are stored in 8 bits."""
    compute: torch.dtype = torch.float32
    """Dtype of weights, bias and inputs in the product; the layers' outputs are fp32 again."""


FORMAT_SCHEMES = {
    f"{name}{'_dq' if double else ''}": Scheme(name, double) for name in FORMATS for double in (False, True)
}
"""By arm: every format, singly and doubly quantised, in fp32 compute."""
COMPUTE = {"nf4_bf16": Scheme("nf4", compute=torch.bfloat16), "nf4_fp16": Scheme("nf4", compute=torch.float16)}
"""By arm: other compute dtypes."""
SCHEMES = FORMAT_SCHEMES | COMPUTE


def levels_of(name: str) -> Tensor:
    """The different levels of a format in rising order, scaled to [-1, 1]; fp32, at most 16.

    NF4 and FP4 are bitsandbytes' tables; its FP4 is E2M1 with 1/192 as the smallest magnitude where E2M1 has 1/12.

    Raises:
        ValueError: for a format that is not in ``FORMATS``.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    if name in IN_BITSANDBYTES:
        return torch.unique(functional.get_4bit_type(name, device="cpu"))
    positive = torch.tensor(_MAGNITUDES[name]) / _MAGNITUDES[name][-1]
    return torch.unique(torch.cat([-positive, positive]))


def dequantised(weight: Tensor, scheme: Scheme) -> Tensor:
    """The weight as it is after it was stored in four bits, of the same shape, dtype and device.

    Args:
        weight: of any shape; cut into blocks of ``BLOCK_WEIGHTS`` in the order of its elements.
        scheme: how it is stored.
    """
    blocks, levels = _blocks(weight), levels_of(scheme.name).to(weight.device)
    largest = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / largest.clamp(min=1e-38))[:, None]
    nearest = levels[torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)]
    if scheme.double:
        offset = largest.mean()
        stored, state = functional.quantize_blockwise(largest - offset, blocksize=BLOCK_SCALES)
        largest = functional.dequantize_blockwise(stored, state) + offset
    return (nearest * largest[:, None]).flatten()[: weight.numel()].view_as(weight).to(weight.dtype)


def by_bitsandbytes(weight: Tensor, scheme: Scheme) -> Tensor:
    """As ``dequantised``, by bitsandbytes; laid out flat, since its CPU kernel takes every row for whole blocks."""
    stored, state = functional.quantize_4bit(
        weight.detach().flatten(), blocksize=BLOCK_WEIGHTS, compress_statistics=scheme.double, quant_type=scheme.name
    )
    return functional.dequantize_4bit(stored, state).view_as(weight)


def values_per_block(weight: Tensor) -> Tensor:
    """Number of different values in each block, shape (blocks,): at most 16 once a weight is in four bits."""
    ordered = _blocks(weight).sort(dim=1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)


def _blocks(weight: Tensor) -> Tensor:
    """Shape (blocks, ``BLOCK_WEIGHTS``), fp32; the last one is filled up with zeros."""
    flat = weight.detach().flatten().float()
    return nn.functional.pad(flat, (0, -flat.numel() % BLOCK_WEIGHTS)).view(-1, BLOCK_WEIGHTS)


def linears_of(model: Any) -> dict[str, nn.Linear]:
    """Linear layers of a Hugging Face model by name, heads left out, as ``transformers`` leaves them unquantised.

    Raises:
        UserError: if there are none.
    """
    inside = set(model.base_model.modules())
    found = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and m in inside}
    if not found:
        raise UserError(
            f"a model must have nn.Linear layers below its head, got none in {type(model).__name__}; "
            "choose another with --model"
        )
    return found


@contextmanager
def quantised(linears: dict[str, nn.Linear], scheme: Scheme) -> Iterator[None]:
    """Within the context the layers compute as bitsandbytes' ``Linear4bit`` of the scheme does."""
    parameters = [p for linear in linears.values() for p in (linear.weight, linear.bias) if p is not None]
    originals = [p.data for p in parameters]
    hooks: list[Any] = []
    try:
        for linear in linears.values():
            linear.weight.data = dequantised(linear.weight, scheme)
            hooks.append(linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(scheme.compute),)))
            hooks.append(linear.register_forward_hook(lambda _, __, output: output.float()))
        for parameter in parameters:
            parameter.data = parameter.data.to(scheme.compute)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original


def weight_errors(linears: dict[str, nn.Linear], scheme: Scheme) -> tuple[float, dict[str, float]]:
    """‖Ŵ − W‖ / ‖W‖ (Frobenius) of all layers together, and of each."""
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    squares = {name: (_square(dequantised(w, scheme) - w), _square(w)) for name, w in weights.items()}
    difference, whole = (sum(part) for part in zip(*squares.values(), strict=True))
    return (difference / whole) ** 0.5, {name: (d / w) ** 0.5 for name, (d, w) in squares.items()}


@torch.no_grad()
def layer_output_error(model: Any, linears: dict[str, nn.Linear], batches: Sequence[Tensor], scheme: Scheme) -> float:
    """‖x·(Ŵ − W)ᵀ‖ / ‖x·Wᵀ + b‖ of all layers together, on the inputs x that the unquantised model gives them."""
    model.eval()
    added: list[tuple[float, float]] = []

    def compare(difference: Tensor) -> Any:
        return lambda _, inputs, output: added.append(
            (_square(nn.functional.linear(inputs[0], difference)), _square(output))
        )

    hooks = [
        linear.register_forward_hook(compare(dequantised(linear.weight, scheme) - linear.weight))
        for linear in linears.values()
    ]
    try:
        for ids in batches:
            model.base_model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    difference, whole = (sum(part) for part in zip(*added, strict=True))
    return (difference / whole) ** 0.5


@torch.no_grad()
def hidden_states(model: Any, batches: Sequence[Tensor]) -> Tensor:
    """Last hidden state of every token, shape (tokens, hidden size), on the CPU."""
    model.eval()
    return torch.cat([model.base_model(ids).last_hidden_state.flatten(0, 1).float().cpu() for ids in batches])


def batches_of(examples: Examples, count: int, size: int, device: torch.device) -> list[Tensor]:
    """Token ids of the first ``count`` examples in batches of at most ``size`` and of one length: without padding."""
    by_length: dict[int, list[list[int]]] = {}
    for ids in examples.input_ids[:count]:
        by_length.setdefault(len(ids), []).append(ids)
    return [
        torch.tensor(same[start : start + size], device=device)
        for _, same in sorted(by_length.items())
        for start in range(0, len(same), size)
    ]


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """‖estimate − truth‖ / ‖truth‖."""
    return (_square(estimate - truth) / _square(truth)) ** 0.5


def _square(values: Tensor) -> float:
    return float(values.square().sum())


@dataclass(frozen=True)
class StoredBits:
    """What real ``Linear4bit`` layers hold for their weights."""

    bits: int
    """Codes, scales, and the scales of the scales."""
    file_bits: int
    """The same in a saved model, where every layer carries its tables of levels as well."""
    nested_layers: int
    """Layers whose scales are quantised."""
    bits_by_arithmetic: int
    """4 + 32/64 a weight, or 4 + 8/64 + 32/(64·256) and 32 for the mean scale of a layer."""


def stored_bits(linears: dict[str, nn.Linear], *, double: bool) -> StoredBits:
    """Bits of all layers, stored by bitsandbytes as NF4."""
    held, saved, nested, arithmetic = 0, 0, 0, 0
    for linear in linears.values():
        options = {"compress_statistics": double, "quant_type": "nf4"}
        layer = Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta", **options)
        layer.weight = Params4bit(linear.weight.data, requires_grad=False, **options)
        layer = layer.to(linear.weight.device)
        state = layer.weight.quant_state
        held += _bits(layer.weight.data, state.absmax)
        held += _bits(state.state2.absmax, state.offset) if state.nested else 0
        saved += _bits(*layer.state_dict().values())
        nested += state.nested
        scales = -(-linear.weight.numel() // BLOCK_WEIGHTS)
        arithmetic += 4 * linear.weight.numel()
        arithmetic += 8 * scales + 32 * -(-scales // BLOCK_SCALES) + 32 if double else 32 * scales
    return StoredBits(held, saved, nested, arithmetic)


def _bits(*tensors: Tensor) -> int:
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
