"""The blocks of a model as a table: parameters, trainable share, dtypes, memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from forge.layers import Layer, NoLayersError, find_layers, layer_of
from forge.memory.storage import ParameterStorage, buffer_bytes, parameter_storage

_PART = re.compile(r"[^.]+(\.\d+)?")
"""Direct child of a layer, or a numbered child of a list in it."""
_UP_TO_NUMBER = re.compile(r".*\.\d+\.")


@dataclass(frozen=True)
class ModelBlock:
    """One row of the table: parameters that belong together, tied ones once."""

    name: str
    parameters: int
    """Weights, also where two share a byte."""
    trainable: int
    dtypes: tuple[str, ...]
    """Most bytes first; ``nf4``, ``fp4`` or ``int8`` for weights that bitsandbytes has quantised."""
    stored_bytes: int
    """Quantisation state included."""
    depth: int = 0
    """0 for a block, 1 for a part of the block above it, whose figures include it."""


def print_model_info(model: nn.Module, show_breakdown: bool = False, *, console: Console | None = None) -> None:
    """Print the blocks of a model: parameters, trainable share, dtypes, memory.

    Args:
        model: any model: plain, wrapped by PEFT, quantised by bitsandbytes, encoder–decoder, or without layers.
        show_breakdown: show each range of equal layers with its parts, instead of each stack in one row.
        console: where to print; standard output by default.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``, or ``show_breakdown`` not a bool.
    """
    if not isinstance(show_breakdown, bool):
        raise TypeError(f"show_breakdown must be True or False, got {show_breakdown!r}")
    blocks = model_blocks(model, breakdown=show_breakdown)
    total = _block("Total", parameter_storage(model))
    table = Table(title=type(model).__name__, box=box.SIMPLE_HEAD)
    table.add_column("block", overflow="fold")
    for column in ("parameters", "trainable", "%", "memory"):
        table.add_column(column, justify="right")
    table.add_column("dtype")
    for block in blocks:
        table.add_row(*_cells(block), style="dim" if block.depth else "")
    table.add_section()
    table.add_row(*_cells(total), style="bold")
    if buffers := buffer_bytes(model):
        table.caption = f"buffers: {_size(buffers)} more"
    (console or Console()).print(table)


def model_blocks(model: nn.Module, *, breakdown: bool = False) -> list[ModelBlock]:
    """Blocks of a model from the input to the output: embeddings, layers, head, adapters, the rest.

    Embeddings are the ``nn.Embedding`` modules outside the layers; a head tied to them counts there. Adapters are what
    PEFT has added, wherever it lies. With depth 0 alone, the blocks are a partition of the parameters.

    Args:
        model: any model.
        breakdown: split stacks into ranges of equal layers, each followed by its parts (``depth`` 1).

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; load it first")
    layers, adapters = _layers(model), _adapter_names(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = {id(p) for p in output.parameters()} if output is not None else set()
    tensors = dict(model.named_parameters())
    groups: dict[str, list[ParameterStorage]] = {"Embeddings": []}
    for parameter in parameter_storage(model):
        layer, key = layer_of(parameter.name, layers), id(tensors[parameter.name])
        if adapters(parameter.name):
            group = "Adapters"
        elif layer is not None:
            group = layer.stack
        else:
            group = "Embeddings" if key in embeddings else "Head" if key in head else "Other"
        groups.setdefault(group, []).append(parameter)
    stacks = {layer.stack: [other for other in layers if other.stack == layer.stack] for layer in layers}
    blocks: list[ModelBlock] = []
    for name in ["Embeddings", *stacks, "Other", "Head", "Adapters"]:
        if name not in groups or not groups[name]:
            continue
        if name in stacks and breakdown:
            blocks += _ranges(groups[name], stacks[name])
        else:
            label = f"{_short(name)} ({len(stacks[name])} layers)" if name in stacks else name
            blocks.append(_block(label, groups[name]))
            blocks += _modules(groups[name]) if breakdown else []
    return blocks


def _layers(model: nn.Module) -> list[Layer]:
    try:
        return find_layers(model)
    except NoLayersError:
        return []


def _adapter_names(model: nn.Module) -> Callable[[str], bool]:
    """Whether a parameter, by its name, is one that PEFT has added."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    prefixes = tuple(
        f"{name}.{kind}."
        for name, m in model.named_modules()
        if isinstance(m, BaseTunerLayer)
        for kind in m.adapter_layer_names
    )
    return lambda name: name.startswith((*prefixes, "prompt_encoder.")) or ".modules_to_save." in name


def _block(name: str, parameters: Sequence[ParameterStorage], depth: int = 0) -> ModelBlock:
    by_dtype: dict[str, int] = {}
    for p in parameters:
        by_dtype[p.dtype] = by_dtype.get(p.dtype, 0) + p.stored_bytes
    return ModelBlock(
        name=name,
        parameters=sum(p.numel for p in parameters),
        trainable=sum(p.numel for p in parameters if p.trainable),
        dtypes=tuple(sorted(by_dtype, key=lambda dtype: -by_dtype[dtype])),
        stored_bytes=sum(p.stored_bytes for p in parameters),
        depth=depth,
    )


def _ranges(parameters: Sequence[ParameterStorage], layers: Sequence[Layer]) -> list[ModelBlock]:
    """Neighbouring layers with equal parameters, and the parts of such a range."""
    held = {layer.name: [p for p in parameters if p.name.startswith(layer.name + ".")] for layer in layers}

    def look(layer: Layer) -> list[tuple[object, ...]]:
        inside = len(layer.name) + 1
        return [(p.name[inside:], p.numel, p.dtype, p.stored_bytes, p.trainable) for p in held[layer.name]]

    blocks: list[ModelBlock] = []
    for _, group in groupby(layers, key=look):
        members = list(group)
        first, last = members[0], members[-1]
        name = _short(first.name)
        span = name if first is last else f"{name}–{last.index} ({len(members)} layers)"
        inside = [p for layer in members for p in held[layer.name]]
        blocks.append(_block(span, inside))
        parts: dict[str, list[ParameterStorage]] = {}
        for layer in members:
            for p in held[layer.name]:
                part = _PART.match(p.name[len(layer.name) + 1 :])
                parts.setdefault(part[0] if part else p.name, []).append(p)
        blocks += [_block(part, of_part, depth=1) for part, of_part in parts.items()]
    return blocks


def _modules(parameters: Iterable[ParameterStorage]) -> list[ModelBlock]:
    """Parts of a block outside the layers: its modules, those of all layers together."""
    parts: dict[str, list[ParameterStorage]] = {}
    for p in parameters:
        path = _short(p.name.rpartition(".")[0] or p.name)
        parts.setdefault(_UP_TO_NUMBER.sub("*.", path), []).append(p)
    return [_block(part, of_part, depth=1) for part, of_part in parts.items()] if len(parts) > 1 else []


def _short(name: str) -> str:
    """A dotted path without the two modules that PEFT puts around a model."""
    return name.removeprefix("base_model.model.")


def _cells(block: ModelBlock) -> tuple[str, ...]:
    share = f"{block.trainable / block.parameters:.2%}" if block.parameters else "–"
    figures = (f"{block.parameters:,}", f"{block.trainable:,}", share, _size(block.stored_bytes))
    return (f"{'  ' * block.depth}{block.name}", *figures, ", ".join(block.dtypes))


def _size(count: int) -> str:
    """Bytes in the unit that suits them, with 1 kB = 1000 bytes."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"
