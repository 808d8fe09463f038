"""Peak memory of a training step, predicted on fake tensors (section «Memory Estimation» of THEORY.md)."""

from forge.memory.profile.profiler import model_from_config, profile_training_memory
from forge.memory.profile.report import LargeTensor, MemoryReport

__all__ = ["LargeTensor", "MemoryReport", "model_from_config", "profile_training_memory"]
