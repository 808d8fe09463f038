"""What others estimate for the same training, by their published formulas; none of them knows the batch."""

from __future__ import annotations

import torch
from accelerate.commands.estimate import estimate_training_usage
from torch import nn

from forge.memory.storage import parameter_storage

_DEEPSPEED_BYTES = 4 + 16
"""Of a parameter on one GPU."""


def published_estimates(model: nn.Module, *, autocast: bool = False) -> dict[str, int]:
    """Bytes that training needs by accelerate, DeepSpeed and the seed document of this project.

    Args:
        model: as it would be trained; on ``meta``, too.
        autocast: whether it trains under autocast.

    Returns:
        ``accelerate``: the highest figure of ``accelerate estimate-memory`` for training with Adam (its own function),
        given all weights in fp32, as it takes them. ``deepspeed``: ZeRO-2 on one GPU without offload, 4 + 16 bytes for
        every parameter, frozen or not (``estimate_zero2_model_states_mem_needs`` in DeepSpeed's
        ``runtime/zero/stage_1_and_2.py``). ``seed``: 4P + 4G + 8G bytes for P parameters of which G train, half of
        that for those in 16 bits («Memory Estimation» of the seed).
    """
    stored = parameter_storage(model)
    halved = autocast or any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    usage = estimate_training_usage(4 * sum(p.numel for p in stored), "bfloat16" if halved else "float32")
    widths = {p.name: 4 if p.dtype == "float32" else 2 for p in stored}
    seed = sum(p.numel * widths[p.name] * (4 if p.trainable else 1) for p in stored)
    return {
        "accelerate": max(usage.values()),
        "deepspeed": _DEEPSPEED_BYTES * sum(p.numel() for p in model.parameters()),
        "seed": seed,
    }
