"""Copies of weights, and whether two sets of tensors are bitwise the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, those that bitsandbytes packs as the plain tensors that they are."""
    return {name: p.detach().clone().as_subclass(Tensor) for name, p in model.named_parameters()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, and under each the same values."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def names_moved(before: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """Names of the parameters that are no longer what they were."""
    now = weights_of(model)
    return {name for name, weight in before.items() if not torch.equal(weight, now[name])}
