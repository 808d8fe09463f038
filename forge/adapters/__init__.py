"""Adapters that PEFT lacks, and the callbacks that its AdaLoRA and our WeightLoRA need during training.

``HoulsbyConfig`` (bottleneck adapters, arXiv:1902.00751) and ``WeightLoraConfig`` (a trained weight on every LoRA
adapter, arXiv:2506.02724) are PEFT methods like any other: once this package has been imported, ``get_peft_model``,
``save_pretrained`` (safetensors), ``PeftModel.from_pretrained``, ``load_adapter``, ``set_adapter``,
``disable_adapter``, ``merge_and_unload`` and the ``Trainer`` work on them. ``docs/adapters.md`` has examples, and says
which of PEFT's own methods fit which model.
"""

from forge.adapters.adalora import AdaLoraCallback
from forge.adapters.houlsby import HoulsbyConfig, add_houlsby_adapters
from forge.adapters.loading import load_adapter
from forge.adapters.placement import find_sublayer_outputs
from forge.adapters.pruning import WeightLoraCallback, importances, prune_to_top_k
from forge.adapters.weight_lora import WeightLoraConfig, get_weight_lora_model

__all__ = [
    "AdaLoraCallback",
    "HoulsbyConfig",
    "WeightLoraCallback",
    "WeightLoraConfig",
    "add_houlsby_adapters",
    "find_sublayer_outputs",
    "get_weight_lora_model",
    "importances",
    "load_adapter",
    "prune_to_top_k",
]
