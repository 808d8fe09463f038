"""The stack of layers of a model: what freezing, adapters and the model table count as «layers».

Works on any ``nn.Module`` whose blocks lie in an ``nn.ModuleList``, wrapped by PEFT, DDP, ``torch.compile`` or not:
every decoder, encoder and encoder–decoder family of ``transformers`` that has a stack. Nothing is looked up by model
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


class NoLayersError(ValueError):
    """The model has no stack of layers."""


@dataclass(frozen=True)
class Layer:
    """One block of the stack."""

    name: str
    """Dotted path in the model, ``model.layers.3``."""
    module: nn.Module
    index: int
    """Place within its stack, from 0 at the bottom."""
    stack: str
    """Dotted path of the ``nn.ModuleList`` that holds it."""


def find_layers(model: nn.Module) -> list[Layer]:
    """Blocks of the model from the bottom (nearest the input) to the top, those of all its stacks.

    A stack is an outermost ``nn.ModuleList`` of blocks, of one kind or several (Jamba), each with parameters and with
    modules of its own; single projections, embeddings and norms are no blocks. Where there are several stacks, what
    ``get_decoder()`` of ``transformers`` names comes last: the encoder's layers before the decoder's, those of a vision
    or audio tower before the language model's; ``Layer.stack`` tells them apart. Other stacks keep the order in which
    they were registered. A block that is applied several times (ALBERT) counts once.

    Args:
        model: any model, wrapped or not. Names are those of ``model.named_modules()``.

    Raises:
        NoLayersError: if there is no such stack, or a layer is spread over lists side by side (XLM, FlauBERT).
    """
    stacks: list[str] = []
    for name, module in model.named_modules():
        if not any(name.startswith(stack + ".") for stack in stacks) and _is_stack(module):
            stacks.append(name)
    for stack in stacks:
        _check_not_spread(model, stack)
    if not stacks:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise NoLayersError(
            f"the model must have a stack of layers (an nn.ModuleList of blocks), got {type(model).__name__} with "
            f"{f'the lists {lists}' if lists else 'no list'}; choose parameters by name instead"
        )
    stacks.sort(key=lambda stack: _forward_order(model, stack))
    return [
        Layer(f"{stack}.{index}", block, index, stack)
        for stack in stacks
        for index, block in enumerate(model.get_submodule(stack).children())
    ]


def layer_of(parameter: str, layers: Sequence[Layer]) -> Layer | None:
    """The layer that a parameter (by its dotted name) belongs to; None outside the stack."""
    return next((layer for layer in layers if parameter.startswith(layer.name + ".")), None)


def _is_stack(module: nn.Module) -> bool:
    """A list of blocks; a list of lists is none itself, but the lists in it may be."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(map(_is_block, module))


def _is_block(module: nn.Module) -> bool:
    has_modules, has_parameters = any(True for _ in module.children()), any(True for _ in module.parameters())
    return has_modules and has_parameters and not isinstance(module, nn.ModuleList)


def _check_not_spread(model: nn.Module, stack: str) -> None:
    """Refuse a list whose blocks are only parts of layers: their norms lie in a list of equal length beside it."""
    parent, _, name = stack.rpartition(".")
    length = len(list(model.get_submodule(stack).children()))
    for other, module in model.get_submodule(parent).named_children():
        if not isinstance(module, nn.ModuleList) or other == name or len(module) != length:
            continue
        if all("norm" in type(part).__name__.lower() for part in module):
            raise NoLayersError(
                f"each layer must be one module, got {type(model).__name__} with layers spread over the lists {stack} "
                f"and {parent}.{other}; choose parameters by name instead"
            )


def _forward_order(model: nn.Module, stack: str) -> tuple[bool, ...]:
    """For each model around the stack that has a decoder of its own, whether the stack lies in that decoder."""
    inside = []
    path = stack.split(".")
    for end in range(len(path)):
        outer = model.get_submodule(".".join(path[:end]))
        get_decoder: Any = getattr(outer, "get_decoder", None)
        decoder = get_decoder() if callable(get_decoder) else None
        if isinstance(decoder, nn.Module) and decoder is not outer:
            inside.append(any(module is model.get_submodule(stack) for module in decoder.modules()))
    return tuple(inside)
