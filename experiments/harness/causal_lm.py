"""One run of training a causal language model: its settings, its ingredients, and the test loss of its arms.

Shared by every experiment on language modelling; an experiment adds its own fields by subclassing ``CausalLMRun``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from experiments.harness.experiment import UserError
from experiments.harness.record import (
    EVAL_LOSS,
    OTHER_LOSS,
    PERPLEXITY,
    ExampleOutcome,
    Measurements,
    Metric,
    Observation,
    Scalar,
)
from experiments.harness.training_run import TrainingRun

if TYPE_CHECKING:
    from torch import nn

    from experiments.harness.data import Blocks
    from experiments.harness.evaluation import HeldOutLoss
    from forge.presets import Preset


@dataclass(frozen=True)
class CausalLMRun(TrainingRun):
    """Model, data and recipe of one training run."""

    model: str = "smollm2-135m"
    """Embedded model (smollm2-135m, tiny-random), local folder, or hub id."""
    dataset: str = "moby_dick"
    """Embedded corpus (moby_dick, state_of_the_union, movie_sentiment), local file, or hub id."""
    method: Literal["full", "lora", "qlora"] = "full"
    """What is trained: all weights, LoRA adapters, or LoRA adapters on an NF4 base."""
    batch_size: int = 4
    """Blocks per optimizer step."""
    sequence_length: int = 128
    """Tokens per block."""
    validation_blocks: int = 16
    """Blocks of each evaluation during training."""
    test_blocks: int = 96
    """Blocks of the final evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("validation_blocks", "test_blocks")
        if self.sequence_length < 2:
            raise UserError(
                f"sequence_length must be at least 2 (one token predicts the next), got {self.sequence_length}"
            )


@dataclass(frozen=True)
class Ingredients:
    """What a run trains and on what."""

    model: nn.Module
    train: Blocks
    validation: Blocks
    test: Blocks
    digests: dict[str, str]
    """SHA-256 of the initial ``model`` weights and fingerprint of the ``data``."""


def prepare(run: CausalLMRun, seed: int, preset: Preset | None = None) -> Ingredients:
    """Load and pack the data, set the seed, and only then build the model and its adapters.

    A ``preset`` prepares the model instead of the harness's preset for ``run.method``.
    """
    from transformers import set_seed

    from experiments.harness.data import load_corpus, pack
    from experiments.harness.models import load_causal_lm, load_tokenizer, weights_sha256

    corpus, tokenizer = load_corpus(run.dataset), load_tokenizer(run.model)
    blocks = {s: pack(corpus.split(s), tokenizer, run.sequence_length) for s in ("train", "validation", "test")}
    set_seed(seed)
    model = load_causal_lm(run.model, method=run.method, random_init=run.random_init, preset=preset)
    return Ingredients(
        model=model,
        train=blocks["train"],
        validation=blocks["validation"].spread(run.validation_blocks),
        test=blocks["test"].spread(run.test_blocks),
        digests={"model": weights_sha256(model), "data": corpus.fingerprint},
    )


def on_other_text(run: CausalLMRun, ingredients: Ingredients, dataset: str) -> Ingredients:
    """The same with the test split of another corpus, as many blocks of it, for what training does to other text."""
    from experiments.harness.data import load_corpus, pack
    from experiments.harness.models import load_tokenizer

    blocks = pack(load_corpus(dataset).split("test"), load_tokenizer(run.model), run.sequence_length)
    return dataclasses.replace(ingredients, test=blocks.spread(run.test_blocks))


def losses_on_test(
    run: CausalLMRun, ingredients: Ingredients, arms: Mapping[str, Callable[[], AbstractContextManager[None]]]
) -> tuple[dict[str, HeldOutLoss], float]:
    """Test loss of every arm, each under the context that puts its weights in place, and the seconds that it took."""
    from experiments.harness.evaluation import held_out_loss, over_arms
    from experiments.harness.training import autocast

    return over_arms(
        arms, partial(held_out_loss, ingredients.model, ingredients.test, run.batch_size, autocast(run.precision))
    )


def observe(
    into: Measurements, held_out: HeldOutLoss, metric: Metric, step: int, arm: str, **conditions: Scalar
) -> None:
    """Add an arm's test loss, and that of every document, under ``metric``; beside ``EVAL_LOSS`` its perplexity too.

    Args:
        into: gets the outcome, or the note that it diverged where the loss is not finite.
        held_out: of the arm.
        metric: the name under which the loss goes (nats/token).
        step: optimizer steps that were taken.
        arm: its name.
        **conditions: further fields of the observation.
    """
    if not math.isfinite(held_out.loss):
        into.diverged = f"the {metric.name} of arm {arm} is {held_out.loss}"
        return
    into.observations.append(Observation.of(metric, held_out.loss, step, split="test", arm=arm, **conditions))
    if metric == EVAL_LOSS:
        perplexity = math.exp(held_out.loss)
        into.observations.append(Observation.of(PERPLEXITY, perplexity, step, split="test", arm=arm, **conditions))
    for document, nll, tokens in zip(held_out.document_ids, held_out.nll, held_out.tokens, strict=True):
        into.examples.append(
            ExampleOutcome(example=document, arm=arm, metric=metric.name, value=nll / tokens, tokens=tokens)
        )


def observe_domains(
    into: Measurements,
    run: CausalLMRun,
    ingredients: Ingredients,
    elsewhere: str,
    step: int,
    arm: str,
    **at: Scalar,
) -> float:
    """Add an arm's test loss on the domain that is trained on, and on another one; returns the seconds that it took.

    Args:
        into: gets the outcomes.
        run: the recipe.
        ingredients: of the run, with the model as it is.
        elsewhere: the other corpus, whose loss goes under ``OTHER_LOSS``.
        step: optimizer steps that were taken.
        arm: its name.
        **at: further fields of the observations.
    """
    total_sec = 0.0
    for metric, part in ((EVAL_LOSS, ingredients), (OTHER_LOSS, on_other_text(run, ingredients, elsewhere))):
        losses, seconds = losses_on_test(run, part, {arm: nullcontext})
        observe(into, losses[arm], metric, step, arm, **at)
        total_sec += seconds
    return total_sec
