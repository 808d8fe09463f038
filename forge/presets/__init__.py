"""Ready-made fine-tuning recipes (section «Training Presets» of THEORY.md).

``get_preset("qlora", lora_r=32, learning_rate=2e-4)`` is a frozen set of options. ``preset.prepare(model)`` applies
it to a model, ``preset.get_training_args()`` and ``preset.callbacks()`` go to the Trainer. The numbers are those of the
papers and guides that ``docs/presets.md`` names: starting points, with no promise that they are the best.
"""

from __future__ import annotations

from typing import Any

from forge.presets.adapters import (
    AdaLoraPreset,
    AdapterPreset,
    HoulsbyPreset,
    LoraAllLinearPreset,
    LoraPreset,
    QLoraPreset,
    WeightLoraPreset,
)
from forge.presets.base import Preset
from forge.presets.checks import check_choice, unknown_option
from forge.presets.full import ClassicPreset, DpoPreset, SftPreset
from forge.presets.prompts import PrefixTuningPreset, PromptTuningPreset, PTuningPreset, PTuningV2Preset

PRESETS: dict[str, type[Preset]] = {
    preset.name: preset
    for preset in (
        SftPreset,
        ClassicPreset,
        LoraPreset,
        LoraAllLinearPreset,
        QLoraPreset,
        DpoPreset,
        AdaLoraPreset,
        WeightLoraPreset,
        HoulsbyPreset,
        PrefixTuningPreset,
        PTuningPreset,
        PTuningV2Preset,
        PromptTuningPreset,
    )
}
"""Every preset by its name."""


def get_preset(name: str, **overrides: Any) -> Preset:
    """A preset with some of its options changed.

    Args:
        name: one of ``PRESETS``.
        **overrides: options of that preset, named as in ``TrainingArguments`` and PEFT.

    Raises:
        ValueError: for an unknown preset or option (near misses are listed), one that this preset would ignore, or a
            value of the wrong type or out of range.
    """
    check_choice("preset", name, PRESETS)
    preset = PRESETS[name]
    known = preset.option_names()
    for option in overrides:
        if option not in known:
            owners = [other for other, kind in PRESETS.items() if option in kind.option_names()]
            raise unknown_option(name, option, known, owners, preset.unavailable.get(option, ""))
    return preset(**overrides)


__all__ = ["PRESETS", "AdapterPreset", "Preset", "get_preset"]
