"""NF4 weights for QLoRA (arXiv:2305.14314 §3): loading them, and making a model of them trainable."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel


def nf4_config(*, double_quant: bool) -> BitsAndBytesConfig:
    """4-bit NormalFloat weights in blocks of 64, computed with in bf16.

    Args:
        double_quant: quantise the scales of the blocks too, which saves 0.37 bits per weight (arXiv:2305.14314 §3).

    Raises:
        ImportError: if bitsandbytes is missing.
    """
    if find_spec("bitsandbytes") is None:
        raise ImportError("4-bit loading needs bitsandbytes, got none installed; pip install bitsandbytes")
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether the model was loaded with a ``quantization_config``."""
    return getattr(model, "hf_quantizer", None) is not None


def is_4bit(model: PreTrainedModel) -> bool:
    """Whether bitsandbytes holds the model's linear maps in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def prepare_quantised(model: Any) -> Any:
    """Freeze the weights, bring norms and embeddings to fp32, and keep gradients right on a CPU.

    On a CPU, bitsandbytes 0.50 repacks 4-bit weights at the first evaluation for a kernel without a backward pass:
    whatever is trained after that gets wrong gradients, silently. Its switch for that kernel is turned off.
    """
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
