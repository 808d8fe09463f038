"""Exponential moving averages of model weights (section «EMA» of THEORY.md).

    θ_ema(t) = β · θ_ema(t−1) + (1 − β) · θ(t),    θ_ema(0) = θ(0)                                             (1)

``EMAModel`` follows one or many decays β along one training trajectory in a custom loop; ``EMACallback`` does the same
inside the Hugging Face ``Trainer``. Averages are kept in fp32 at least, whatever the dtype of the weights: in bf16,
with eight bits of mantissa, a step of (1 − 0.9999) is below half a unit in the last place: the average never moves.

Source: Polyak & Juditsky (1992) for uniform averaging, which (1) is not: it forgets geometrically.
"""

from forge.ema.callback import STATE_FILE, EMACallback
from forge.ema.model import (
    EMAModel,
    averaging_horizon,
    compute_optimal_decay,
    decay_label,
    initial_weight_share,
    load_ema_file,
    save_ema_file,
)

__all__ = [
    "STATE_FILE",
    "EMACallback",
    "EMAModel",
    "averaging_horizon",
    "compute_optimal_decay",
    "decay_label",
    "initial_weight_share",
    "load_ema_file",
    "save_ema_file",
]
