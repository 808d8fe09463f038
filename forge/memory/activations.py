"""Activations that a training step keeps for its backward pass, summed over the tensors that each layer stores.

The approach is that of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1, whose equations 1 and 2 give the classic
34·s·b·h + 5·a·s²·b bytes of a layer and 2·s·b·h under checkpointing), with their fixed GPT layer replaced by the linear
layers, norms and dropouts that the model really has, and with what autograd does not store for frozen weights left out.

Approximate are: the temporaries of kernels, dequantised weights, masks and position tables (left out); the peak within
the backward pass (the head's buffers, or one layer's activations, whichever is more); padding and packing (every
sequence counts as full); encoder and decoder (both of the same length).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from forge.layers import Layer, find_layers, layer_of

_STORED_BY_ACTIVATION = {"relu": 0, "quick_gelu": 2, "gelu_python": 3, "gelu_new": 4, "gelu_fast": 4}
"""Tensors that an activation function keeps beside its result: its input; more where it is written out in Python."""

_WITH_GRADIENTS = 1.5
"""Activations of a recomputed layer together with the gradients of them that are alive at once, over the former."""


@dataclass(frozen=True)
class _Setting:
    """What holds for all layers of a model; bytes per element."""

    tokens: int
    """Per sequence."""
    width: int
    """Of the residual stream."""
    heads: int
    activation: int
    """Outputs of linear layers: the autocast dtype, else the model's own."""
    residual: int
    """Inputs of norms."""
    mask: int
    """Dropout masks: as wide as activations on a CPU, a byte elsewhere."""
    attention_dropout: float
    stores_scores: bool
    """Whether attention keeps its tokens x tokens probabilities for each head (eager), or none (fused kernels)."""
    stored_by_activation: int


@dataclass(frozen=True)
class _Projection:
    """A linear layer with the adapters on it."""

    inputs: int
    outputs: int
    keeps_input: bool
    """Autograd stores the input only where the weight, or an adapter on it, trains."""
    adapter_bytes: int
    """Bytes per token that the adapters store by themselves."""
    attention: str | None
    """Outermost attention module that it belongs to."""


def activation_bytes(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    *,
    gradient_checkpointing: bool,
    autocast_dtype: torch.dtype | None = None,
) -> int:
    """Bytes of activations at the peak of a training step, logits and loss included.

    Layers below the lowest trainable parameter store nothing. With checkpointing each layer keeps its input only, and
    one layer at a time is recomputed.

    Args:
        model: a Transformer of ``transformers``, wrapped by PEFT or not.
        batch_size: sequences of one forward pass.
        sequence_length: tokens of each, for the encoder and for the decoder.
        gradient_checkpointing: whether layers are recomputed in the backward pass.
        autocast_dtype: dtype of ``torch.autocast`` (``bf16=True`` of the Trainer), None without it.

    Raises:
        ValueError: if the model has no text config, no stack of layers, layers that share weights, or experts.
    """
    config = _text_config(model)
    setting = _setting(model, config, sequence_length, autocast_dtype)
    layers = find_layers(model)
    if len(layers) < int(config.num_hidden_layers):
        raise ValueError(
            f"activations are known for layers with weights of their own, got {len(layers)} for "
            f"{config.num_hidden_layers} passes; measure the step instead"
        )
    active = layers[_lowest_active(model, layers) :]
    positions = batch_size * sequence_length
    sizes = [positions * _bytes_per_token(layer, setting) for layer in layers]
    head = _head_bytes(model, config, positions)
    if gradient_checkpointing or not active:
        inputs = len(active) * positions * setting.width * setting.activation
        return inputs + max(head, int(_WITH_GRADIENTS * max(sizes)))
    casts = 0 if autocast_dtype is None else _cast_weight_bytes(model, active, autocast_dtype)
    return sum(sizes[-len(active) :]) + casts + head


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    text: Any = config if isinstance(config, PreTrainedConfig) else None
    if towers := [name for name in ("vision_config", "audio_config") if getattr(text, name, None) is not None]:
        raise ValueError(
            f"activations are known for text alone, got {type(model).__name__} with a {towers[0]}; "
            "measure its step instead"
        )
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    missing = [n for n in needed if getattr(text, n, None) is None]
    if missing:
        raise ValueError(
            f"activations need the config of a text model, got {type(model).__name__} whose config lacks "
            f"{', '.join(missing)}; measure this model's step instead"
        )
    return text


def _setting(model: nn.Module, config: Any, tokens: int, autocast_dtype: torch.dtype | None) -> _Setting:
    own = next((m.weight.dtype for m in model.modules() if isinstance(m, nn.Embedding)), torch.float32)
    activation = (autocast_dtype or own).itemsize
    on_cpu = next(model.parameters()).device.type == "cpu"
    dropout = _first(config, ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout_rate"), 0.0)
    relative_bias = any(name.endswith("relative_attention_bias") for name, _ in model.named_modules())
    no_fused_kernel = relative_bias or (on_cpu and dropout > 0)
    act = _first(config, ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation"), "")
    return _Setting(
        tokens=tokens,
        width=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        activation=activation,
        residual=own.itemsize,
        mask=activation if on_cpu else 1,
        attention_dropout=float(dropout),
        stores_scores=config._attn_implementation == "eager" or no_fused_kernel,
        stored_by_activation=_STORED_BY_ACTIVATION.get(str(act), 1),
    )


def _first(config: Any, names: Sequence[str], default: Any) -> Any:
    """Value of the first of these fields that the config has: families name them differently."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def _lowest_active(model: nn.Module, layers: Sequence[Layer]) -> int:
    """Index of the lowest layer that takes part in the backward pass.

    All do where something before the stack trains (embeddings, prompts), or where the embeddings' output is made to
    require a gradient, as PEFT does for checkpointing.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [hook for module in embeddings for hook in module._forward_hooks.values()]
    if any(getattr(hook, "__name__", "").startswith("make_inputs_require_grad") for hook in hooks):
        return 0
    inputs = {id(module.weight) for module in embeddings}
    lowest, before_stack = len(layers), True
    for name, parameter in model.named_parameters():
        layer = layer_of(name, layers)
        before_stack &= layer is None
        if not parameter.requires_grad:
            continue
        if layer is not None:
            lowest = min(lowest, layers.index(layer))
        elif before_stack or id(parameter) in inputs:
            return 0
    return lowest


def _bytes_per_token(layer: Layer, setting: _Setting) -> int:
    """Bytes that one layer stores for each token without checkpointing."""
    block = layer.module
    experts = any("experts" in name for name, _ in block.named_modules())
    if experts or any(p.dim() > 2 for p in block.parameters()):
        raise ValueError(
            f"activations are known for dense layers, got experts in {layer.name}; measure the step instead"
        )
    projections = list(_projections(block, setting))
    attentions = {
        p.attention: [q for q in projections if q.attention == p.attention] for p in projections if p.attention
    }
    dropouts = sum(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules())
    return (
        sum(_attention_bytes(group, setting) for group in attentions.values())
        + _dense_bytes([p for p in projections if p.attention is None], setting)
        + _norm_bytes(block, setting, feeds_trainable=any(p.keeps_input for p in projections))
        + sum(p.adapter_bytes for p in projections)
        + dropouts * setting.width * setting.mask
    )


def _attention_bytes(projections: Sequence[_Projection], setting: _Setting) -> int:
    """Queries, keys, values and the output of one attention; its probabilities, or an fp32 log-sum for each head.

    Eager attention repeats the keys and values that several heads share, and computes probabilities in fp32.
    """
    *inner, out = projections
    repeats = setting.stores_scores and len(inner) > 1
    kept = out.inputs + sum(max(p.outputs, out.inputs) if repeats else p.outputs for p in inner)
    score = 4 + (setting.activation if setting.activation < 4 else 0)
    if setting.attention_dropout:
        score += setting.activation + setting.mask
    return kept * setting.activation + setting.heads * (setting.tokens * score if setting.stores_scores else 4)


def _dense_bytes(projections: Sequence[_Projection], setting: _Setting) -> int:
    """Feed-forward parts: what the activation function stores, its result, and the gated product.

    A part ends with the projection that takes what the one before it gives, or half of it (fused gate and value).
    """
    total, ups = 0, list[_Projection]()
    for p in projections:
        if not ups or p.inputs not in (ups[-1].outputs, ups[-1].outputs // 2):
            ups.append(p)
            continue
        gated = sum(up.outputs for up in ups) >= 2 * p.inputs
        result = 2 if gated else int(p.keeps_input or not setting.stored_by_activation)
        product = int(gated and p.keeps_input)
        total += p.inputs * (setting.stored_by_activation + result + product)
        ups = []
    return (total + sum(up.outputs for up in ups)) * setting.activation


def _norm_bytes(block: nn.Module, setting: _Setting, *, feeds_trainable: bool) -> int:
    """Input of each norm, and its result where linear layers that train take it.

    Norms that ``transformers`` writes out in Python take their input to fp32, and store the normalised one too where
    their weight trains.
    """
    total = 0
    for module in block.modules():
        fused = isinstance(module, nn.LayerNorm | nn.RMSNorm)
        if not fused and "Norm" not in type(module).__name__:
            continue
        normalised = setting.residual * any(p.requires_grad for p in module.parameters())
        total += (setting.residual if fused else 4 + normalised) + setting.activation * feeds_trainable
    return total * setting.width


def _projections(block: nn.Module, setting: _Setting) -> Iterator[_Projection]:
    """The linear layers of a block, in order."""
    attentions = [name for name, module in block.named_modules() if name and "Attention" in type(module).__name__]
    wrappers = {name: module for name, module in block.named_modules() if hasattr(module, "base_layer")}
    for name, module in block.named_modules():
        owner = next((w for w in wrappers if name.startswith(w + ".")), None)
        if isinstance(module, nn.Linear | Conv1D) and (owner is None or name == f"{owner}.base_layer"):
            attention = next((a for a in attentions if name.startswith(a + ".")), None)
            yield _projection(module, wrappers.get(owner or ""), attention, setting)


def _projection(linear: Any, wrapper: nn.Module | None, attention: str | None, setting: _Setting) -> _Projection:
    fused = isinstance(linear, Conv1D)
    inputs, outputs = (linear.nx, linear.nf) if fused else (linear.in_features, linear.out_features)
    held = [] if wrapper is None else [p for p in wrapper.parameters() if p.requires_grad and p.dim() == 2]
    adapters = [p for p in held if p is not linear.weight]
    own = sum(min(p.shape) * p.element_size() for p in adapters) // 2  # the inner activation: A's output is B's input
    if adapters and wrapper is not None:
        width = max(p.element_size() for p in adapters)
        dropped = any(isinstance(m, nn.Dropout) and m.p > 0 for m in wrapper.modules())
        own += inputs * width * (dropped or width != setting.activation)  # a copy of the input, dropped out or cast
    return _Projection(inputs, outputs, linear.weight.requires_grad or bool(adapters), own, attention)


def _head_bytes(model: nn.Module, config: Any, positions: int) -> int:
    """Cross entropy over the vocabulary: log-softmax, its gradient and that of the logits, all fp32, at once.

    Zero for models without a head over the vocabulary, whose few logits do not count.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return 0 if head is None else positions * int(config.vocab_size) * 3 * 4


def _cast_weight_bytes(model: nn.Module, active: Sequence[Layer], dtype: torch.dtype) -> int:
    """Copies of fp32 weights that linear layers cast by autocast keep for the backward pass."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    blocks = [layer.module for layer in active] + ([head] if head is not None else [])
    linears = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
    return sum(m.weight.numel() * dtype.itemsize for m in linears if m.weight.dtype == torch.float32)
