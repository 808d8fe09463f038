"""A model on ``meta`` from its config alone, prepared by a preset's own code as a loaded one would be."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from forge.freezing import setup_lp_lora_style
from forge.memory.profile.step import Task
from forge.presets import Preset

_HEADS: dict[Task, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "masked-lm": AutoModelForMaskedLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}
_ENDINGS: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForMaskedLM": "masked-lm",
}


def task_of(name: str, *, is_encoder_decoder: bool) -> Task:
    """Task by the name of a model class (ValueError: one that is not known here)."""
    if name.endswith("ForConditionalGeneration") and is_encoder_decoder:
        return "seq2seq-lm"
    for ending, task in _ENDINGS.items():
        if name.endswith(ending):
            return task
    raise ValueError(
        f"the model must end in a head for causal, masked or seq2seq language modelling or for sequence "
        f"classification, got {name}; measure its step with MeasureMemory"
    )


def build_on_meta(
    config: PreTrainedConfig,
    task: Task,
    *,
    dtype: torch.dtype,
    preset: Preset | None,
    freeze_ratio: float | None,
    attention: str | None,
) -> Any:
    """The model as ``from_pretrained`` would load it, then prepared and frozen.

    Args:
        config: it is not changed.
        task: which head.
        dtype: of weights that are not quantised.
        preset: prepares the model; one that quantises gets 4-bit weights.
        freeze_ratio: share of the layers that is frozen where no preset does it.
        attention: implementation; None: the default.

    Raises:
        ValueError: if the architecture has no such head, or a preset refuses the model.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model = _HEADS[task].from_config(copy.deepcopy(config), dtype=dtype, **options)
    model.tie_weights()
    model.config.use_cache = False
    if preset is not None:
        quantisation = _quantisation_of(preset)
        if quantisation is not None:
            _quantise(model, quantisation)
        return preset.prepare(model)
    if freeze_ratio:
        setup_lp_lora_style(model, freeze_ratio=freeze_ratio)
    return model


def _quantisation_of(preset: Preset) -> Any:
    """The preset's ``BitsAndBytesConfig``; None if it does not quantise."""
    quantises = type(preset).get_bnb_config is not Preset.get_bnb_config
    return preset.get_bnb_config() if quantises else None


def _quantise(model: nn.Module, quantisation: Any) -> None:
    """4-bit modules as ``from_pretrained(quantization_config=…)`` puts them in, on ``meta``."""
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    quantise_states: Any = functional
    quantise_states.name2qmap.setdefault("dynamic", quantise_states.create_dynamic_map())  # or it would be on meta
    quantizer = AutoHfQuantizer.from_config(quantisation, pre_quantized=False)
    with torch.device("meta"):
        quantizer.preprocess_model(model=model, device_map=None)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            packed: Any = module.weight
            module.weight = packed._quantize("meta")
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
