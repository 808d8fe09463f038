"""Memory of training: in closed form, predicted on fake tensors, and measured.

Serves the section «Memory Estimation» of THEORY.md. ``estimate_model_memory`` adds up what the model as it is must
hold, ``profile_training_memory`` runs a step without memory to find its peak, ``MeasureMemory`` measures a real one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from forge.memory.activations import activation_bytes
from forge.memory.estimate import estimate_model_memory
from forge.memory.measured import MeasuredMemory, MeasureMemory, measure_peak_bytes
from forge.memory.optimizers import optimizer_state_bytes
from forge.memory.storage import ParameterStorage, buffer_bytes, parameter_storage

if TYPE_CHECKING:
    from forge.memory.profile import MemoryReport, profile_training_memory

_PREDICTION = ("MemoryReport", "profile_training_memory")
"""Loaded at their first use: they need the presets, which need this package."""

__all__ = [
    "MeasureMemory",
    "MeasuredMemory",
    "MemoryReport",
    "ParameterStorage",
    "activation_bytes",
    "buffer_bytes",
    "estimate_model_memory",
    "measure_peak_bytes",
    "optimizer_state_bytes",
    "parameter_storage",
    "profile_training_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _PREDICTION:
        raise AttributeError(f"module 'forge.memory' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module("forge.memory.profile"), name)
