"""One run of training a causal language model: its settings, its ingredients, and the test loss of its arms.

Shared by every experiment on language modelling; an experiment adds its own fields by subclassing ``CausalLMRun``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from experiments.harness.experiment import UserError

if TYPE_CHECKING:
    from torch import nn

    from experiments.harness.data import Blocks
    from experiments.harness.evaluation import HeldOutLoss


@dataclass(frozen=True)
class CausalLMRun:
    """Model, data and recipe of one training run."""

    model: str = "smollm2-135m"
    """Embedded model (smollm2-135m, tiny-random), local folder, or hub id."""
    dataset: str = "moby_dick"
    """Embedded corpus (moby_dick, state_of_the_union, movie_sentiment), local file, or hub id."""
    method: Literal["full", "lora", "qlora"] = "full"
    """What is trained: all weights, LoRA adapters, or LoRA adapters on an NF4 base."""
    random_init: bool = False
    """Build the model from its config alone, with random weights."""
    batch_size: int = 4
    """Blocks per optimizer step."""
    sequence_length: int = 128
    """Tokens per block."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 is autocast over fp32 weights."""
    validation_blocks: int = 16
    """Blocks of each evaluation during training."""
    test_blocks: int = 96
    """Blocks of the final evaluation."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "validation_blocks", "test_blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise UserError(
                f"sequence_length must be at least 2 (one token predicts the next), got {self.sequence_length}"
            )
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio}")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay must be at least 0, got {self.weight_decay}")


@dataclass(frozen=True)
class Ingredients:
    """What a run trains and on what."""

    model: nn.Module
    train: Blocks
    validation: Blocks
    test: Blocks
    digests: dict[str, str]
    """SHA-256 of the initial ``model`` weights and fingerprint of the ``data``."""


def prepare(run: CausalLMRun, seed: int) -> Ingredients:
    """Load and pack the data, set the seed, and only then build the model and its adapters."""
    from transformers import set_seed

    from experiments.harness.data import load_corpus, pack
    from experiments.harness.models import load_causal_lm, load_tokenizer, weights_sha256

    corpus, tokenizer = load_corpus(run.dataset), load_tokenizer(run.model)
    blocks = {s: pack(corpus.split(s), tokenizer, run.sequence_length) for s in ("train", "validation", "test")}
    set_seed(seed)
    model = load_causal_lm(run.model, method=run.method, random_init=run.random_init)
    return Ingredients(
        model=model,
        train=blocks["train"],
        validation=blocks["validation"].spread(run.validation_blocks),
        test=blocks["test"].spread(run.test_blocks),
        digests={"model": weights_sha256(model), "data": corpus.fingerprint},
    )


def losses_on_test(
    run: CausalLMRun, ingredients: Ingredients, arms: Mapping[str, Callable[[], AbstractContextManager[None]]]
) -> tuple[dict[str, HeldOutLoss], float]:
    """Test loss of every arm, each under the context that puts its weights in place, and the seconds that it took."""
    from experiments.harness.evaluation import held_out_loss
    from experiments.harness.training import autocast

    began, losses = time.monotonic(), {}
    for arm, weights in arms.items():
        with weights():
            losses[arm] = held_out_loss(ingredients.model, ingredients.test, run.batch_size, autocast(run.precision))
    return losses, time.monotonic() - began
