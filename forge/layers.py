"""The stack of layers of a model: what freezing, adapters and the model table count as «layers».

Works on any ``nn.Module`` whose blocks lie in an ``nn.ModuleList``, wrapped by PEFT or not: every decoder, encoder and
encoder–decoder family of ``transformers`` that repeats one kind of block. Nothing is looked up by model name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Blocks of the model from the bottom (nearest the input) to the top; the encoder's before the decoder's.

    A stack is an outermost ``nn.ModuleList`` that repeats one kind of block, each with parameters and with modules of
    its own; single projections, embeddings and norms are no blocks.

    Args:
        model: any model, wrapped by PEFT or not. Names are those of ``model.named_modules()``.

    Raises:
        NoLayersError: if there is no such stack.
    """
    found: list[Layer] = []
    for name, module in model.named_modules():
        if any(name.startswith(layer.stack + ".") for layer in found) or not _is_stack(module):
            continue
        found += [Layer(f"{name}.{i}", block, i, name) for i, block in enumerate(module.children())]
    if not found:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise NoLayersError(
            f"the model must have a stack of layers (an nn.ModuleList that repeats one kind of block), got "
            f"{type(model).__name__} with {f'the lists {lists}' if lists else 'none'}; choose parameters by name instead"
        )
    return found


def layer_of(parameter: str, layers: Sequence[Layer]) -> Layer | None:
    """The layer that a parameter (by its dotted name) belongs to; None outside the stack."""
    return next((layer for layer in layers if parameter.startswith(layer.name + ".")), None)


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or not len(module):
        return False
    kinds = {type(block) for block in module}
    return len(kinds) == 1 and all(list(b.children()) and any(True for _ in b.parameters()) for b in module)
