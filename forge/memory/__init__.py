"""Memory of training: in closed form, predicted on fake tensors, and measured.

Serves the section «Memory Estimation» of THEORY.md. ``estimate_model_memory`` adds up what the model as it is must
hold, ``profile_training_memory`` runs a step without memory to find its peak, ``MeasureMemory`` measures a real one.
Names are loaded at their first use: ``python -m forge.memory --help`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.memory.activations import activation_bytes
    from forge.memory.estimate import estimate_model_memory
    from forge.memory.measured import MeasuredMemory, MeasureMemory, measure_peak_bytes
    from forge.memory.optimizers import optimizer_state_bytes
    from forge.memory.profile import MemoryReport, profile_training_memory
    from forge.memory.rivals import published_estimates
    from forge.memory.storage import ParameterStorage, buffer_bytes, parameter_storage

_HOMES = {
    "MeasureMemory": "measured",
    "MeasuredMemory": "measured",
    "MemoryReport": "profile",
    "ParameterStorage": "storage",
    "activation_bytes": "activations",
    "buffer_bytes": "storage",
    "estimate_model_memory": "estimate",
    "measure_peak_bytes": "measured",
    "optimizer_state_bytes": "optimizers",
    "parameter_storage": "storage",
    "profile_training_memory": "profile",
    "published_estimates": "rivals",
}

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
    "published_estimates",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'forge.memory' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"forge.memory.{_HOMES[name]}"), name)
