"""Peak memory of a training step before it is run: the Trainer's step on fake tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from forge.memory.estimate import check_sizes
from forge.memory.optimizers import TRAINER_OPTIMIZERS
from forge.memory.profile.assumptions import assumptions_of
from forge.memory.profile.build import build_on_meta, task_of
from forge.memory.profile.cuda import ROUNDING_BYTES
from forge.memory.profile.report import MemoryReport, report_of
from forge.memory.profile.step import StepSettings, Target, Task, record_step
from forge.memory.profile.trace import curve
from forge.presets import Preset, get_preset
from forge.presets.checks import check_choice

Attention = Literal["sdpa", "eager"]

_OF_NO_EFFECT = {"adalora": {"total_step": 1000}}
"""Options that a preset needs and the memory of a step does not depend on."""


def profile_training_memory(
    model_or_config: nn.Module | PreTrainedConfig,
    batch_size: int,
    sequence_length: int,
    *,
    task: Task | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    optimizer: str = TrainingArguments.default_optim,
    preset: str | Preset | None = None,
    freeze_ratio: float | None = None,
    gradient_checkpointing: bool | None = None,
    gradient_accumulation_steps: int | None = None,
    max_grad_norm: float | None = None,
    attention: Attention | None = None,
    padding: bool = False,
    target: Target = "cpu",
) -> MemoryReport:
    """Peak memory of one optimizer step of ``transformers.Trainer``, predicted without weights and without the device.

    The step is run by the Trainer's own code on fake tensors, which have shapes and dtypes but no memory; it is one
    like the second and all later ones, when the optimizer has its state. A model is taken as it stands (frozen,
    wrapped by PEFT, in 4 bits by bitsandbytes; on any device, ``meta`` included) and is not touched. From a config the
    model is built on ``meta``, and prepared by the preset as a loaded one would be.

    Args:
        model_or_config: a model of ``transformers``, wrapped by PEFT or not, or the config of one.
        batch_size: sequences of one micro-batch on one device.
        sequence_length: tokens of each, for the encoder and for the decoder.
        task: head of the model; None: the one that the model has, or that the config names in ``architectures``, else
            causal language modelling.
        dtype: of weights that are not quantised; None: what the config names, else fp32. Only with a config.
        autocast: ``torch.bfloat16`` for ``TrainingArguments(bf16=True)``; None: as the preset has it, else none. A
            preset that leaves bf16 to the hardware has it on CUDA.
        optimizer: name for ``TrainingArguments(optim=…)``; its own default by default.
        preset: a preset or its name; prepares the model, and gives defaults to the options below. Only with a config.
        freeze_ratio: share of the layers, from the bottom, that does not train. Only with a config.
        gradient_checkpointing: whether layers are recomputed; None: as the preset or the model has it.
        gradient_accumulation_steps: micro-batches of one optimizer step; None: the preset's number, else 1.
        max_grad_norm: to which gradients are clipped, 0 for no clipping; None: the preset's, else 1.
        attention: implementation in ``transformers``; None: the model's own, the default from a config.
        padding: whether batches have an attention mask that masks something.
        target: device that the step would run on. ``cuda`` is emulated on fake CPU tensors.

    Raises:
        TypeError: if ``model_or_config`` is neither.
        ValueError: for an option of the wrong kind or out of range, or one that goes with a config only; a head, model
            or preset whose step is not modelled; a step that depends on the values of tensors (experts).

    Warns:
        UserWarning: if the sequence is longer than the model's positions.
    """
    _check(batch_size, sequence_length, optimizer, autocast, attention, padding, target)
    recipe = _recipe(preset, freeze_ratio, gradient_checkpointing)
    if isinstance(model_or_config, PreTrainedConfig):
        of_model: dict[str, Any] = {"task": task, "dtype": dtype, "freeze_ratio": freeze_ratio, "attention": attention}
        model: Any = model_from_config(model_or_config, preset=recipe, **of_model)
    else:
        _refuse_options_of_configs(task=task, dtype=dtype, preset=preset, freeze_ratio=freeze_ratio)
        model = model_or_config
    config, task = _config_and_task(model)
    check_sizes(config, batch_size, sequence_length)
    _check_labels(config, task)
    settings = StepSettings(
        task=task,
        batch_size=batch_size,
        sequence_length=sequence_length,
        padding=padding,
        optimizer=optimizer,
        bf16=_bf16(autocast, recipe, target),
        gradient_checkpointing=gradient_checkpointing if recipe is None else recipe.gradient_checkpointing,
        gradient_accumulation_steps=_number(
            "gradient_accumulation_steps", gradient_accumulation_steps, recipe, default=1, least=1
        ),
        max_grad_norm=_number("max_grad_norm", max_grad_norm, recipe, default=1.0, least=0),
        attention=None if isinstance(model_or_config, PreTrainedConfig) else attention,
        target=target,
    )
    log, start = record_step(model, settings)
    round_to = ROUNDING_BYTES if target == "cuda" else 1
    step = curve(log, start, round_to=round_to)
    return report_of(step, assumptions_of(settings, recipe), round_to=round_to)


def model_from_config(
    config: PreTrainedConfig,
    *,
    task: Task | None = None,
    dtype: torch.dtype | None = None,
    preset: str | Preset | None = None,
    freeze_ratio: float | None = None,
    gradient_checkpointing: bool | None = None,
    attention: Attention | None = None,
) -> Any:
    """The model, on ``meta``, whose step ``profile_training_memory`` runs for the same config and options."""
    recipe = _recipe(preset, freeze_ratio, gradient_checkpointing)
    task = task or _task_of_config(config)
    check_choice("task", task, get_args(Task))
    width: Any = dtype or config.dtype or torch.float32
    return build_on_meta(config, task, dtype=width, preset=recipe, freeze_ratio=freeze_ratio, attention=attention)


def _check(
    batch_size: int,
    sequence_length: int,
    optimizer: str,
    autocast: torch.dtype | None,
    attention: str | None,
    padding: bool,
    target: str,
) -> None:
    """Refuse what no step can have."""
    check_choice("optimizer", optimizer, TRAINER_OPTIMIZERS)
    check_choice("target", target, get_args(Target))
    if attention is not None:
        check_choice("attention", attention, get_args(Attention))
    if autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast must be torch.bfloat16 or None, got {autocast}; fp16 scales its loss by the values of gradients"
        )
    if not isinstance(padding, bool):
        raise ValueError(f"padding must be True or False, got {padding!r}; pass one of the two")


def _recipe(
    preset: str | Preset | None, freeze_ratio: float | None, gradient_checkpointing: bool | None
) -> Preset | None:
    """The preset with what is given beside it (ValueError: one whose step is another one)."""
    if gradient_checkpointing is not None and not isinstance(gradient_checkpointing, bool):
        raise ValueError(f"gradient_checkpointing must be True, False or None, got {gradient_checkpointing!r}")
    if preset is None:
        return None
    if not isinstance(preset, str | Preset):
        raise ValueError(f"preset must be a name or a Preset, got {type(preset).__name__}; see forge.get_preset")
    recipe = get_preset(preset, **_OF_NO_EFFECT.get(preset, {})) if isinstance(preset, str) else preset
    if recipe.name == "dpo":
        raise ValueError("preset must train with transformers.Trainer, got 'dpo', whose step is that of TRL; use 'sft'")
    if recipe.offload is not None:
        raise ValueError(
            f"preset must keep all on one device, got offload={recipe.offload!r}; profile it without offload"
        )
    given: dict[str, Any] = {"freeze_ratio": freeze_ratio, "gradient_checkpointing": gradient_checkpointing}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def _number(name: str, given: Any, recipe: Preset | None, *, default: float, least: float) -> Any:
    """What is given, else the preset's value, else the default."""
    if given is None:
        return default if recipe is None else getattr(recipe, name)
    kind = int if isinstance(default, int) else float
    if isinstance(given, bool) or not isinstance(given, int | kind) or given < least:
        raise ValueError(
            f"{name} must be {'a whole number' if kind is int else 'a number'} of at least {least}, got {given!r}; "
            f"the Trainer's default is {default}"
        )
    return given


def _bf16(autocast: torch.dtype | None, recipe: Preset | None, target: Target) -> bool:
    if autocast is not None or recipe is None:
        return autocast is not None
    return target == "cuda" if recipe.bf16 is None else recipe.bf16


def _task_of_config(config: PreTrainedConfig) -> Task:
    """What the first of the config's architectures does; causal language modelling if it names none."""
    names = config.architectures or ["ForCausalLM"]
    return task_of(names[0], is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)))


def _config_and_task(model: object) -> tuple[PreTrainedConfig, Task]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"model_or_config must be a PreTrainedModel (PEFT around it or not) or a PreTrainedConfig, got "
            f"{type(base).__name__}; load it with transformers"
        )
    config = base.config
    return config, task_of(type(base).__name__, is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)))


def _refuse_options_of_configs(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name} goes with a config, got {name}={value!r} with a model, which is taken as it stands; change "
                "the model first (preset.prepare, setup_lp_lora_style), or pass its config"
            )


def _check_labels(config: Any, task: Task) -> None:
    """Labels are one class for each sequence."""
    problem = getattr(config, "problem_type", None)
    if task == "sequence-classification" and (
        config.num_labels == 1 or problem not in (None, "single_label_classification")
    ):
        raise ValueError(
            f"classification must be into exclusive classes, got num_labels={config.num_labels} and "
            f"problem_type={problem!r}; measure this step with MeasureMemory"
        )
