"""What one bad batch at the very end costs: «Последний batch был плохой» (seed 003, section «EMA» of THEORY.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from transformers import Trainer

from experiments.harness.causal_lm import CausalLMRun, Ingredients, losses_on_test
from experiments.harness.evaluation import HeldOutLoss
from experiments.harness.posthoc import copy_of_weights
from experiments.harness.record import ManipulationCheck, Measurements, Metric, Observation
from forge.ema import EMACallback
from forge.posthoc_ema import Reconstruction

LOSS_RISE = Metric("bad_batch_loss_rise", "1", "minimize")
"""Test loss after the bad batch over that before it, less one; negative where the batch did good."""


def observe_bad_batch(
    into: Measurements,
    run: CausalLMRun,
    ingredients: Ingredients,
    trainer: Trainer,
    ema: EMACallback,
    decay: float,
    before: Mapping[str, HeldOutLoss],
) -> float:
    """Take one more step, on a corrupted batch; add what it does to the loss of raw and averaged weights, and undo it.

    The weights of the model are then bitwise as they were; optimizer and averages are one step further.

    Args:
        into: gets the outcomes and the check of the manipulation, or the note that a loss is not finite.
        run: the recipe of the evaluations.
        ingredients: with the trained model.
        trainer: that trained it, with the state of its optimizer; the batch is drawn by its seed.
        ema: the averages, which are updated once.
        decay: the average to look at, arm ``ema_optimal``.
        before: test loss by arm at the end of the training.

    Returns:
        Seconds of the evaluation.
    """
    model, step = ingredients.model, trainer.state.global_step
    raw = Reconstruction(copy_of_weights(model), 0.0)
    shape = (trainer.args.train_batch_size, run.sequence_length)
    step_on(trainer, random_tokens(model.get_input_embeddings().num_embeddings, shape, trainer.args.seed))
    ema.ema.update()
    parameters = dict(model.named_parameters())
    moved = any(bool((parameters[name] != weight).any()) for name, weight in raw.averages.items())
    into.checks += ManipulationCheck.each(bad_batch_moved_the_weights=(True, moved))
    arms = {"raw": nullcontext, "ema_optimal": partial(ema.use_ema, decay)}
    after, seconds = losses_on_test(run, ingredients, arms)
    for arm, held_out in after.items():
        if not math.isfinite(held_out.loss):
            into.diverged = f"the loss of arm {arm} after the bad batch is {held_out.loss}"
            continue
        rise = held_out.loss / before[arm].loss - 1
        into.observations.append(Observation.of(LOSS_RISE, rise, step, split="test", arm=arm))
    raw.apply(model)
    return seconds


def random_tokens(vocabulary: int, shape: tuple[int, int], seed: int) -> Tensor:
    """A corrupted batch: token ids drawn uniformly from the vocabulary, shape (blocks, tokens)."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def step_on(trainer: Trainer, batch: Tensor) -> None:
    """One optimizer step of a trainer that has trained, at its last learning rate, with its clipping of gradients."""
    model = trainer.model_wrapped
    (inputs,), tokens = trainer.get_batch_samples(
        iter([{"input_ids": batch, "labels": batch.clone()}]), 1, trainer.args.device
    )
    trainer.training_step(model, inputs, tokens)
    trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    model.zero_grad()
