"""The stack of layers: every family of transformers, wrappers, and what is refused."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from forge.layers import NoLayersError, find_layers, layer_of

CAUSAL, MASKED, SEQ2SEQ = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
NAMES = {
    CAUSAL: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MASKED: MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    SEQ2SEQ: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
SPREAD = {"flaubert", "xlm"}
"""Attention and feed-forward parts of a layer lie in lists of their own."""
FIXES: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 16},
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}
"""What a default configuration lacks for a model to be built of it."""


def build(auto: Any, name: str, **options: Any) -> nn.Module:
    """A model without storage, of the default configuration with some values replaced."""
    with torch.device("meta"):
        return auto.from_config(CONFIG_MAPPING[name](**options))


def stacks(model: nn.Module) -> dict[str, int]:
    """Stack → number of layers, from the bottom."""
    counts: dict[str, int] = {}
    for layer in find_layers(model):
        assert layer.index == counts.get(layer.stack, 0)
        assert layer.name == f"{layer.stack}.{layer.index}"
        assert model.get_submodule(layer.name) is layer.module
        counts[layer.stack] = layer.index + 1
    return counts


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


@pytest.mark.parametrize(
    ("auto", "name", "expected"),
    [
        (CAUSAL, "llama", {"model.layers": 32}),
        (CAUSAL, "mistral", {"model.layers": 32}),
        (CAUSAL, "qwen3", {"model.layers": 32}),
        (CAUSAL, "gpt2", {"transformer.h": 12}),
        (CAUSAL, "gpt_neox", {"gpt_neox.layers": 44}),
        (CAUSAL, "opt", {"model.decoder.layers": 12}),
        (CAUSAL, "falcon", {"transformer.h": 32}),
        (CAUSAL, "mixtral", {"model.layers": 32}),
        (CAUSAL, "mamba", {"backbone.layers": 32}),
        (CAUSAL, "rwkv", {"rwkv.blocks": 32}),
        (CAUSAL, "xlnet", {"transformer.layer": 24}),
        (MASKED, "bert", {"bert.encoder.layer": 12}),
        (MASKED, "roberta", {"roberta.encoder.layer": 12}),
        (MASKED, "electra", {"electra.encoder.layer": 12}),
        (MASKED, "distilbert", {"distilbert.transformer.layer": 6}),
        (MASKED, "deberta-v2", {"deberta.encoder.layer": 24}),
        (SEQ2SEQ, "t5", {"encoder.block": 6, "decoder.block": 6}),
        (SEQ2SEQ, "bart", {"model.encoder.layers": 12, "model.decoder.layers": 12}),
        (SEQ2SEQ, "encoder-decoder", {"encoder.encoder.layer": 12, "decoder.bert.encoder.layer": 12}),
    ],
)
def test_families_that_repeat_one_kind_of_block(auto: Any, name: str, expected: dict[str, int]) -> None:
    assert stacks(build(auto, name)) == expected


@pytest.mark.parametrize(
    ("name", "kinds", "count"), [("jamba", 2, 32), ("zamba2", 2, 54), ("mllama", 2, 40), ("olmo_hybrid", 2, 32)]
)
def test_blocks_of_several_kinds_are_one_stack(name: str, kinds: int, count: int) -> None:
    model = build(CAUSAL, name)
    assert stacks(model) == {"model.layers": count}
    assert len({type(layer.module) for layer in find_layers(model)}) == kinds


def test_layers_shared_by_albert_count_once() -> None:
    assert stacks(build(MASKED, "albert")) == {"albert.encoder.albert_layer_groups": 1}


def test_lists_of_lists_are_followed_to_the_blocks() -> None:
    expected = {f"funnel.encoder.blocks.{i}": 4 for i in range(3)} | {"funnel.decoder.layers": 2}
    assert stacks(build(MASKED, "funnel")) == expected


@pytest.mark.parametrize(
    ("auto", "name", "expected"),
    [
        (SEQ2SEQ, "blenderbot", ["model.encoder.layers", "model.decoder.layers"]),  # registered the other way round
        (CAUSAL, "gemma3", ["model.vision_tower.encoder.layers", "model.language_model.layers"]),
        (
            SEQ2SEQ,
            "t5gemma2",
            ["model.encoder.vision_tower.encoder.layers", "model.encoder.text_model.layers", "model.decoder.layers"],
        ),
    ],
)
def test_stacks_come_in_forward_order(auto: Any, name: str, expected: list[str]) -> None:
    assert list(stacks(build(auto, name))) == expected


@pytest.mark.parametrize("name", sorted(SPREAD))
def test_layers_spread_over_lists_are_refused(name: str) -> None:
    with pytest.raises(NoLayersError, match=r"each layer must be one module, got .* transformer.attentions and "):
        find_layers(build(MASKED, name))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])])
def test_a_model_without_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(NoLayersError, match=r"must have a stack of layers .* got .*; choose parameters by name"):
        find_layers(model)


def test_projections_embeddings_and_empty_lists_are_no_layers() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.ModuleDict(
        {
            "embeddings": nn.ModuleList([nn.Embedding(3, 2), nn.Embedding(4, 2)]),
            "none": nn.ModuleList(),
            "blocks": nn.ModuleList([block, nn.Sequential(nn.ModuleList([block, block]))]),
        }
    )
    assert stacks(model) == {"blocks": 2}


def test_wrapped_models_keep_their_layers() -> None:
    count = len(find_layers(tiny_llama()))
    wrappers = {
        "base_model.model.model.layers": lambda m: get_peft_model(m, LoraConfig(target_modules=["q_proj"])),
        "base_model.model.layers": lambda m: get_peft_model(
            m, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
        ),
        "_orig_mod.model.layers": torch.compile,
        "module.model.layers": nn.DataParallel,
    }
    for stack, wrap in wrappers.items():
        assert stacks(wrap(tiny_llama())) == {stack: count}


def test_layer_of_tells_layers_1_and_11_apart() -> None:
    layers = find_layers(build(CAUSAL, "gpt2"))
    for name, index in {"transformer.h.1.ln_1.weight": 1, "transformer.h.11.ln_1.weight": 11}.items():
        layer = layer_of(name, layers)
        assert layer is not None and layer.index == index
    assert layer_of("transformer.wte.weight", layers) is None


@pytest.mark.slow
def test_every_family_has_layers() -> None:
    """All that can be built of a default configuration; the rest, which fails in transformers itself, stays small."""
    unbuilt, found = [], []
    for auto, name in chain.from_iterable([(auto, name) for name in names] for auto, names in NAMES.items()):
        try:
            model = build(auto, name, **FIXES.get(name, {}))
        except Exception as error:  # noqa: BLE001 (whatever transformers raises for a configuration of its own)
            unbuilt.append(f"{name}: {error!r}")
            continue
        if name in SPREAD:
            with pytest.raises(NoLayersError):
                find_layers(model)
            continue
        layers = find_layers(model)
        expected = getattr(model.config, "num_hidden_layers", None)
        found.append(name)
        if len({layer.stack for layer in layers}) == 1 and name not in {"albert", "longcat_flash"}:
            assert len(layers) in (expected, getattr(model.config, "decoder_layers", None)) or not expected, name
    assert len(found) > 250
    assert len(unbuilt) < 15, unbuilt
