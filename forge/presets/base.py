"""What all presets share: options of training, their checks, training arguments, and preparing a model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar
from warnings import warn

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import SchedulerType
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from forge.ema import EMACallback
from forge.freezing import setup_lp_lora_style
from forge.presets.accumulation import check_fused_loss, normalise_over_batch
from forge.presets.checks import check_choice, check_range, check_types, unknown_option
from forge.presets.offload import offload_activations, offload_arguments, validated_offload
from forge.presets.quantisation import is_quantised, prepare_quantised

_NAMES = ("activation_checkpointing", "gradient_checkpointing")
_CHECKPOINTING = next(name for name in _NAMES if hasattr(TrainingArguments, name))
"""What this version of transformers calls it; the older name is deprecated where the newer one exists."""

_COARSE = (torch.bfloat16, torch.float16)
"""Half a unit in the last place of a weight of 0.02 is 6e-5 in bf16, 8e-6 in fp16: smaller steps leave it as it is."""

_MARK = "forge_preset"
"""Attribute that a prepared model carries: the name of its preset."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One fine-tuning recipe: every option has a value, and every option is used.

    Options are named as in ``TrainingArguments`` and PEFT. ``get_preset`` makes presets; ``docs/presets.md`` has the
    source of every number.

    Raises:
        ValueError: if an option is of the wrong type or out of range.
    """

    name: ClassVar[str] = ""
    """What ``get_preset`` calls it."""
    summary: ClassVar[str] = ""
    """One line on what it does."""
    usual_learning_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-4)
    """Outside this range ``validate()`` warns."""
    unavailable: ClassVar[dict[str, str]] = {}
    """Options that would have no effect in this preset, with the reason; an override of one is refused."""

    learning_rate: float = 2e-5
    """Peak of the schedule."""
    lr_scheduler_type: str = "cosine"
    """Name of the schedule, as in ``transformers.SchedulerType``."""
    warmup_steps: float = 0.1
    """Warm-up from 0 to the peak: a share of the run if below 1, else a number of optimizer steps."""
    num_train_epochs: float = 3.0
    """Passes over the training set."""
    per_device_train_batch_size: int = 8
    """Sequences in a micro-batch on one device."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer step; the gradient is that of the full batch, normalised over its tokens."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; biases and norms are exempt."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    bf16: bool | None = None
    """Autocast to bf16; None: on where there is a GPU that has bf16, off elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations of each layer in the backward pass instead of keeping them."""
    offload: str | tuple[str, ...] | None = None
    """What lives in host memory: "activations", "optimizer", "parameters"; see ``docs/memory_tactics.md``."""
    freeze_ratio: float = 0.0
    """Share of the layers, from the bottom, that does not train; see ``forge.freezing``."""
    ema_decay: float | None = None
    """Decay of an average of the weights that ``callbacks()`` follows; None: no average."""
    seed: int = 42
    """Seed of data order and dropout. Adapters are drawn before the Trainer sets it: seed before ``prepare``, too."""
    output_dir: str = "./output"
    """Where checkpoints go."""

    def __post_init__(self) -> None:
        check_types(self)
        for option, reason in self.unavailable.items():
            if getattr(self, option) != type(self).__dataclass_fields__[option].default:
                raise unknown_option(self.name, option, (), (), reason)
        object.__setattr__(self, "offload", validated_offload(self.offload) or None)
        check_range("learning_rate", self.learning_rate, 0, above=True)
        check_choice("lr_scheduler_type", self.lr_scheduler_type, [kind.value for kind in SchedulerType])
        check_range("warmup_steps", self.warmup_steps, 0)
        check_range("num_train_epochs", self.num_train_epochs, 0, above=True)
        check_range("per_device_train_batch_size", self.per_device_train_batch_size, 1)
        check_range("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("max_grad_norm", self.max_grad_norm, 0)
        check_range("freeze_ratio", self.freeze_ratio, 0, 1)
        check_range("seed", self.seed, 0)
        if self.ema_decay is not None:
            EMACallback(self.ema_decay)  # checks the decay
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise ValueError(
                f"lr_scheduler_type='constant' has no warm-up, got warmup_steps={self.warmup_steps}; "
                "use 'constant_with_warmup', or warmup_steps=0"
            )

    @classmethod
    def option_names(cls) -> list[str]:
        """Options that ``get_preset`` takes as overrides."""
        return [field.name for field in fields(cls) if field.name not in cls.unavailable]

    def print_info(self) -> None:
        """Print a table of the options with their values, then what ``validate()`` would warn of."""
        table = Table()
        table.add_column("option")
        table.add_column("value")
        for option in self.option_names():
            value = getattr(self, option)
            automatic = f"{'on' if self._use_bf16() else 'off'} (automatic)" if option == "bf16" else "none"
            table.add_row(option, automatic if value is None else str(value))
        console = Console()
        console.print(f"{self.name}: {self.summary}", markup=False, highlight=False)
        console.print(table)
        for finding in self._findings():
            console.print(f"warning: {finding}", style="yellow", highlight=False, markup=False)

    def validate(self, total_steps: int | None = None) -> list[str]:
        """Settings that are known to hurt, each with the reason; every one is also issued as a ``UserWarning``.

        Args:
            total_steps: length of the run in optimizer steps; warm-up is checked against it.
        """
        findings = self._findings()
        if total_steps is not None and self.warmup_steps >= total_steps:
            findings.append(
                f"warmup_steps={self.warmup_steps:g} of {total_steps} steps: the run ends before the learning rate has "
                "reached its peak; a share such as 0.1 fits any length"
            )
        for finding in findings:
            warn(f"preset {self.name!r}: {finding}", UserWarning, stacklevel=2)
        return findings

    def get_training_args(self, **more: Any) -> TrainingArguments:
        """Arguments for the Trainer; their ``output_dir`` and others may be set afterwards.

        Args:
            **more: further ``TrainingArguments``, such as ``max_steps``. Those that are options of the preset too are
                checked as such; what also steers ``prepare`` or ``callbacks`` belongs into ``get_preset``.

        Raises:
            ValueError: for an argument that must be given to ``get_preset``, or that ``offload`` decides; for Liger's
                fused loss, which would undo what ``prepare`` does for accumulation.
            RuntimeError: if ``offload`` names something that this machine cannot do.
        """
        here = {name: more.pop(name) for name in list(more) if name in _TRAINING_ONLY}
        if here:
            return replace(self, **here).get_training_args(**more)
        self.validate()
        check_fused_loss(more)
        arguments = {name: getattr(self, name) for name in _TRAINING_ONLY} | self._method_arguments()
        arguments["bf16"] = self._use_bf16()
        arguments[_CHECKPOINTING] = self.gradient_checkpointing
        arguments["use_cpu"] = not torch.accelerator.is_available()  # else transformers refuses bf16 on a CPU
        arguments |= offload_arguments(validated_offload(self.offload))
        decided = set(arguments) - {"use_cpu"} | {field.name for field in fields(self)}
        for name in more:
            if name in decided:
                raise ValueError(f"{name} is decided by the preset, got {name}={more[name]!r}; set it in get_preset()")
        return self._arguments_class()(**(arguments | more))

    def get_lora_config(self, model: nn.Module | None = None) -> Any:
        """PEFT's configuration of LoRA (ValueError: this preset has none)."""
        raise ValueError(f"get_lora_config() needs a preset with LoRA, got {self.name!r}; use 'lora' or 'qlora'")

    def get_bnb_config(self) -> Any:
        """Configuration of quantised loading (ValueError: this preset has none)."""
        raise ValueError(f"get_bnb_config() needs a preset that quantises, got {self.name!r}; use 'qlora'")

    def prepare(self, model: Any) -> Any:
        """Apply the whole preset to a freshly loaded model, in the order that works.

        k-bit preparation, adapters, freezing, activation checkpointing, offload of activations, and a loss that is
        normalised over all tokens of an optimizer step. Set the seed before: adapters are drawn here.

        Args:
            model: a ``PreTrainedModel``; it is changed in place.

        Returns:
            The model to train: the same, or a ``PeftModel`` around it.

        Raises:
            TypeError: if this is no ``PreTrainedModel``.
            ValueError: if the model is prepared or has adapters already, or is (not) quantised against the preset.

        Warns:
            UserWarning: if weights that train themselves, without adapters, are in 16 bits: small steps vanish there.
        """
        self._check_model(model)
        model.config.use_cache = False
        if is_quantised(model):
            model = prepare_quantised(model)
        model = self._add_adapter(model)
        if self.freeze_ratio:
            setup_lp_lora_style(model, freeze_ratio=self.freeze_ratio)
        if self.gradient_checkpointing:
            getattr(model, f"{_CHECKPOINTING}_enable")({"use_reentrant": False})
        if "activations" in validated_offload(self.offload):
            offload_activations(model)
        normalise_over_batch(model)
        setattr(model, _MARK, self.name)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks that this preset needs: ``Trainer(callbacks=[*preset.callbacks(), ...])``."""
        return [] if self.ema_decay is None else [EMACallback(self.ema_decay)]

    def _add_adapter(self, model: Any) -> Any:
        return model

    def _arguments_class(self) -> type[TrainingArguments]:
        return TrainingArguments

    def _method_arguments(self) -> dict[str, Any]:
        """Training arguments that only this kind of preset has."""
        return {}

    def _use_bf16(self) -> bool:
        return bool(is_torch_bf16_gpu_available()) if self.bf16 is None else self.bf16

    def _check_model(self, model: Any) -> None:
        if getattr(model, _MARK, None) is not None:
            raise ValueError(f"a model can be prepared once, got one prepared as {model.forge_preset!r}; load it anew")
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"prepare() needs a model without adapters, got {type(model).__name__} with {list(model.peft_config)}; "
                "pass the base model, or skip prepare()"
            )
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"prepare() needs a PreTrainedModel, got {type(model).__name__}; load it with transformers")
        self._check_storage(model)

    def _check_storage(self, model: PreTrainedModel) -> None:
        """Full fine-tuning moves the weights themselves, which packed ones cannot do."""
        if is_quantised(model):
            raise ValueError(
                f"{self.name!r} trains the weights, which must not be quantised, got a quantised "
                f"{type(model).__name__}; load it without quantization_config, or use 'qlora'"
            )
        coarse = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in _COARSE}
        if coarse:
            warn(
                f"preset {self.name!r} trains the weights, which are in {', '.join(sorted(coarse))}: many of "
                f"AdamW's steps at learning_rate={self.learning_rate:g} are lost to rounding; load the model with "
                "dtype=torch.float32 (bf16 autocast stays as it is)",
                UserWarning,
                stacklevel=4,
            )

    def _findings(self) -> list[str]:
        low, high = self.usual_learning_rates
        rate = f"learning_rate={self.learning_rate:g}"
        no_bf16 = bool(self.bf16) and not is_torch_bf16_gpu_available()
        on_host = "activations" in validated_offload(self.offload) and not torch.accelerator.is_available()
        checks = {
            f"{rate} is above {high:g}: at such rates {self.name} tends to diverge or to forget": (
                self.learning_rate > high
            ),
            f"{rate} is below {low:g}: at such rates {self.name} hardly moves": self.learning_rate < low,
            "bf16=True without a GPU that has bf16: less precise, and slow on CPUs without bf16 instructions": no_bf16,
            "no warm-up: AdamW's first steps are full steps along the sign of one batch's gradient": (
                self.warmup_steps == 0
            ),
            "max_grad_norm=0: nothing stops one bad batch from undoing the run": self.max_grad_norm == 0,
            "offload='activations' without an accelerator: activations are in host memory already": on_host,
        }
        return [finding for finding, applies in checks.items() if applies]


_TRAINING_ONLY: Collection[str] = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "seed",
    "output_dir",
)
"""Options that go to ``TrainingArguments`` as they are and steer nothing else."""
