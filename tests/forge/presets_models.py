"""Tiny random models of many families, and texts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForSequenceClassification,
    BloomForCausalLM,
    FalconForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
    set_seed,
)

VOCAB = 120
_SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _of(model_class: Any, **options: Any) -> Callable[[], PreTrainedModel]:
    return lambda: model_class(model_class.config_class(**_SIZES | options))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _of(LlamaForCausalLM, intermediate_size=64, **_SPECIAL),
    "mistral": _of(MistralForCausalLM, intermediate_size=64, num_key_value_heads=2, **_SPECIAL),
    "gpt2": _of(GPT2LMHeadModel, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_SPECIAL),
    "bert": _of(BertForMaskedLM, intermediate_size=64, **_NO_DROPOUT),
    "bert-classifier": _of(BertForSequenceClassification, intermediate_size=64, **_NO_DROPOUT),
    "t5": _of(
        T5ForConditionalGeneration, num_decoder_layers=2, d_kv=8, d_ff=64, dropout_rate=0.0, decoder_start_token_id=0
    ),
    "bart": _of(
        BartForConditionalGeneration,
        num_hidden_layers=1,
        decoder_layers=1,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        dropout=0.0,
    ),
    "opt": _of(OPTForCausalLM, ffn_dim=64, word_embed_proj_dim=32),
    "falcon": _of(FalconForCausalLM, **_SPECIAL),
    "bloom": _of(BloomForCausalLM),
    "gpt-neox": _of(GPTNeoXForCausalLM, intermediate_size=64),
}
"""Family → what makes a model of it; a configuration takes the common names of sizes for its own."""


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A fresh model; the same weights for the same seed."""
    set_seed(seed)
    return FAMILIES[family]()


def make_examples(family: str, lengths: tuple[int, ...] = (2, 3, 5, 9), seed: int = 0) -> list[dict[str, Any]]:
    """One example a length: ten tokens, of which the first ``length`` have labels (one class label for classifiers)."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i, length in enumerate(lengths):
        tokens = torch.randint(3, VOCAB, (10,), generator=generator)
        labels = torch.where(torch.arange(10) < length, tokens, -100)
        examples.append(
            {
                "input_ids": tokens,
                "attention_mask": torch.ones_like(tokens),
                "labels": torch.tensor(i % 2) if family == "bert-classifier" else labels,
            }
        )
    return examples
