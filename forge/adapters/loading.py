"""Loading an adapter from a folder, with every shape checked before the model is touched."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn

from forge.adapters.houlsby import HoulsbyConfig
from forge.adapters.tuner import shape_error
from forge.adapters.weight_lora import WeightLoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def load_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Load a saved adapter onto a base model, or beside the adapters of a PEFT model, and activate it.

    What ``PeftModel.from_pretrained`` and ``PeftModel.load_adapter`` do, but an adapter of ours that does not fit is
    refused before anything is changed; those two refuse it before a weight is written, but after the model has been
    wrapped. Adapters of PEFT's own types have PEFT's own checks.

    Args:
        model: base model, or PEFT model with adapters of the same type.
        folder: what ``save_pretrained`` has written: config and safetensors.
        adapter_name: name for ``set_adapter``; must not be taken.
        is_trainable: whether the adapter is to be trained further.

    Raises:
        FileNotFoundError: if the folder holds no adapter in safetensors.
        ValueError: if the name is taken, a parameter has another shape than the model asks for (its name and both
            shapes are given), a module is not in the model, or parameters are missing.
    """
    if not (Path(folder) / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} must hold {WEIGHTS_FILE}, found none; give a folder of save_pretrained()")
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise ValueError(f"adapter_name must be new, got {adapter_name!r}, which is taken; choose another")
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, HoulsbyConfig | WeightLoraConfig):
        _check_fits(model.get_base_model() if isinstance(model, PeftModel) else model, config, Path(folder))
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
    else:
        model = PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=is_trainable)
    model.set_adapter(adapter_name, inference_mode=not is_trainable)
    return model


def _check_fits(model: nn.Module, config: HoulsbyConfig | WeightLoraConfig, folder: Path) -> None:
    modules = dict(model.named_modules())
    found = _stored_shapes(folder / WEIGHTS_FILE)
    marks = tuple(f".{name.split('_')[0]}_" for name in ("houlsby", "wlora"))
    owners = {key[: key.rindex(mark)] for key in found for mark in marks if mark in key}
    for owner in sorted(owners):
        if owner not in modules:
            raise ValueError(
                f"the adapter must be of this base model, got one with parameters for {owner}, which "
                f"{type(model).__name__} does not have; load it onto the base model that it was trained with"
            )
        for name, shape in config.parameter_shapes(modules[owner]).items():
            key = f"{owner}.{name}"
            if key not in found:
                raise ValueError(f"the adapter in {folder} must be complete, but {key} is missing; save it anew")
            if found[key] != shape:
                raise shape_error(key, found[key], shape)
    for key, parameter in model.named_parameters():
        if key in found and found[key] != tuple(parameter.shape):
            raise shape_error(key, found[key], tuple(parameter.shape))


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {key.removeprefix(_PREFIX): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
