"""What a CUDA device would do otherwise than a CPU, on fake CPU tensors: the choice of the attention kernel.

``torch.nn.functional.scaled_dot_product_attention`` picks its kernel by the device. Here it is the one that torch
takes on a GPU with bf16 (flash attention for 16 bits without a mask, else the memory-efficient kernel, else plain
mathematics), with the workspace that flash attention's backward pass asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROUNDING_BYTES = 512
"""The caching allocator gives out multiples of this."""

_aten: Any = torch.ops.aten


@contextmanager
def cuda_attention() -> Iterator[None]:
    """Within, fused attention is that of CUDA.

    The function itself is replaced: a ``TorchFunctionMode`` is not active where checkpointing repeats a forward pass.
    """
    kept = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = kept


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that CUDA takes.

    Args:
        query: (batch, heads, tokens, width); so ``key`` and ``value``, with fewer heads under ``enable_gqa``.
        key: see ``query``.
        value: see ``query``.
        attn_mask: boolean, or added to the scores.
        dropout_p: of the probabilities.
        is_causal: without a mask.
        scale: of the scores; None: one over the square root of the width.
        enable_gqa: whether heads share keys and values.
    """
    if torch.is_autocast_enabled("cpu"):  # on the list of operations that run in 16 bits
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    in_16_bits = query.dtype in (torch.bfloat16, torch.float16)
    if in_16_bits and attn_mask is None and query.shape[-1] <= 256:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa and query.shape[1] != key.shape[1]:
        mathematics = _aten._scaled_dot_product_attention_math
        options = {"scale": scale, "enable_gqa": True}
        attended: Tensor = mathematics(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]
        return attended
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient, training = _aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled()
    attended = efficient(query, key, value, attn_mask, training, dropout_p, is_causal, scale=scale)[0]
    return attended


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool, scale: float) -> Tensor:
    """Flash attention, whose widths are multiples of 8."""
    width = query.shape[-1]
    if missing := -width % 8:
        query, key, value = (functional.pad(tensor, (0, missing)) for tensor in (query, key, value))
    flash = _aten._scaled_dot_product_flash_attention
    attended: Tensor = flash(query, key, value, dropout, is_causal, False, scale=scale)[0]
    return attended[..., :width]


def flash_backward_buffers(query: Tensor, key: Tensor) -> list[Tensor]:
    """Buffers of flash attention's backward kernel (Dao 2023, arXiv:2307.08691, algorithm 2), as torch allocates them.

    The gradient of the queries is summed up in fp32, over tokens and widths rounded up to the kernel's blocks; the
    gradients of shared keys and values are first made for every head.
    """
    batch, heads, tokens, width = query.shape
    padded = -(-tokens // 128) * 128
    buffers = [query.new_empty(batch, padded, heads, -(-width // 32) * 32, dtype=torch.float32)]
    buffers.append(query.new_empty(batch, heads, padded, dtype=torch.float32))
    if key.shape[1] != heads:
        buffers += [query.new_empty(batch, key.shape[2], heads, width) for _ in range(2)]
    return buffers
