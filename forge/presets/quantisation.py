"""NF4 weights for QLoRA (arXiv:2305.14314 §3): loading them, and making a model of them trainable."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from forge.presets.heads import task_head


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
    """Freeze the weights, bring norms and embeddings to fp32, and keep what bitsandbytes and PEFT do apart.

    On a CPU, bitsandbytes 0.50 repacks 4-bit weights at the first evaluation for a kernel without a backward pass:
    whatever is trained after that gets wrong gradients, silently. Its switch for that kernel is turned off. The
    layers of a task head, which trains whole, are made ordinary ones again where they have been quantised. Biases get
    the compute dtype now, which the first forward pass would give them: what is frozen then stays bitwise as it is.

    Warns:
        UserWarning: on a CPU, if the rows of a weight are not whole blocks: bitsandbytes 0.50 reads them wrongly.
    """
    from bitsandbytes.nn.modules import Linear4bit
    from peft import prepare_model_for_kbit_training

    head = tuple(f"{name}." for name in task_head(model))
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    for name, module in [*model.named_modules()]:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if not isinstance(module, Linear4bit):
            continue
        if f"{name}.".startswith(head):
            model.set_submodule(name, _dequantised(module))
        elif module.bias is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)
    _warn_of_broken_rows(model)
    return model


def _warn_of_broken_rows(model: nn.Module) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit) or module.weight.device.type != "cpu":
            continue
        weight: Any = module.weight
        block = weight.quant_state.blocksize
        if module.in_features % block:
            warnings.warn(
                f"rows of 4-bit weights should be whole blocks of {block} on a CPU, got {module.in_features} inputs in "
                f"{name}: bitsandbytes 0.50 computes with wrong weights there; train this model on a GPU",
                stacklevel=4,
            )
            return


def _dequantised(quantised: Any) -> nn.Linear:
    """An ordinary layer with the weights of a 4-bit one; a head that no checkpoint holds has not been quantised yet."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Params4bit

    linear = nn.Linear(quantised.in_features, quantised.out_features, bias=quantised.bias is not None)
    weight = quantised.weight.data
    if isinstance(quantised.weight, Params4bit):
        state = copy.copy(quantised.weight.quant_state)
        state.shape = torch.Size([linear.weight.numel()])  # as one row, which bitsandbytes reads rightly on a CPU too
        weight = dequantize_4bit(weight, state).view_as(linear.weight)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if quantised.bias is not None:
            linear.bias.copy_(quantised.bias)
    return linear.to(quantised.weight.device)
