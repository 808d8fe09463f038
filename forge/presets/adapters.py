"""Presets that train adapters beside frozen weights: LoRA and its kin, bottlenecks, and learned prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import AdaLoraConfig, LoraConfig, PeftConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback

from forge.adapters import (
    AdaLoraCallback,
    HoulsbyConfig,
    WeightLoraCallback,
    WeightLoraConfig,
    add_houlsby_adapters,
    get_weight_lora_model,
)
from forge.presets.base import Preset
from forge.presets.checks import check_choice, check_range
from forge.presets.heads import task_head
from forge.presets.quantisation import is_4bit, is_quantised, nf4_config
from forge.targets import ALL_LINEAR, ATTENTION, ATTENTION_PATTERN, is_transposed, resolve_target_modules

_TASK_OF_CLASS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's task type by the head of the model.

    None for heads that PEFT has no name for (masked language models), and for models of images and sound: what PEFT
    makes of a task type calls the model with ``input_ids``.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return next((task for ending, task in _TASK_OF_CLASS.items() if name.endswith(ending)), None)


@dataclass(frozen=True, kw_only=True)
class AdapterPreset(Preset):
    """A preset whose weights stay as they are while an adapter trains."""

    task_type: str | None = None
    """PEFT's name of the task, such as "CAUSAL_LM"; None: by the head of the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type is not None:
            check_choice("task_type", self.task_type, [task.value for task in TaskType])

    def get_peft_config(self, model: nn.Module | None = None) -> PeftConfig:
        """Configuration for ``peft.get_peft_model``."""
        raise NotImplementedError

    def _task_type(self, model: nn.Module | None) -> str | None:
        return self.task_type if self.task_type is not None or model is None else task_type_of(model)

    def _trained_whole(self, model: nn.Module | None) -> list[str] | None:
        """PEFT's ``modules_to_save``: the new head of the model."""
        return (None if model is None else task_head(model)) or None

    def _add_adapter(self, model: Any) -> Any:
        return get_peft_model(model, self.get_peft_config(model))

    def _check_storage(self, model: PreTrainedModel) -> None:
        """Adapters fit on plain and on quantised weights."""


@dataclass(frozen=True, kw_only=True)
class LoraPreset(AdapterPreset):
    """LoRA: W + (α / r) B A with W frozen (arXiv:2106.09685, eq. 3)."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank adapters on the attention projections"
    usual_learning_rates: ClassVar[tuple[float, float]] = (5e-5, 2e-3)

    learning_rate: float = 2e-4
    """Peak of the schedule; LoRA wants about ten times that of full fine-tuning."""
    lora_r: int = 16
    """Rank r."""
    lora_alpha: int = 32
    """α: the update is scaled by α / r."""
    lora_dropout: float = 0.0
    """Dropout of the adapters' input."""
    target_modules: str | tuple[str, ...] = ATTENTION
    """"attention" (q, k, v, o), "all-linear", names of modules, or one regular expression; see ``forge.targets``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lora_r", self.lora_r, 1)
        check_range("lora_alpha", self.lora_alpha, 0, above=True)
        check_range("lora_dropout", self.lora_dropout, 0, 0.99)
        object.__setattr__(self, "target_modules", _validated_targets(self.target_modules))

    def get_lora_config(self, model: nn.Module | None = None) -> PeftConfig:
        """PEFT's configuration of LoRA, for ``get_peft_model(model, config)``.

        Args:
            model: the model that it is for: targets are found in it and checked, and its head names the task. Without
                one, a regular expression stands for the attention projections of the common families.

        Raises:
            ValueError: if a target matches no module of the model.
        """
        return LoraConfig(
            r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, **self._placement(model)
        )

    def get_peft_config(self, model: nn.Module | None = None) -> PeftConfig:
        """Configuration for ``peft.get_peft_model``: the same as ``get_lora_config``."""
        return self.get_lora_config(model)

    def _placement(self, model: nn.Module | None) -> dict[str, Any]:
        task_type = self._task_type(model)
        if model is None:
            targets = ATTENTION_PATTERN if self.target_modules == ATTENTION else self.target_modules
            return {"target_modules": targets if isinstance(targets, str) else list(targets), "task_type": task_type}
        found = resolve_target_modules(model, self.target_modules)
        return {
            "target_modules": found,
            "task_type": task_type,
            "fan_in_fan_out": is_transposed(model, found),
            "modules_to_save": self._trained_whole(model),
        }

    def _trained_whole(self, model: nn.Module | None) -> list[str] | None:
        """But for what ``target_modules`` names from the top: that has been asked to be adapted."""
        head = super()._trained_whole(model) or []
        listed = () if isinstance(self.target_modules, str) else self.target_modules
        named = {target.partition(".")[0] for target in listed}
        return [name for name in head if name not in named] or None

    def _rank(self) -> int:
        return self.lora_r

    def _findings(self) -> list[str]:
        scale = self.lora_alpha / self._rank()
        odd = f"lora_alpha / rank = {scale:g}: the update is scaled far from the usual 1 to 2; change learning_rate"
        return super()._findings() + ([odd] if not 0.25 <= scale <= 4 else [])


@dataclass(frozen=True, kw_only=True)
class LoraAllLinearPreset(LoraPreset):
    """LoRA on every linear map but the output head."""

    name: ClassVar[str] = "lora-all-linear"
    summary: ClassVar[str] = "low-rank adapters on every linear map but the output head"

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """Every linear map, of attention and of the feed-forward part."""


@dataclass(frozen=True, kw_only=True)
class QLoraPreset(LoraPreset):
    """LoRA on frozen 4-bit weights (arXiv:2305.14314)."""

    name: ClassVar[str] = "qlora"
    summary: ClassVar[str] = "LoRA on NF4 weights, double quantisation, bf16 compute"

    per_device_train_batch_size: int = 4
    """Sequences in a micro-batch on one device."""
    gradient_accumulation_steps: int = 4
    """Micro-batches in an optimizer step: 16 sequences, as in the paper."""
    lr_scheduler_type: str = "constant_with_warmup"
    """Name of the schedule; the paper's is constant."""
    warmup_steps: float = 0.03
    """Warm-up: a share of the run if below 1, else a number of optimizer steps."""
    max_grad_norm: float = 0.3
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = True
    """Recompute activations: they, not the 4-bit weights, would fill the memory."""
    lora_dropout: float = 0.1
    """Dropout of the adapters' input: the paper's for models up to 13 B."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """Every linear map: the paper needs all of them to match full fine-tuning."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of the blocks too."""

    def get_bnb_config(self) -> Any:
        """``quantization_config`` for ``from_pretrained`` (ImportError: bitsandbytes is missing)."""
        return nf4_config(double_quant=self.bnb_4bit_use_double_quant)

    def _check_storage(self, model: PreTrainedModel) -> None:
        if not is_4bit(model):
            raise ValueError(
                f"'qlora' needs 4-bit weights, got {type(model).__name__} "
                f"{'quantised otherwise' if is_quantised(model) else 'in ' + str(model.dtype)}; load it with "
                "quantization_config=preset.get_bnb_config(), or use 'lora'"
            )


@dataclass(frozen=True, kw_only=True)
class AdaLoraPreset(LoraPreset):
    """LoRA whose ranks are spent where they matter (arXiv:2303.10512)."""

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "low-rank adapters that share a budget of ranks"
    unavailable: ClassVar[dict[str, str]] = {
        "lora_r": "AdaLoRA has init_r and target_r instead",
        "freeze_ratio": "AdaLoRA allocates its ranks by the gradients of all adapters",
    }

    learning_rate: float = 5e-4
    """Peak of the schedule."""
    init_r: int = 12
    """Rank of every adapter at the start."""
    target_r: int = 8
    """Mean rank at the end."""
    total_step: int | None = None
    """Length of the run in optimizer steps, which the schedule of ranks needs; to be given."""
    tinit: int | None = None
    """Steps before the first rank is cut; None: a tenth of the run."""
    tfinal: int | None = None
    """Steps at the end with ranks fixed; None: three tenths of the run."""
    deltaT: int = 10
    """Steps between two cuts."""
    orth_reg_weight: float = 0.1
    """Weight of the penalty that keeps the factors orthogonal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("init_r", self.init_r, 2)
        check_range("target_r", self.target_r, 1, self.init_r - 1)
        for option in ("total_step", "tinit", "tfinal", "deltaT"):
            check_range(option, getattr(self, option), 0 if option.startswith("ti") or option == "tfinal" else 1)
        check_range("orth_reg_weight", self.orth_reg_weight, 0)

    def get_lora_config(self, model: nn.Module | None = None) -> PeftConfig:
        """PEFT's configuration of AdaLoRA (ValueError: no ``total_step``, or it leaves no steps to cut ranks in)."""
        if self.total_step is None:
            raise ValueError(
                "adalora needs the length of the run, got total_step=None; "
                "get_preset('adalora', total_step=<optimizer steps of the run>)"
            )
        tinit = self.total_step // 10 if self.tinit is None else self.tinit
        tfinal = 3 * self.total_step // 10 if self.tfinal is None else self.tfinal
        if tinit + tfinal >= self.total_step:
            raise ValueError(
                f"tinit + tfinal must be below total_step, got {tinit} + {tfinal} of {self.total_step}; lower them"
            )
        return AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            total_step=self.total_step,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=self.deltaT,
            orth_reg_weight=self.orth_reg_weight,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            **self._placement(model),
        )

    def _rank(self) -> int:
        return self.init_r

    def _findings(self) -> list[str]:
        repeated = (
            f"gradient_accumulation_steps={self.gradient_accumulation_steps}: PEFT adds the orthogonality penalty once "
            "a micro-batch, so that it counts that often on models that normalise their own loss (Llama, GPT-2); "
            "divide orth_reg_weight by it"
        )
        return super()._findings() + ([repeated] if self.gradient_accumulation_steps > 1 else [])

    def callbacks(self) -> list[TrainerCallback]:
        """What cuts the ranks, which PEFT leaves to the training loop, and those of every preset."""
        return [AdaLoraCallback(), *super().callbacks()]


@dataclass(frozen=True, kw_only=True)
class WeightLoraPreset(LoraPreset):
    """LoRA with a trained weight on every adapter (arXiv:2506.02724)."""

    name: ClassVar[str] = "weightlora"
    summary: ClassVar[str] = "low-rank adapters with a trained weight each; the top K can be kept"

    top_k: int | None = None
    """Adapters that are kept; None: all of them."""
    prune_at_step: int | None = None
    """Optimizer step after which the others are dropped; goes with ``top_k``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("top_k", self.top_k, 1)
        check_range("prune_at_step", self.prune_at_step, 1)
        if (self.top_k is None) != (self.prune_at_step is None):
            raise ValueError(
                f"top_k and prune_at_step go together, got {self.top_k} and {self.prune_at_step}; give both or neither"
            )

    def get_lora_config(self, model: nn.Module | None = None) -> PeftConfig:
        """Configuration for ``forge.adapters.get_weight_lora_model`` and ``peft.get_peft_model``."""
        placement = self._placement(model)
        placement.pop("fan_in_fan_out", None)  # it looks at the wrapped module itself
        return WeightLoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            top_k=self.top_k,
            **placement,
        )

    def callbacks(self) -> list[TrainerCallback]:
        """What drops adapters, if any are to be dropped, and those of every preset."""
        own = [] if self.prune_at_step is None else [WeightLoraCallback(self.prune_at_step)]
        return [*own, *super().callbacks()]

    def _add_adapter(self, model: Any) -> Any:
        config: Any = self.get_lora_config(model)
        return get_weight_lora_model(model, config)


@dataclass(frozen=True, kw_only=True)
class HoulsbyPreset(AdapterPreset):
    """Bottleneck adapters after attention and feed-forward (arXiv:1902.00751)."""

    name: ClassVar[str] = "houlsby"
    summary: ClassVar[str] = "bottleneck adapters after each sub-layer"
    usual_learning_rates: ClassVar[tuple[float, float]] = (3e-5, 3e-3)

    learning_rate: float = 3e-4
    """Peak of the schedule."""
    lr_scheduler_type: str = "linear"
    """Name of the schedule."""
    bottleneck: int = 64
    """Width of the bottleneck."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("bottleneck", self.bottleneck, 1)

    def get_peft_config(self, model: nn.Module | None = None) -> PeftConfig:
        """Configuration for ``forge.adapters.add_houlsby_adapters`` and ``peft.get_peft_model``."""
        return HoulsbyConfig(
            bottleneck=self.bottleneck, task_type=self._task_type(model), modules_to_save=self._trained_whole(model)
        )

    def _add_adapter(self, model: Any) -> Any:
        config: Any = self.get_peft_config(model)
        return add_houlsby_adapters(model, config)


def _validated_targets(targets: object) -> str | tuple[str, ...]:
    names = (targets,) if isinstance(targets, str) else targets
    if isinstance(names, Sequence) and names and all(isinstance(name, str) and name for name in names):
        return targets if isinstance(targets, str) else tuple(names)
    raise ValueError(
        f"target_modules must be 'attention', 'all-linear', a regular expression or names, got {targets!r}; "
        "pass for example ['q_proj', 'v_proj']"
    )
