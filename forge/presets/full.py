"""Presets that train the weights themselves: supervised, classic in fp32, and on preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, TrainingArguments

from forge.presets.base import Preset
from forge.presets.checks import check_range
from forge.presets.quantisation import is_quantised


@dataclass(frozen=True, kw_only=True)
class SftPreset(Preset):
    """Supervised fine-tuning of all weights."""

    name: ClassVar[str] = "sft"
    summary: ClassVar[str] = "supervised fine-tuning of all weights"


@dataclass(frozen=True, kw_only=True)
class ClassicPreset(Preset):
    """Fine-tuning of all weights in fp32, as in the course chapter of seed 004."""

    name: ClassVar[str] = "classic"
    summary: ClassVar[str] = "fine-tuning of all weights in fp32"

    lr_scheduler_type: str = "linear"
    """Name of the schedule."""
    warmup_steps: float = 500
    """Warm-up: a share of the run if below 1, else a number of optimizer steps."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay; biases and norms are exempt."""
    bf16: bool | None = False
    """No autocast: fp32 throughout."""

    def _check_storage(self, model: PreTrainedModel) -> None:
        other = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
        if other and not is_quantised(model):
            raise ValueError(
                f"'classic' trains in fp32, got weights in {', '.join(sorted(other))}; "
                "load the model with dtype=torch.float32"
            )
        super()._check_storage(model)

    def _findings(self) -> list[str]:
        findings = super()._findings()
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if not 4 <= batch <= 32:
            findings.append(f"a batch of {batch} sequences is outside the 4 to 32 that this recipe is known for")
        if self.learning_rate > 5e-5:
            findings.append(f"learning_rate={self.learning_rate:g} is above the 5e-5 that this recipe is known for")
        return findings


@dataclass(frozen=True, kw_only=True)
class DpoPreset(Preset):
    """Direct preference optimisation of all weights with TRL's ``DPOTrainer`` (arXiv:2305.18290, eq. 7)."""

    name: ClassVar[str] = "dpo"
    summary: ClassVar[str] = "direct preference optimisation with TRL's DPOTrainer"
    usual_learning_rates: ClassVar[tuple[float, float]] = (1e-7, 1e-5)

    learning_rate: float = 1e-6
    """Peak of the schedule."""
    lr_scheduler_type: str = "linear"
    """Name of the schedule."""
    num_train_epochs: float = 1.0
    """Passes over the pairs."""
    per_device_train_batch_size: int = 4
    """Pairs in a micro-batch on one device."""
    gradient_accumulation_steps: int = 16
    """Micro-batches in an optimizer step: 64 pairs, as in the paper."""
    beta: float = 0.1
    """β: how strongly the policy is held to the reference model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, 0, above=True)

    def _arguments_class(self) -> type[TrainingArguments]:
        from trl.trainer.dpo_config import DPOConfig  # loads slowly

        return DPOConfig

    def _method_arguments(self) -> dict[str, Any]:
        return {"beta": self.beta}
