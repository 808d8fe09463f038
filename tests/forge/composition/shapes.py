"""The four shapes of model of the matrix: tiny, random, saved once and loaded as users load theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, LENGTH, EXAMPLES, CLASSES = 96, 10, 12, 3


@dataclass(frozen=True)
class Shape:
    """A family of models, small enough to train in a fraction of a second and wide enough for NF4 blocks of 64."""

    model: type[PreTrainedModel]
    config: type[PretrainedConfig]
    sizes: Mapping[str, Any]
    dropouts: tuple[str, ...]
    """Fields of the config that are probabilities of dropout."""
    lower_half: str
    """What matches the name of a parameter in the lower half of the layers, or of the embeddings below them."""


SHAPES = {
    "llama": Shape(
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        ("attention_dropout",),
        r"\bmodel\.(layers\.0|embed_tokens)\.",
    ),
    "gpt2": Shape(
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 16, "loss_type": "ForCausalLM"},
        ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        r"\btransformer\.(h\.0|wte|wpe)\.",
    ),
    "bert": Shape(
        BertForSequenceClassification,
        BertConfig,
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "num_labels": CLASSES,
        },
        ("attention_probs_dropout_prob", "hidden_dropout_prob"),
        r"\bbert\.(encoder\.layer\.0|embeddings)\.",
    ),
    "t5": Shape(
        T5ForConditionalGeneration,
        T5Config,
        {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0},
        ("dropout_rate",),
        r"\b(encoder\.block|shared)\.",
    ),
}


def save_models(folder: Path) -> None:
    """Write one model of each shape; biases and norms are random too, so that a change of any weight is seen."""
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        model = shape.model(shape.config(vocab_size=VOCABULARY, **shape.sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        model.save_pretrained(folder / name)


def load_model(folder: Path, shape: str, dropout: float, **options: Any) -> PreTrainedModel:
    """The saved model of a shape; options are those of ``from_pretrained``."""
    fields = dict.fromkeys(SHAPES[shape].dropouts, dropout)
    model: PreTrainedModel = SHAPES[shape].model.from_pretrained(folder / shape, **fields, **options)
    return model


def lower_half(shape: str, names: Iterable[str]) -> set[str]:
    """Those of the names that are of parameters in the lower half of the layers, or of the embeddings below them."""
    return {name for name in names if re.search(SHAPES[shape].lower_half, name)}


def examples(shape: str) -> list[dict[str, Tensor]]:
    """Rows of different numbers of tokens, so that a mean over micro-batches is not the mean over tokens."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(EXAMPLES):
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=random)
        tokens = int(torch.randint(4, LENGTH + 1, (1,), generator=random))
        labels = ids.clone()
        labels[tokens:] = -100
        row = {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}
        if shape == "bert":
            row["labels"] = ids[0] % CLASSES
        rows.append(row)
    return rows
