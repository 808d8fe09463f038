"""Tiny models of random weights, and real runs of the Trainer whose memory is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from forge.freezing import setup_lp_lora_style
from forge.memory import MeasuredMemory, MeasureMemory
from forge.presets import get_preset
from forge.presets.quantisation import prepare_quantised

BATCH, TOKENS, VOCABULARY = 2, 64, 300
_SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}


def llama_config(**options: Any) -> LlamaConfig:
    own = {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "use_cache": False, "pad_token_id": 0}
    return LlamaConfig(**(_SIZES | own | options))


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(**options))


def with_idle_part() -> LlamaForCausalLM:
    """Some of its parameters train, and never get a gradient."""
    model = llama()
    model.idle = nn.Linear(64, 64)
    return model


def llama_classifier(**options: Any) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(llama_config(num_labels=2, **options))


def bert_config(dropout: float = 0.0) -> BertConfig:
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertConfig(**_SIZES, **drops, vocab_size=VOCABULARY, num_labels=2)


def bert_classifier(dropout: float = 0.0) -> BertForSequenceClassification:
    return BertForSequenceClassification(bert_config(dropout))


def bert_masked(dropout: float = 0.0) -> BertForMaskedLM:
    return BertForMaskedLM(bert_config(dropout))


def gpt2(dropout: float = 0.0, attention: str = "sdpa") -> GPT2LMHeadModel:
    drops = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, attn_implementation=attention, use_cache=False))


def t5(dropout: float = 0.0) -> T5ForConditionalGeneration:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(
        T5Config(**sizes, dropout_rate=dropout, use_cache=False, decoder_start_token_id=0)
    )


def half_frozen(model: Any) -> Any:
    setup_lp_lora_style(model, freeze_ratio=0.5)
    return model


def lora(model: Any, dropout: float = 0.0, targets: Any = ("q_proj", "v_proj"), **options: Any) -> Any:
    targets = targets if isinstance(targets, str) else list(targets)
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets, lora_dropout=dropout, **options))


def with_prompts(preset: str, model: Any) -> Any:
    """Prompt learning with few positions."""
    torch.manual_seed(0)
    return get_preset(preset, num_virtual_tokens=5).prepare(model)


def qlora(folder: Path, *, double: bool = True, kind: Any = LlamaForCausalLM) -> Any:
    """NF4 weights from a saved model, with LoRA on every linear map."""
    kind(llama_config(num_labels=2)).save_pretrained(folder)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = prepare_quantised(kind.from_pretrained(folder, quantization_config=quantisation))
    return lora(model, targets="all-linear")


def rows(model: Any, padding: bool) -> list[dict[str, Tensor]]:
    """Sequences of one length with labels for the head of the model; half of the tokens of each padded, or none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.randint(1, VOCABULARY, (64, TOKENS), generator=torch.Generator().manual_seed(0))
    made = [{"input_ids": row, "labels": row} for row in ids]
    if type(base).__name__.endswith("ForSequenceClassification"):
        made = [row | {"labels": torch.tensor(index % 2)} for index, row in enumerate(made)]
    if padding:
        mask = (torch.arange(TOKENS) < TOKENS // 2).long()
        made = [row | {"attention_mask": mask} for row in made]
    return made


def measured(model: Any, folder: Path, *, padding: bool = False, step: int = 2, **arguments: Any) -> MeasuredMemory:
    """Memory of one step of a real run of three."""
    options: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": BATCH, "use_cpu": True} | arguments
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    measure = MeasureMemory(step)
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder / "run"), **(options | quiet)),
        train_dataset=rows(model, padding),
        data_collator=default_data_collator,
        callbacks=[measure],
    )
    trainer.train()
    assert measure.measured is not None
    return measure.measured


def architectures(config: PreTrainedConfig, kind: Any) -> PreTrainedConfig:
    """The config as a saved model of that class has it."""
    config.architectures = [kind.__name__]
    return config
