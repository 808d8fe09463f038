"""What both tuners share: registration with PEFT, checks of targets, and the check of a state before it is loaded.

PEFT's own ``register_peft_method`` accepts only the names that its ``PeftType`` enumerates, so ``register`` writes into
the same three public mappings; their keys are compared as strings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from forge.adapters.placement import linear_shape


def register(peft_type: str, config_cls: type[PeftConfig], tuner_cls: type[BaseTuner]) -> None:
    """Make a method known to PEFT, as ``peft.utils.register_peft_method`` does for its own."""
    methods: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_cls),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner_cls),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner_cls.prefix),
    ]
    for mapping, value in methods:
        mapping[peft_type] = value


def add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    """``get_peft_model``, or one adapter more on a model that has some; the caller's config stays as it is."""
    config = copy.deepcopy(config)
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name)
    model.add_adapter(adapter_name, config)
    return model


class LinearTuner(BaseTuner):
    """A tuner that wraps linear maps, refuses targets that match nothing and states that do not fit."""

    layer_cls: type[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_refuse_other_shapes)  # type: ignore[no-untyped-call]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        _check_targets(peft_config, model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        layer = self.layer_cls(target, adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)


def _check_targets(config: Any, model: nn.Module) -> None:
    """Every named target must match, and match linear maps only; before anything is replaced.

    PEFT is content when one of several names matches.
    """
    targets = config.target_modules
    if targets is None or isinstance(targets, str):
        return
    names = [name for name, _ in model.named_modules() if ".base_layer" not in name]
    for target in targets:
        matched = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matched:
            close = get_close_matches(target, {n.rpartition(".")[2] for n in names} | set(names), n=3)
            raise ValueError(
                f"target_modules must name modules of the model, got {target!r}, which matches none; "
                + (f"did you mean {', '.join(close)}?" if close else "print(model) shows their names")
            )
        for name in matched:
            parent = model.get_submodule(name.rpartition(".")[0])
            if linear_shape(model.get_submodule(name)) is None or isinstance(parent, nn.MultiheadAttention):
                raise ValueError(
                    f"target_modules must name linear maps that are called as modules (nn.Linear, Conv1D, k-bit "
                    f"linear), got {target!r}, which matches {name} ({type(model.get_submodule(name)).__name__}); "
                    "name its linear maps instead"
                )


def _refuse_other_shapes(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook that torch calls before the first parameter of the model is written."""
    for name, parameter in module.named_parameters():
        found = state_dict.get(prefix + name)
        if found is not None and found.shape != parameter.shape:
            raise shape_error(name, tuple(found.shape), tuple(parameter.shape))


def shape_error(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ValueError:
    """The error for a stored parameter of another shape."""
    return ValueError(
        f"the adapter's state must have the shapes of the model, got {list(found)} for {name}, which is "
        f"{list(expected)} here; load it onto the base model and the config that it was trained with"
    )


def check_number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Raise ValueError unless ``low`` ≤ ``value`` < ``high`` (``above``: ``low`` itself is refused too)."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (low < value if above else low <= value) or not value < high:  # type: ignore[operator]
        bracket = "(" if above else "["
        raise ValueError(f"{name} must be a number in {bracket}{low:g}, {high:g}), got {value!r}")


def tuner_layers(model: nn.Module, layer_cls: type[Any]) -> dict[str, Any]:
    """Wrapped modules by the name that they have in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: module for name, module in base.named_modules() if isinstance(module, layer_cls)}


def active_adapter(model: nn.Module, peft_type: str) -> str:
    """Name of the one active adapter of a PEFT model of this type.

    Raises:
        ValueError: if the model is no such PEFT model, or several adapters are active at once.
    """
    if not isinstance(model, PeftModel) or model.peft_type != peft_type:
        found = str(model.peft_type) if isinstance(model, PeftModel) else f"a plain {type(model).__name__}"
        raise ValueError(f"the model must be a PEFT model of type {peft_type}, got {found}; add such adapters first")
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"exactly one adapter must be active, got {active}; choose one with model.set_adapter(name)")
    return str(active[0])


def is_quantised(layer: Any) -> bool:
    """Whether the weight that a tuner layer wraps is stored in k bits."""
    shape = linear_shape(layer)
    weight: Tensor = layer.get_base_layer().weight
    return not weight.is_floating_point() or shape is None or weight.numel() != shape[0] * shape[1]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input in an adapter's dtype; autocast takes over where it is on."""
    return x if x.dtype == dtype else x.to(dtype)
