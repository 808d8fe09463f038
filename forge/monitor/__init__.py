"""Watching a training run: gradient health, a Trainer callback, and the table of a model's blocks.

Serves the section «Training Monitor» of THEORY.md.
"""

from forge.monitor.callback import HISTORY_FILE, MonitorCallback, MonitorRecord
from forge.monitor.gradients import GradientFinding, GradientReport, NoGradientsError, check_gradient_health
from forge.monitor.model_info import ModelBlock, model_blocks, print_model_info

__all__ = [
    "HISTORY_FILE",
    "GradientFinding",
    "GradientReport",
    "ModelBlock",
    "MonitorCallback",
    "MonitorRecord",
    "NoGradientsError",
    "check_gradient_health",
    "model_blocks",
    "print_model_info",
]
