"""Memory of training in closed form, from the model as it is: dtypes, frozen and quantised weights, the optimizer.

Serves the section «Memory Estimation» of THEORY.md.
"""

from forge.memory.activations import activation_bytes
from forge.memory.estimate import estimate_model_memory
from forge.memory.optimizers import optimizer_state_bytes
from forge.memory.storage import ParameterStorage, buffer_bytes, parameter_storage

__all__ = [
    "ParameterStorage",
    "activation_bytes",
    "buffer_bytes",
    "estimate_model_memory",
    "optimizer_state_bytes",
    "parameter_storage",
]
