"""Measured memory: what the allocator gives out, and what each component of training holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Built = TypeVar("Built")


def allocated_bytes(build: Callable[[], Built]) -> tuple[Built, int]:
    """What ``build()`` returns, and the bytes by which the allocator's balance grew while it ran.

    CUDA: the caching allocator's own counter. CPU: the profiler's log of allocations and releases, which sees every
    tensor whoever made it.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        built = build()
        return built, torch.cuda.memory_allocated() - before
    gc.collect()  # what an earlier recording saw allocated would count as released in this one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        built = build()
    return built, sum(event.self_cpu_memory_usage for event in profile.key_averages())


def memory_by_component(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of parameters, gradients (as large as what is trainable) and optimizer state, from the real tensors."""
    optimizer_tensors = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return {
        "parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "optimizer": sum(t.numel() * t.element_size() for t in optimizer_tensors),
    }
