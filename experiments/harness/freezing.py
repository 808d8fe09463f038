"""Arms of freezing: which layers an arm freezes, and what proves that it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from forge.freezing import FreezeReport

NONE, HALF, UPPER_HALF, EMBEDDINGS_TRAINED = "lower_0", "lower_50", "upper_50", "lower_50_embeddings_trained"
"""Arms: which layers are frozen, and how many percent of them."""


def arms_of(method: str, shares: Sequence[int]) -> tuple[str, ...]:
    """The arms of a method; under LoRA the embeddings train in none of them."""
    lower = tuple(f"lower_{share}" for share in shares)
    return (*lower, UPPER_HALF, EMBEDDINGS_TRAINED) if method == "full" else (*lower, UPPER_HALF)


def freeze(model: nn.Module, arm: str) -> FreezeReport:
    """Freeze what an arm freezes."""
    from forge.freezing import freeze_by_name, freeze_embeddings, setup_lp_lora_style
    from forge.layers import find_layers

    if arm == EMBEDDINGS_TRAINED:
        return setup_lp_lora_style(model, 0.5, freeze_embeddings=False)
    if arm != UPPER_HALF:
        return setup_lp_lora_style(model, int(arm.removeprefix("lower_")) / 100)
    layers = find_layers(model)
    upper = freeze_by_name(model, [f"{layer.name}.*" for layer in layers[len(layers) - len(layers) // 2 :]])
    if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):  # type: ignore[operator]
        return upper
    below = freeze_embeddings(model)
    return dataclasses.replace(below, parameters=(*upper.parameters, *below.parameters))


def share_level(model: nn.Module, arm: str) -> dict[str, float]:
    """The share of an arm that freezes from below as a level: layers of the model over layers that train."""
    from forge.layers import find_layers

    if arm in (UPPER_HALF, EMBEDDINGS_TRAINED):
        return {}
    total = len(find_layers(model))
    return {"layers_per_trained_layer": total / (total - len(frozen_layers(model, arm)[0]))}


def frozen_layers(model: nn.Module, arm: str) -> tuple[list[int], list[int]]:
    """Places of the layers in which nothing should train, and of those in which nothing does."""
    from forge.layers import find_layers

    layers = find_layers(model)
    share = 50 if arm in (UPPER_HALF, EMBEDDINGS_TRAINED) else int(arm.removeprefix("lower_"))
    count = len(layers) * share // 100
    expected = range(len(layers) - count, len(layers)) if arm == UPPER_HALF else range(count)
    trains = [any(p.requires_grad for p in layer.module.parameters()) for layer in layers]
    return list(expected), [place for place, any_trains in enumerate(trains) if not any_trains]


def embeddings_frozen(model: Any, arm: str, method: str) -> tuple[bool, bool]:
    expected = method == "lora" or arm not in (NONE, EMBEDDINGS_TRAINED)
    return expected, not any(p.requires_grad for p in model.get_input_embeddings().parameters())


@contextmanager
def frozen(model: nn.Module, arm: str) -> Iterator[None]:
    """The model with the arm's layers frozen, and thawed again."""
    from forge.freezing import unfreeze

    report = freeze(model, arm)
    try:
        yield
    finally:
        unfreeze(model, report)
