"""Presets of prompt learning: the model stays as it is and learned vectors stand before its input or its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType
from torch import nn

from forge.presets.adapters import AdapterPreset
from forge.presets.checks import check_range

_NOTHING_TO_FREEZE = {"freeze_ratio": "the layers of the model do not train anyway"}


@dataclass(frozen=True, kw_only=True)
class PromptPreset(AdapterPreset):
    """Learned vectors; the model itself stays frozen."""

    usual_learning_rates: ClassVar[tuple[float, float]] = (1e-5, 5e-2)
    unavailable: ClassVar[dict[str, str]] = _NOTHING_TO_FREEZE

    num_virtual_tokens: int = 20
    """Learned vectors before the input (of each layer, where there is a prefix)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("num_virtual_tokens", self.num_virtual_tokens, 1)

    def _task(self, model: nn.Module | None) -> str:
        """PEFT's task type, which prompt learning cannot do without."""
        task_type = self._task_type(model)
        if task_type is None:
            known = ", ".join(task.value for task in TaskType if task is not TaskType.FEATURE_EXTRACTION)
            raise ValueError(
                f"{self.name} needs a task that PEFT knows ({known}), got "
                f"{'no model' if model is None else type(model).__name__}; pass task_type, or a model with such a head"
            )
        return task_type


@dataclass(frozen=True, kw_only=True)
class _PrefixPreset(PromptPreset):
    unavailable: ClassVar[dict[str, str]] = _NOTHING_TO_FREEZE | {
        "gradient_checkpointing": "PEFT cannot recompute layers whose keys and values come from a prefix"
    }


@dataclass(frozen=True, kw_only=True)
class PrefixTuningPreset(_PrefixPreset):
    """Learned keys and values in every layer, made by a small network (arXiv:2101.00190)."""

    name: ClassVar[str] = "prefix-tuning"
    summary: ClassVar[str] = "learned keys and values in every layer, reparametrised by an MLP"

    learning_rate: float = 5e-5
    """Peak of the schedule."""
    lr_scheduler_type: str = "linear"
    """Name of the schedule."""
    num_virtual_tokens: int = 10
    """Learned positions before the input of each layer."""
    encoder_hidden_size: int = 512
    """Width of the network that makes the prefix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("encoder_hidden_size", self.encoder_hidden_size, 1)

    def get_peft_config(self, model: nn.Module | None = None) -> PeftConfig:
        """PEFT's configuration of prefix tuning with reparametrisation."""
        return PrefixTuningConfig(
            task_type=self._task(model),
            modules_to_save=self._trained_whole(model),
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=True,
            encoder_hidden_size=self.encoder_hidden_size,
        )


@dataclass(frozen=True, kw_only=True)
class PTuningV2Preset(_PrefixPreset):
    """Learned keys and values in every layer, trained as they are (arXiv:2110.07602)."""

    name: ClassVar[str] = "p-tuning-v2"
    summary: ClassVar[str] = "learned keys and values in every layer, no reparametrisation"

    learning_rate: float = 5e-3
    """Peak of the schedule."""

    def get_peft_config(self, model: nn.Module | None = None) -> PeftConfig:
        """PEFT's configuration of prefix tuning without reparametrisation."""
        return PrefixTuningConfig(
            task_type=self._task(model),
            modules_to_save=self._trained_whole(model),
            num_virtual_tokens=self.num_virtual_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class PTuningPreset(PromptPreset):
    """Learned input vectors, made by a small network (arXiv:2103.10385)."""

    name: ClassVar[str] = "p-tuning"
    summary: ClassVar[str] = "learned input vectors, made by an MLP"

    learning_rate: float = 1e-3
    """Peak of the schedule."""
    encoder_hidden_size: int = 128
    """Width of the network that makes the vectors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("encoder_hidden_size", self.encoder_hidden_size, 1)

    def get_peft_config(self, model: nn.Module | None = None) -> PeftConfig:
        """PEFT's configuration of P-tuning."""
        return PromptEncoderConfig(
            task_type=self._task(model),
            modules_to_save=self._trained_whole(model),
            num_virtual_tokens=self.num_virtual_tokens,
            encoder_hidden_size=self.encoder_hidden_size,
        )


@dataclass(frozen=True, kw_only=True)
class PromptTuningPreset(PromptPreset):
    """Learned input vectors, trained as they are (arXiv:2104.08691)."""

    name: ClassVar[str] = "prompt-tuning"
    summary: ClassVar[str] = "learned input vectors, begun as words of the vocabulary"
    usual_learning_rates: ClassVar[tuple[float, float]] = (1e-3, 0.3)

    learning_rate: float = 3e-2
    """Peak of the schedule."""

    def get_peft_config(self, model: nn.Module | None = None) -> PeftConfig:
        """PEFT's configuration of prompt tuning; the vectors begin as randomly drawn words."""
        return PromptTuningConfig(
            task_type=self._task(model),
            modules_to_save=self._trained_whole(model),
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
        )
