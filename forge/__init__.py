"""Transformers Forge: fine-tuning techniques for any Hugging Face model, as a library.

Nothing here knows of experiments. The public names are loaded at their first use, so that importing ``forge`` itself
stays free of torch; the averages of weights are in ``forge.ema``, the adapters that PEFT lacks in ``forge.adapters``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.freezing import get_memory_savings_estimate, setup_lp_lora_style
    from forge.memory import MeasureMemory, estimate_model_memory, profile_training_memory
    from forge.monitor import MonitorCallback, check_gradient_health, print_model_info
    from forge.presets import get_preset

_HOMES = {
    "MeasureMemory": "forge.memory",
    "MonitorCallback": "forge.monitor",
    "check_gradient_health": "forge.monitor",
    "estimate_model_memory": "forge.memory",
    "get_memory_savings_estimate": "forge.freezing",
    "get_preset": "forge.presets",
    "print_model_info": "forge.monitor",
    "profile_training_memory": "forge.memory",
    "setup_lp_lora_style": "forge.freezing",
}

__all__ = [
    "MeasureMemory",
    "MonitorCallback",
    "check_gradient_health",
    "estimate_model_memory",
    "get_memory_savings_estimate",
    "get_preset",
    "print_model_info",
    "profile_training_memory",
    "setup_lp_lora_style",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'forge' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
