"""Bottleneck adapters of Houlsby et al., arXiv:1902.00751 §2.1, as a PEFT method (section «Адаптеры» of THEORY.md).

    x' = x + W_up σ(W_down x + b_down) + b_up                                                                  (1)

with W_down of shape (m, d) and W_up of shape (d, m), m ≪ d. An adapter follows the output projection of the attention
and of the feed-forward part of every layer, before the residual connection is added: 2md + d + m parameters each. The
paper places it after the dropout of the sub-layer; here, where any model has a module to wrap, it comes before that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from forge.adapters.placement import find_sublayer_outputs, linear_shape
from forge.adapters.tuner import LinearTuner, add_adapter, cast, check_number, register
from forge.checks import check_whole
from forge.layers import find_layers

HOULSBY = "HOULSBY"


@dataclass
class HoulsbyConfig(PeftConfig):
    """Options of bottleneck adapters; PEFT's ``task_type`` and ``inference_mode`` are options too.

    Raises:
        ValueError: if an option is out of range, or the nonlinearity is unknown (near misses are listed).
    """

    bottleneck: int = field(default=64)
    """Width m of the bottleneck; the paper tries 1 to 512."""
    nonlinearity: str = field(default="relu")
    """Name of σ in ``transformers.activations.ACT2FN``."""
    zero_init: bool = field(default=True)
    """Start with W_up = 0: the fresh model is bitwise the base model. Otherwise as in the paper: near the identity."""
    init_std: float = field(default=1e-2)
    """Standard deviation of the initial W_down (and of W_up without ``zero_init``), truncated at two deviations."""
    train_layer_norms: bool = field(default=False)
    """Train the norms inside the layers too, as the paper does; each adapter then has its own copy of them."""
    target_modules: list[str] | str | None = field(default=None)
    """Modules whose output is adapted (names, or one regular expression); by default the sub-layers' outputs."""
    exclude_modules: list[str] | str | None = field(default=None)
    """Modules that are left out, though ``target_modules`` names them."""
    modules_to_save: list[str] | None = field(default=None)
    """Further modules that are trained and saved whole, such as a new classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = HOULSBY
        check_whole("bottleneck", self.bottleneck)
        check_number("init_std", self.init_std, 0, 1, above=True)
        if self.nonlinearity not in ACT2FN:
            close = get_close_matches(str(self.nonlinearity), ACT2FN, n=3) or ["relu", "gelu", "silu"]
            raise ValueError(f"nonlinearity must be known, got {self.nonlinearity!r}; did you mean {', '.join(close)}?")
        if any(True for _ in ACT2FN[self.nonlinearity].parameters()):
            raise ValueError(
                f"nonlinearity must have no parameters, got {self.nonlinearity!r}, whose would be neither trained nor "
                "saved; use relu, gelu or silu"
            )
        if self.target_modules == "all-linear":
            raise ValueError(
                "target_modules must be sub-layer outputs, got 'all-linear'; an adapter inside a sub-layer is none of "
                "the paper's: leave target_modules=None"
            )

    def parameter_shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored parameters of one adapter around ``module``."""
        m, d = self.bottleneck, _output_width(module)
        return {
            "houlsby_down.weight": (m, d),
            "houlsby_down.bias": (m,),
            "houlsby_up.weight": (d, m),
            "houlsby_up.bias": (d,),
        }


class HoulsbyLayer(nn.Module, BaseTunerLayer):
    """A linear map followed by the active adapter, equation (1)."""

    adapter_layer_names = ("houlsby_down", "houlsby_up")
    other_param_names = ("nonlinearity",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: HoulsbyConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.houlsby_down = nn.ModuleDict()
        self.houlsby_up = nn.ModuleDict()
        self.nonlinearity: dict[str, nn.Module] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: HoulsbyConfig) -> None:
        """Add a freshly initialised adapter; draws from torch's random state."""
        width = _output_width(self)
        self.houlsby_down[adapter_name] = _near_zero(nn.Linear(width, config.bottleneck), config.init_std)
        self.houlsby_up[adapter_name] = _near_zero(nn.Linear(config.bottleneck, width), config.init_std)
        if config.zero_init:
            nn.init.zeros_(self.houlsby_up[adapter_name].weight)  # type: ignore[arg-type]
        self.nonlinearity[adapter_name] = ACT2FN[config.nonlinearity]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the wrapped module, adapted: shape (…, d)."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.houlsby_down:
                down, up = self.houlsby_down[name], self.houlsby_up[name]
                hidden = self.nonlinearity[name](down(cast(result, down.weight.dtype)))  # type: ignore[arg-type]
                result = result + up(hidden).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always an error: see ``HoulsbyModel``."""
        raise _not_mergeable()


class HoulsbyModel(LinearTuner):
    """The tuner that PEFT builds for a ``HoulsbyConfig``. Merging raises NotImplementedError: (1) is not linear."""

    prefix = "houlsby_"
    tuner_layer_cls = HoulsbyLayer
    layer_cls = HoulsbyLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name; nothing is looked up by model

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = find_sublayer_outputs(model)
        super()._prepare_model(peft_config, model)
        if peft_config.train_layer_norms:
            known = peft_config.modules_to_save or []
            peft_config.modules_to_save = [*known, *(n for n in _layer_norms(model) if n not in known)]

    def _check_merge_allowed(self) -> None:
        raise _not_mergeable()


register(HOULSBY, HoulsbyConfig, HoulsbyModel)


def add_houlsby_adapters(
    model: nn.Module, config: HoulsbyConfig | None = None, adapter_name: str = "default"
) -> PeftModel:
    """Add bottleneck adapters to a model and freeze everything else; seed torch before, and they are reproducible.

    Args:
        model: any model with a stack of layers, quantised in k bits or not; or a PEFT model that has bottleneck
            adapters already: it gets one more, which ``set_adapter`` activates.
        config: options; the default has a bottleneck of 64. It is not changed.
        adapter_name: name for ``set_adapter`` and ``save_pretrained``.

    Raises:
        NoLayersError: if the model has no stack of layers and ``target_modules`` names nothing.
        ValueError: if the places for adapters are not found, or ``target_modules`` names what is not there.
    """
    return add_adapter(model, HoulsbyConfig() if config is None else config, adapter_name)


def _output_width(module: nn.Module) -> int:
    shape = linear_shape(module)
    if shape is None:
        raise ValueError(f"a bottleneck adapter must follow a linear map, got {type(module).__name__}")
    return shape[1]


def _near_zero(linear: nn.Linear, std: float) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)
    return linear


def _layer_norms(model: nn.Module) -> list[str]:
    """Norms inside the layers, by their names in the base model: modules whose class says so and with parameters."""
    return [
        f"{layer.name}.{name}".removesuffix(".original_module")
        for layer in find_layers(model)
        for name, module in layer.module.named_modules()
        if "norm" in type(module).__name__.lower()
        and ".modules_to_save." not in name
        and any(True for _ in module.parameters())
    ]


def _not_mergeable() -> NotImplementedError:
    return NotImplementedError(
        "bottleneck adapters must stay beside the base weights, got a request to merge them; σ makes them non-linear, "
        "so no weight matrix equals them: keep the adapter, or call unload() to get the base model back"
    )
