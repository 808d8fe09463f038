"""Where adapters go: the projections whose output is added to the residual stream, in any transformer.

Nothing is looked up by model name. A layer (``forge.layers.find_layers``) has attention modules (their name says so)
and the rest; the output projection of either is its last linear map in order of registration whose output is as wide
as the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from forge.layers import NoLayersError, find_layers

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn?\b|ffn_|feed_?forward|dense_?relu_?dense", re.IGNORECASE)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(input width, output width) of a linear map, seen through PEFT's wrappers; None for any other module.

    ``nn.Linear`` and its subclasses (bitsandbytes' k-bit ones too) and GPT-2's transposed ``Conv1D`` are linear maps.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return None


def find_sublayer_outputs(model: nn.Module) -> list[str]:
    """Names of the projections that end each sub-layer: attention (also cross-attention) and feed-forward.

    Two a layer in Llama, Mistral, GPT-2 and BERT; three in the decoder of T5.

    Args:
        model: any model with a stack of layers, wrapped by PEFT or not.

    Raises:
        NoLayersError: if the model has no stack of layers.
        ValueError: if a layer has no such projection for its attention or for its feed-forward part.
    """
    try:
        layers = find_layers(model)
    except NoLayersError as error:
        raise NoLayersError(f"{error}: target_modules=[...]") from error
    return [f"{layer.name}.{name}" for layer in layers for name in _outputs_of_layer(layer.name, layer.module)]


def _outputs_of_layer(name: str, layer: nn.Module) -> list[str]:
    linears = dict(_linear_maps(layer))
    attentions = _topmost(layer, _ATTENTION)
    rest = {path: shape for path, shape in linears.items() if not _inside(path, attentions)}
    blocks = [path for path in _topmost(layer, _FEED_FORWARD) if any(_inside(other, [path]) for other in rest)]
    feed_forward = [path for path in rest if not blocks or _inside(path, blocks)]
    width = linears[feed_forward[-1]][1] if feed_forward else None
    outputs = [_last([p for p, (_, out) in linears.items() if _inside(p, [a]) and out == width]) for a in attentions]
    if width is None or not outputs or None in outputs:
        part = "feed-forward" if width is None else "attention"
        raise ValueError(
            f"every layer must have a linear output projection for its attention and for its feed-forward part, got "
            f"none for the {part} part of {name} ({type(layer).__name__}; its linear maps: {sorted(linears)}); name "
            "the projections yourself: target_modules=[...]"
        )
    return [path for path in linears if path in outputs or path == feed_forward[-1]]


def _linear_maps(layer: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Linear maps that are called as modules; ``nn.MultiheadAttention`` reads its weights without calling them."""
    hidden: list[str] = []
    for path, module in layer.named_modules():
        if _inside(path, hidden):
            continue
        if isinstance(module, BaseTunerLayer | nn.MultiheadAttention):
            hidden.append(path)
        if (shape := linear_shape(module)) is not None:
            yield path, shape


def _topmost(layer: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    """Paths of the outermost modules with parameters, other than linear maps, whose own name fits the pattern."""
    found: list[str] = []
    for path, module in layer.named_modules():
        fits = pattern.search(path.rpartition(".")[2]) and linear_shape(module) is None
        if fits and not _inside(path, found) and any(len(p.shape) > 1 for p in module.parameters()):
            found.append(path)
    return found


def _inside(path: str, roots: list[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _last(paths: list[str]) -> str | None:
    return paths[-1] if paths else None
