"""Tiny models of the four shapes, a batch for each, and a Trainer on a handful of rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from forge.adapters import HoulsbyConfig, WeightLoraConfig, add_houlsby_adapters, get_weight_lora_model
from tests.forge.tensors import same, weights_of

VOCAB = 100


def _add_houlsby(model, name="default", size=4):
    return add_houlsby_adapters(model, HoulsbyConfig(bottleneck=size), name)


def _add_weight_lora(model, name="default", size=4):
    return get_weight_lora_model(model, WeightLoraConfig(r=size, target_modules="all-linear"), name)


METHODS = {"houlsby": _add_houlsby, "weight_lora": _add_weight_lora}
"""Method → what adds one of its adapters to a model."""


def _build(shape, width):
    if shape == "llama":
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes))
    if shape == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(vocab_size=VOCAB, n_embd=width, n_layer=2, n_head=4, n_positions=64, **dropout)
        return GPT2LMHeadModel(config)
    if shape == "bert":
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_labels": 2}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForSequenceClassification(
            BertConfig(vocab_size=VOCAB, num_attention_heads=4, max_position_embeddings=64, **sizes, **dropout)
        )
    sizes = {"d_model": width, "d_ff": 2 * width, "num_layers": 2}
    config = T5Config(vocab_size=VOCAB, num_heads=4, d_kv=8, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    return T5ForConditionalGeneration(config)


def tiny(shape="llama", *, seed=0, width=32):
    """A random model of a shape in evaluation mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return _build(shape, width).eval()


def batch(shape="llama", rows=2):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (rows, 8), generator=generator)
    labels = torch.arange(rows) % 2 if shape == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def logits(model, shape="llama"):
    with torch.no_grad():
        return model.eval()(**batch(shape)).logits


def train(model, shape="llama", steps=3, learning_rate=1e-2):
    """A few AdamW steps on one batch; returns the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch(shape)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def base_is_untouched(peft_model, before):
    """Whether the base weights under a PEFT model are bitwise those copied before it was wrapped."""
    now = {
        name.replace(".base_layer", "").replace(".original_module", ""): p
        for name, p in peft_model.get_base_model().named_parameters()
    }
    return all(torch.equal(now[name], weight) for name, weight in before.items())


def adapter_weights(peft_model):
    return {n: p.detach().clone() for n, p in peft_model.named_parameters() if "houlsby_" in n or "wlora_" in n}


def trainer(model, folder, *callbacks, **options):
    rows = [{k: v[i] for k, v in batch(rows=32).items()} for i in range(32)]
    saving = {"save_strategy": "steps"} if "save_steps" in options else {"save_strategy": "no"}
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **saving, **options}
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options)
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))


@pytest.fixture(scope="session")
def kit():
    return SimpleNamespace(
        tiny=tiny,
        batch=batch,
        logits=logits,
        train=train,
        base_weights=weights_of,
        base_is_untouched=base_is_untouched,
        adapter_weights=adapter_weights,
        same=same,
        trainer=trainer,
        shapes=("llama", "gpt2", "bert", "t5"),
    )


@pytest.fixture(params=["llama", "gpt2", "bert", "t5"])
def shape(request):
    return request.param


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]
