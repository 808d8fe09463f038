"""WeightLoRA as a PEFT method: LoRA whose every adapter has a trained weight ω (section «WeightLoRA» of THEORY.md).

    h_i(x) = W_i x + ω_i (α / r) B_i A_i x                                                                     (1)

W_i is frozen; A_i of shape (r, in), B_i of shape (out, r) and the scalar ω_i are trained. B_i = 0 and ω_i = 1 at the
start, so that the fresh model is the base model. ``forge.adapters.pruning`` keeps the K most important adapters.

Source: Veprikov et al., «WeightLoRA: Keep Only Necessary Adapters», arXiv:2506.02724; equation (1) is theirs and the
lecture's, with LoRA's factor α / r (arXiv:2106.09685 §4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forge.adapters.placement import linear_shape
from forge.adapters.tuner import LinearTuner, add_adapter, cast, check_number, is_quantised, register
from forge.checks import check_whole

WEIGHT_LORA = "WEIGHT_LORA"


@dataclass
class WeightLoraConfig(PeftConfig):
    """Options of WeightLoRA; PEFT's ``task_type`` and ``inference_mode`` are options too.

    Raises:
        ValueError: if an option is out of range.
    """

    r: int = field(default=16)
    """Rank of every adapter."""
    lora_alpha: float = field(default=32)
    """α: the update is scaled by α / r."""
    lora_dropout: float = field(default=0.0)
    """Dropout of the adapters' input, in [0, 1)."""
    top_k: int | None = field(default=None)
    """How many adapters ``WeightLoraCallback`` keeps; it may be given there instead."""
    target_modules: list[str] | str | None = field(default=None)
    """Modules to adapt: names, one regular expression or ``"all-linear"``; by default those of PEFT's LoRA."""
    exclude_modules: list[str] | str | None = field(default=None)
    """Modules that are left out, though ``target_modules`` names them."""
    modules_to_save: list[str] | None = field(default=None)
    """Further modules that are trained and saved whole, such as a new classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = WEIGHT_LORA
        check_whole("r", self.r)
        check_number("lora_alpha", self.lora_alpha, 0, math.inf, above=True)
        check_number("lora_dropout", self.lora_dropout, 0, 1)
        if self.top_k is not None:
            check_whole("top_k", self.top_k)

    def parameter_shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored parameters of one adapter around ``module``."""
        d_in, d_out = _linear_shape(module)
        return {"wlora_A.weight": (self.r, d_in), "wlora_B.weight": (d_out, self.r), "wlora_omega": (1,)}


class WeightLoraLinear(nn.Module, BaseTunerLayer):
    """A linear map plus its weighted low-rank updates, equation (1). A pruned adapter has ω = 0 and is skipped.

    By ``Linear`` in its name PEFT knows that ``"all-linear"`` of a further adapter means this module too.
    """

    adapter_layer_names = ("wlora_A", "wlora_B", "wlora_omega")
    other_param_names = ("wlora_dropout", "r", "scaling", "pruned")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: WeightLoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.wlora_A = nn.ModuleDict()
        self.wlora_B = nn.ModuleDict()
        self.wlora_omega = nn.ParameterDict()
        self.wlora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.pruned: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.register_load_state_dict_post_hook(_read_pruned_state)  # type: ignore[no-untyped-call]
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: WeightLoraConfig) -> None:
        """Add a freshly initialised adapter (A as in PEFT's LoRA, B = 0, ω = 1); draws from torch's random state."""
        d_in, d_out = _linear_shape(self)
        self.wlora_A[adapter_name] = nn.Linear(d_in, config.r, bias=False)
        self.wlora_B[adapter_name] = nn.Linear(config.r, d_out, bias=False)
        nn.init.zeros_(self.wlora_B[adapter_name].weight)  # type: ignore[arg-type]
        self.wlora_omega[adapter_name] = nn.Parameter(torch.ones(1))
        self.wlora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the wrapped module and its updates: shape (…, out)."""
        if self.disable_adapters:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.wlora_A and not self.pruned.get(name, False):
                a, b = self.wlora_A[name], self.wlora_B[name]
                update = b(a(self.wlora_dropout[name](cast(x, a.weight.dtype))))  # type: ignore[arg-type]
                result = result + (update * (self.wlora_omega[name] * self.scaling[name])).to(result.dtype)
        return result

    def prune(self, adapter_name: str) -> None:
        """Set ω = 0 and freeze the adapter for good; the forward pass skips it from now on."""
        with torch.no_grad():
            self.wlora_omega[adapter_name].zero_()
        self.pruned[adapter_name] = True
        self._freeze_pruned()

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """A, B and ω of one adapter."""
        a, b = self.wlora_A[adapter_name].weight, self.wlora_B[adapter_name].weight
        return [a, b, self.wlora_omega[adapter_name]]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; pruned adapters stay frozen."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_pruned()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """As in PEFT; pruned adapters stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_pruned()

    def _freeze_pruned(self) -> None:
        for name in self.pruned:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(False)
                parameter.grad = None

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ω (α / r) B A in the layout of the wrapped weight: (out, in), for ``Conv1D`` (in, out)."""
        a, b = self.wlora_A[adapter_name].weight, self.wlora_B[adapter_name].weight
        delta: Tensor = (b @ a) * (self.wlora_omega[adapter_name] * self.scaling[adapter_name])  # type: ignore[operator]
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters' (or the named ones') updates to the wrapped weight.

        Raises:
            NotImplementedError: if the weight is quantised.
            ValueError: under ``safe_merge``, if the merged weight would not be finite.
        """
        if is_quantised(self):
            raise _quantised_base()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.wlora_A:
                continue
            weight: Any = self.get_base_layer().weight
            merged = weight.data + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merged weights must be finite, got NaN or Inf from adapter {name!r}; it diverged")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what ``merge`` has added; equal to the original up to rounding."""
        while self.merged_adapters:
            weight: Any = self.get_base_layer().weight
            weight.data = weight.data - self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)


class WeightLoraModel(LinearTuner):
    """The tuner that PEFT builds for a ``WeightLoraConfig``."""

    prefix = "wlora_"
    tuner_layer_cls = WeightLoraLinear
    layer_cls = WeightLoraLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            kind = model_config.get("model_type")
            if kind not in self.target_module_mapping:
                raise ValueError(
                    f"target_modules must be given for a model whose type PEFT does not know, got None and {kind!r}; "
                    "name linear maps, or take target_modules='all-linear'"
                )
            peft_config.target_modules = list(self.target_module_mapping[kind])
        return peft_config

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        if any(is_quantised(module) for module in self.modules() if isinstance(module, WeightLoraLinear)):
            raise _quantised_base()


register(WEIGHT_LORA, WeightLoraConfig, WeightLoraModel)


def get_weight_lora_model(
    model: nn.Module, config: WeightLoraConfig | None = None, adapter_name: str = "default"
) -> PeftModel:
    """Add WeightLoRA adapters to a model and freeze everything else; seed torch before, and they are reproducible.

    Args:
        model: any model with linear maps, quantised in k bits or not; or a PEFT model that has WeightLoRA adapters
            already: it gets one set more, which ``set_adapter`` activates.
        config: options; it is not changed.
        adapter_name: name for ``set_adapter`` and ``save_pretrained``.

    Raises:
        ValueError: if ``target_modules`` names what is not there or is no linear map, or is missing for a model of
            a type that PEFT does not know.
    """
    return add_adapter(model, WeightLoraConfig() if config is None else config, adapter_name)


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    shape = linear_shape(module)
    if shape is None:
        raise ValueError(f"WeightLoRA must adapt a linear map, got {type(module).__name__}")
    return shape


def _read_pruned_state(layer: WeightLoraLinear, _: Any) -> None:
    """A loaded ω of exactly 0 means pruned: training never reaches it."""
    layer.pruned = {name: True for name, omega in layer.wlora_omega.items() if not omega.is_meta and omega.item() == 0}
    layer._freeze_pruned()


def _quantised_base() -> NotImplementedError:
    return NotImplementedError(
        "adapters must be merged into unquantised weights, got k-bit ones, which cannot hold the sum exactly; load the "
        "base model in bf16, load the adapter onto it and merge there"
    )
