"""Arms of LoRA: which maps it adapts, which rank gives equal parameters, and what proves that it is so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from experiments.harness.experiment import UserError

if TYPE_CHECKING:
    from torch import nn

Targets = Literal["qv", "qkvo", "mlp", "all"]
"""Query and value; all attention projections; the other linear maps of the layers; both."""

_QUERY_OR_VALUE = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v")


@dataclass(frozen=True)
class LoraArm:
    """Where LoRA is and how large it is."""

    targets: Targets = "qkvo"
    """Maps that it adapts."""
    rank: int = 16
    """Rank on ``qkvo``; on other maps the one that gives as many parameters, as nearly as whole ranks allow."""
    alpha_ratio: int = 2
    """α / r, the factor of the update."""


def add_lora(model: Any, arm: LoraArm, seed: int) -> nn.Module:
    """The model with adapters, which are drawn from ``seed`` whatever was drawn before.

    Args:
        model: without adapters; it is changed in place.
        arm: where they go.
        seed: of their random weights.
    """
    from transformers import set_seed

    from forge.presets import get_preset

    rank = rank_at_equal_parameters(model, arm)
    options = {"lora_r": rank, "lora_alpha": arm.alpha_ratio * rank, "target_modules": target_names(model, arm.targets)}
    set_seed(seed)
    adapted: nn.Module = get_preset("lora", **options).prepare(model)
    return adapted


def target_names(model: nn.Module, targets: Targets) -> tuple[str, ...]:
    """Dotted paths of the linear maps of a set, inside the layers: no pooler, no head.

    Raises:
        UserError: if the model has no such maps (a fused projection holds query and value together).
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    from forge.layers import find_layers
    from forge.targets import resolve_target_modules

    layers = tuple(f"{layer.name}." for layer in find_layers(model))
    linear = [n for n, m in model.named_modules() if isinstance(m, Linear | Conv1D) and n.startswith(layers)]
    ends = tuple(f".{end}" for end in resolve_target_modules(model, "attention"))
    attention = [name for name in linear if f".{name}".endswith(ends)]
    chosen = {
        "qv": [name for name in attention if name.rpartition(".")[2] in _QUERY_OR_VALUE],
        "qkvo": attention,
        "mlp": [name for name in linear if name not in attention],
        "all": linear,
    }[targets]
    if not chosen:
        raise UserError(f"targets {targets!r} must be linear maps of the layers, got none in {type(model).__name__}")
    return tuple(chosen)


def params_per_rank(model: nn.Module, names: Sequence[str]) -> int:
    """Σ (d_in + d_out): what one rank costs on these maps (arXiv:2106.09685, eq. 3)."""
    return sum(sum(model.get_submodule(name).weight.shape) for name in names)  # type: ignore[misc, arg-type]


def rank_at_equal_parameters(model: nn.Module, arm: LoraArm) -> int:
    """The rank on the arm's maps with which LoRA has about as many parameters as with ``arm.rank`` on ``qkvo``."""
    budget = arm.rank * params_per_rank(model, target_names(model, "qkvo"))
    return max(1, round(budget / params_per_rank(model, target_names(model, arm.targets))))


def adapter_params(model: nn.Module) -> int:
    """Parameters of the adapters that train."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name)


def lora_facts(
    plain: nn.Module, adapted: nn.Module, arm: LoraArm, *, with_head: bool
) -> dict[str, tuple[object, object]]:
    """What should be and what is: number of adapters, their rank and factor, their parameters, and the rest.

    Args:
        plain: the same model without adapters.
        adapted: by ``add_lora``.
        arm: as it should be.
        with_head: whether the head of the model trains beside the adapters, as that of a classifier does.
    """
    from peft.tuners.lora import LoraLayer

    names, rank = target_names(plain, arm.targets), rank_at_equal_parameters(plain, arm)
    found = [m for m in adapted.modules() if isinstance(m, LoraLayer)]
    budget = arm.rank * params_per_rank(plain, target_names(plain, "qkvo"))
    body = f"{plain.base_model_prefix}."
    head = sum(p.numel() for name, p in plain.named_parameters() if not name.startswith(body))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {
        "lora_modules": (len(names), len(found)),
        "lora_ranks": ([rank], sorted({m.r["default"] for m in found})),
        "lora_scalings": ([float(arm.alpha_ratio)], sorted({m.scaling["default"] for m in found})),
        "lora_params": (rank * params_per_rank(plain, names), adapter_params(adapted)),
        "lora_params_within_5_percent_of_qkvo": (True, abs(adapter_params(adapted) / budget - 1) <= 0.05),
        "other_params_that_train": (head if with_head else 0, trained - adapter_params(adapted)),
    }
