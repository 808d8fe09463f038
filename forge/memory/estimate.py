"""Memory of a training step in closed form."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from forge.checks import check_whole
from forge.memory.activations import activation_bytes
from forge.memory.optimizers import embedding_parameters, optimizer_state_bytes
from forge.memory.storage import buffer_bytes, parameter_storage

GB = 10**9
"""Bytes of a gigabyte, as in the names of the result."""


def estimate_model_memory(
    model: nn.Module,
    batch_size: int = 4,
    sequence_length: int = 2048,
    *,
    optimizer: str = "adamw_torch",
    gradient_checkpointing: bool | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Memory that one process needs to train the model as it is, in GB (10⁹ bytes).

    Parameters (with buffers and quantisation state), gradients and optimizer state are exact to the byte, for the
    parameters that really train. Activations are a closed form (see ``forge.memory.activations`` for what it leaves
    out). The total is the sum of all four: gradients and activations are not at their largest at the same moment, so
    the peak of a plain step lies below it; allocators and CUDA contexts come on top.

    Args:
        model: a Transformer of ``transformers``, wrapped by PEFT, quantised by bitsandbytes, or neither. Freeze,
            quantise and add adapters before asking.
        batch_size: sequences of one forward pass on one device.
        sequence_length: tokens of each.
        optimizer: a name of ``TrainingArguments(optim=…)``, see ``optimizer_state_bytes``.
        gradient_checkpointing: whether layers are recomputed; None reads it from the model. (The Trainer switches it on
            when training begins.)
        autocast_dtype: ``torch.bfloat16`` for ``TrainingArguments(bf16=True)``.

    Returns:
        ``parameters_gb``, ``gradients_gb``, ``optimizer_gb``, ``activations_gb`` and ``total_estimated_gb``.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.
        ValueError: if a size is below 1, the optimizer is not known, or activations cannot be known (no text config, no
            layers of their own weights, experts).

    Warns:
        UserWarning: if the sequence is longer than the model's positions.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; load it first")
    check_sizes(getattr(model, "config", None), batch_size, sequence_length)
    if autocast_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast_dtype must be torch.bfloat16, torch.float16 or None, got {autocast_dtype}")
    if gradient_checkpointing is None:
        gradient_checkpointing = any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules())
    trainable = [p for p in model.parameters() if p.requires_grad]
    parts = {
        "parameters_gb": sum(p.stored_bytes for p in parameter_storage(model)) + buffer_bytes(model),
        "gradients_gb": sum(p.numel() * p.element_size() for p in trainable),
        "optimizer_gb": optimizer_state_bytes(trainable, optimizer, embeddings=embedding_parameters(model)),
        "activations_gb": activation_bytes(
            model,
            batch_size,
            sequence_length,
            gradient_checkpointing=gradient_checkpointing,
            autocast_dtype=autocast_dtype,
        ),
    }
    return {name: size / GB for name, size in parts.items()} | {"total_estimated_gb": sum(parts.values()) / GB}


def check_sizes(config: object, batch_size: int, sequence_length: int) -> None:
    """Refuse (ValueError) a size below 1; warn of a sequence longer than the config's positions."""
    for name, value in {"batch_size": batch_size, "sequence_length": sequence_length}.items():
        check_whole(name, value, hint="give what one device gets at once")
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and sequence_length > longest:
        warnings.warn(
            f"sequence_length should be at most the model's {longest} positions, got {sequence_length}; "
            "the estimate is of such a step, which the model is not made for",
            stacklevel=3,
        )
