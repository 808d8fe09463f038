"""Tiny random models of many families, and texts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

VOCAB = 120
_SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE, **_SPECIAL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZE, **_SPECIAL, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **_SPECIAL
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**_SIZE, **_NO_DROPOUT)),
    "bert-classifier": lambda: BertForSequenceClassification(BertConfig(**_SIZE, **_NO_DROPOUT)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            dropout=0.0,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            word_embed_proj_dim=32,
        )
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **_SPECIAL)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZE)),
}


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
