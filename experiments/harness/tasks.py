"""The tasks behind one name: language modelling and classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.classification import ClassificationRun

if TYPE_CHECKING:
    import torch

    from experiments.harness import causal_lm, classification
    from forge.presets import Preset

Run = CausalLMRun | ClassificationRun

Collator = Callable[[list[dict[str, Any]]], Mapping[str, "torch.Tensor"]]


def prepare(run: Run, seed: int, preset: Preset | None = None) -> causal_lm.Ingredients | classification.Ingredients:
    """What the run trains and on what, as the ``prepare`` of its task."""
    from experiments.harness import causal_lm, classification

    if isinstance(run, ClassificationRun):
        return classification.prepare(run, seed, preset)
    return causal_lm.prepare(run, seed, preset)


def collator_of(ingredients: causal_lm.Ingredients | classification.Ingredients) -> Collator | None:
    """Makes a batch of the task's examples; None where they are of one length and need none."""
    return getattr(ingredients, "collator", None)


def fixed_length_collator(run: Run, ingredients: causal_lm.Ingredients | classification.Ingredients) -> Collator:
    """Makes batches of one shape, padded to ``run.sequence_length``, so that cost does not depend on the batch."""
    from transformers import default_data_collator

    collator: Any = collator_of(ingredients)
    if collator is None:
        return default_data_collator
    return dataclasses.replace(collator, padding="max_length", max_length=run.sequence_length)  # type: ignore[no-any-return]
