"""Predicted peaks against the CPU allocator's in real runs of the Trainer («Memory Estimation» of THEORY.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from forge.memory import MemoryReport, profile_training_memory
from tests.forge.memory.training import (
    BATCH,
    TOKENS,
    bert_classifier,
    bert_masked,
    gpt2,
    half_frozen,
    llama,
    llama_classifier,
    lora,
    measured,
    qlora,
    t5,
    with_idle_part,
    with_prompts,
)

TOLERANCE = 0.01
"""Of the real peak; most cases are exact to the byte."""

BF16 = {"autocast": torch.bfloat16}
CHECKPOINTED = {"gradient_checkpointing": True}


@dataclass(frozen=True)
class Case:
    """One model and one way to train it."""

    build: Callable[[Path], Any]
    options: dict[str, Any] = field(default_factory=dict)
    """Of ``profile_training_memory``; the real run has the same."""


def plain(build: Callable[[], Any], **options: Any) -> Case:
    return Case(lambda _: build(), options)


CASES = {
    "full": plain(llama),
    "full, bf16": plain(lambda: llama().bfloat16()),
    "full, autocast, AdamW in a loop": plain(llama, optimizer="adamw_torch", **BF16),
    "full, tied": plain(lambda: llama(tie_word_embeddings=True)),
    "full, tied, large embedding, autocast": plain(
        lambda: llama(tie_word_embeddings=True, vocab_size=5000, hidden_size=256), **BF16
    ),
    "full, large vocabulary, bf16, autocast": plain(lambda: llama(vocab_size=5000).bfloat16(), **BF16),
    "full, checkpointed": plain(llama, **CHECKPOINTED),
    "full, checkpointed, autocast": plain(llama, **CHECKPOINTED, **BF16),
    "full, accumulated": plain(llama, gradient_accumulation_steps=3),
    "full, checkpointed, accumulated, autocast": plain(llama, gradient_accumulation_steps=2, **CHECKPOINTED, **BF16),
    "full, a part takes no part, accumulated": plain(with_idle_part, gradient_accumulation_steps=2),
    "full, eager": plain(lambda: llama(attn_implementation="eager")),
    "full, padding": plain(llama, padding=True),
    "full, padding, eager, autocast": plain(lambda: llama(attn_implementation="eager"), padding=True, **BF16),
    "full, sgd": plain(llama, optimizer="sgd"),
    "full, adafactor": plain(llama, optimizer="adafactor"),
    "full, adagrad": plain(llama, optimizer="adagrad"),
    "full, 8-bit AdamW": plain(lambda: llama(vocab_size=600), optimizer="adamw_8bit"),
    "full, unclipped": plain(llama, max_grad_norm=0.0),
    "half frozen": plain(lambda: half_frozen(llama())),
    "half frozen, checkpointed": plain(lambda: half_frozen(llama()), **CHECKPOINTED),
    "LoRA": plain(lambda: lora(llama())),
    "LoRA, autocast": plain(lambda: lora(llama()), **BF16),
    "LoRA fp32 on bf16": plain(lambda: lora(llama().bfloat16(), dropout=0.1, targets="all-linear")),
    "LoRA, checkpointed": plain(lambda: lora(llama()), **CHECKPOINTED),
    "LoRA, half frozen": plain(lambda: half_frozen(lora(llama()))),
    "QLoRA": Case(qlora),
    "QLoRA, single quantisation": Case(lambda folder: qlora(folder, double=False)),
    "QLoRA, checkpointed, accumulated, autocast": Case(
        qlora, {"gradient_accumulation_steps": 2, **CHECKPOINTED, **BF16}
    ),
    "prompt tuning": plain(lambda: with_prompts("prompt-tuning", llama())),
    "P-tuning, classifier": plain(lambda: with_prompts("p-tuning", llama_classifier())),
    "P-tuning v2, BERT classifier": plain(lambda: with_prompts("p-tuning-v2", bert_classifier())),
    "prefix tuning, autocast": plain(lambda: with_prompts("prefix-tuning", llama()), **BF16),
    "classifier": plain(llama_classifier),
    "classifier, padding, autocast": plain(llama_classifier, padding=True, **BF16),
    "classifier, LoRA": plain(lambda: lora(llama_classifier(), task_type="SEQ_CLS")),
    "BERT classifier": plain(bert_classifier),
    "BERT classifier, dropout, padding": plain(lambda: bert_classifier(0.1), padding=True),
    "BERT classifier, half frozen, accumulated": plain(
        lambda: half_frozen(bert_classifier()), gradient_accumulation_steps=2
    ),
    "BERT masked, dropout, autocast": plain(lambda: bert_masked(0.1), **BF16),
    "GPT-2, eager, dropout, checkpointed": plain(lambda: gpt2(0.1, "eager"), **CHECKPOINTED),
    "T5, dropout": plain(lambda: t5(0.1)),
}


def test_tensors_in_containers_of_a_module_are_copied() -> None:
    """PEFT keeps learned prompts' tokens in a dict; others keep tensors in lists."""
    model = llama()
    without = predicted(model).peak_bytes
    model.kept = {"tokens": [torch.zeros(3)]}
    assert predicted(model).peak_bytes >= without
    assert model.kept["tokens"][0].shape == (3,), "the model itself is left as it is"


def real_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's names of the options."""
    options = dict(options)
    checkpointed = options.pop("gradient_checkpointing", False)
    arguments = {"bf16": "autocast" in options, "activation_checkpointing": checkpointed}
    options.pop("autocast", None)
    if "optimizer" in options:
        arguments["optim"] = options.pop("optimizer")
    return arguments | options


def predicted(model: Any, **options: Any) -> MemoryReport:
    return profile_training_memory(model, BATCH, TOKENS, **options)


@pytest.mark.parametrize("case", CASES)
def test_prediction_is_near_the_real_peak(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CASES[case].build(tmp_path)
    report = predicted(model, **CASES[case].options)
    real = measured(model, tmp_path, **real_arguments(CASES[case].options))
    assert report.peak_bytes == pytest.approx(real.peak_bytes, rel=TOLERANCE)
    assert report.parameters_bytes == real.parameters_bytes
    assert report.optimizer_bytes == real.optimizer_bytes
    assert sum(report.components.values()) == report.peak_bytes == max(report.phase_peaks.values())
