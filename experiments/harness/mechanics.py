"""Where adapters start and what merging them does, and what every measurement of mechanics shares.

Differences are recorded as two norms, of the difference and of what it is compared with, so that a claim can be about
their ratio. Logits are compared in eval mode and in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.harness.classification import ClassificationRun
from experiments.harness.cost import stop_between_parts, timed, times_in_turn
from experiments.harness.experiment import TrialContext
from experiments.harness.methods import METHODS, build, expected_trainable, preset_of
from experiments.harness.record import ManipulationCheck, Measurements, Metric, Observation, Scalar, TrialSpec
from experiments.harness.tasks import Run, collator_of

DIFFERENCE_NORM = Metric("difference_norm", "1", "minimize")
REFERENCE_NORM = Metric("reference_norm", "1", "none")
FORWARD_TIME = Metric("forward_time_sec", "s", "minimize")

GROUPS = {
    "lora": ("lora", "lora-all-linear", "adalora", "weightlora"),
    "houlsby": ("houlsby",),
    "prompts": ("prefix-tuning", "p-tuning", "p-tuning-v2", "prompt-tuning"),
}
"""Methods that begin in the same way."""

Batch = Mapping[str, Tensor]


def observe_difference(into: Measurements, value: Tensor, reference: Tensor, **conditions: Scalar) -> None:
    """Add the norm of ``value − reference`` and of ``reference``, computed in fp64.

    Raises:
        ValueError: if the shapes differ.
    """
    if value.shape != reference.shape:
        raise ValueError(
            f"what is compared must have one shape, got {[*value.shape]} and {[*reference.shape]}; select the same part"
        )
    value, reference = value.detach().double(), reference.detach().double()
    figures = {DIFFERENCE_NORM: (value - reference).norm(), REFERENCE_NORM: reference.norm()}
    into.observations += [Observation.of(metric, float(norm), 0, **conditions) for metric, norm in figures.items()]


def rows_of(run: Run, ingredients: Any, lengths: str, seed: int) -> tuple[list[Any], Any]:
    """A full batch of training examples drawn by the seed, and what makes batches of them.

    Args:
        run: the recipe; its batch is the full one.
        ingredients: of the run.
        lengths: ``ragged`` (sequences as long as they are, padded in the batch), or ``equal`` (blocks of packed text).
        seed: of the draw.
    """
    from transformers import DataCollatorForLanguageModeling, default_data_collator

    from experiments.harness.data import load_corpus
    from experiments.harness.models import load_tokenizer

    draw = np.random.default_rng(seed)
    if isinstance(run, ClassificationRun) or lengths == "equal":
        chosen = draw.choice(len(ingredients.train), run.batch_size, replace=False)
        return [ingredients.train[int(i)] for i in chosen], collator_of(ingredients) or default_data_collator
    documents, tokenizer = load_corpus(run.dataset).split("train"), load_tokenizer(run.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [documents[int(i)].text for i in draw.choice(len(documents), run.batch_size, replace=False)]
    encoded = tokenizer(texts, truncation=True, max_length=run.sequence_length)["input_ids"]
    return [{"input_ids": ids} for ids in encoded], DataCollatorForLanguageModeling(tokenizer, mlm=False)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits in eval mode."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return logits


def draw_adapters(model: nn.Module, std: float = 0.02) -> None:
    """Give LoRA's B, which begins at 0, normal weights: adapters as if trained."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)


def architecture(model: nn.Module) -> list[tuple[str, str]]:
    """Names and types of all modules."""
    return [(name, type(module).__name__) for name, module in model.named_modules()]


def merged_logits(model: Any, weights: str, batch: Batch) -> tuple[Tensor, Tensor, nn.Module]:
    """Logits with adapters beside the weights and merged into them, both computed in fp32, and the merged model.

    What differs is how merged weights are stored: ``fp32``, ``bf16`` (rounded), or ``nf4``, which PEFT dequantises and
    quantises again.

    Args:
        model: a PEFT model on weights that are stored as ``weights`` says (bf16: fp32 weights, which are rounded here).
        weights: ``fp32``, ``bf16`` or ``nf4``.
        batch: inputs.
    """
    if weights == "bf16":
        model.to(torch.bfloat16).float()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    beside = logits_of(model, batch)
    merged: nn.Module = model.merge_and_unload()
    if weights == "bf16":
        merged.to(torch.bfloat16).float()
    return beside, logits_of(merged, batch), merged


def forward_times(models: Mapping[str, nn.Module], batch: Batch, rounds: int) -> dict[str, float]:
    """Median seconds of a forward pass of every model, in turn, the order rotating; one round is not counted."""
    return times_in_turn(models, rounds, lambda name, _: timed(partial(logits_of, models[name], batch)))


def full_batch(run: Run, ingredients: Any, seed: int, count: int | None = None) -> dict[str, Tensor]:
    """A full batch, or the first examples of it, on the device of the model."""
    rows, collator = rows_of(run, ingredients, "equal", seed)
    device = next(ingredients.model.parameters()).device
    return {name: tensor.to(device) for name, tensor in collator(rows[:count]).items()}


def measure_start(spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements) -> None:
    """Logits of every untrained method against those of the plain model, by method and by group."""
    batch = full_batch(run, ingredients, spec.seed)
    plain = logits_of(ingredients.model, batch)
    for group, names in GROUPS.items():
        found: list[Tensor] = []
        for name in names:
            stop_between_parts(context)
            context.report(len(found), len(names), phase=f"start of {name}")
            preset = preset_of(name, METHODS[name].middle_size, 100)
            model = build(run, ingredients, spec.seed, preset)
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            expected = expected_trainable(ingredients.model, preset)
            into.checks += ManipulationCheck.each(**{f"trainable_params {name}": (expected, trainable)})
            found.append(logits_of(model, batch))
            observe_difference(into, found[-1], plain, method=name)
        observe_difference(into, torch.stack(found), torch.stack([plain] * len(found)), group=group)


def measure_merge(spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements) -> None:
    """Logits with adapters beside the weights, merged, and switched off; time of a forward pass of what is merged."""
    batch = full_batch(run, ingredients, spec.seed)
    plain, shape = logits_of(ingredients.model, batch), architecture(ingredients.model)
    kinds = ("fp32", "bf16") if run.random_init else ("fp32", "bf16", "nf4")
    for done, kind in enumerate(kinds):
        stop_between_parts(context)
        context.report(done, len(kinds), phase=f"merging into {kind}")
        model = build(run, ingredients, spec.seed, preset_of("qlora" if kind == "nf4" else "lora", 16, 100))
        draw_adapters(model)
        if kind == "fp32":
            adapted = logits_of(model, batch)
            with model.disable_adapter():
                observe_difference(into, logits_of(model, batch), plain, arm="switched_off")
            moved = float((adapted - plain).norm() / plain.norm())
            into.checks += ManipulationCheck.each(adapters_change_the_logits=(True, moved > 0.01))
        beside, logits, merged = merged_logits(model, kind, batch)
        observe_difference(into, logits, beside, arm="merged", weights=kind)
        if kind == "fp32":
            into.checks += ManipulationCheck.each(architecture_of_the_base=(True, architecture(merged) == shape))
            models = {"base": ingredients.model, "merged": merged}
            seconds = forward_times(models, batch, 3 * spec.settings["timed_rounds"])
            into.observations += [Observation.of(FORWARD_TIME, value, 0, arm=arm) for arm, value in seconds.items()]
