"""The table of a model's blocks (section «Training Monitor» of THEORY.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from forge.monitor import model_blocks, print_model_info
from tests.forge.monitor_process import make_model


def printed(model: nn.Module, **options: Any) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        print_model_info(model, console=console, **options)
    return capture.get()


@pytest.mark.parametrize("breakdown", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_are_a_partition_with_tied_weights_once(tied: bool, breakdown: bool) -> None:
    network = make_model(tie_word_embeddings=tied)
    blocks = [block for block in model_blocks(network, breakdown=breakdown) if block.depth == 0]
    assert sum(block.parameters for block in blocks) == sum(p.numel() for p in network.parameters())
    assert sum(block.stored_bytes for block in blocks) == sum(p.numel() * 4 for p in network.parameters())
    names = [block.name for block in blocks]
    stack = "model.layers.0–2 (3 layers)" if breakdown else "model.layers (3 layers)"
    assert names == ["Embeddings", stack, "Other", *([] if tied else ["Head"])]


@pytest.mark.parametrize(("frozen", "half"), [(True, True), (True, False), (False, True)])
def test_breakdown_splits_where_layers_differ_and_adds_up(frozen: bool, half: bool) -> None:
    network = make_model()
    network.model.layers[0].requires_grad_(not frozen)
    network.model.layers[0].to(torch.bfloat16 if half else torch.float32)
    blocks = model_blocks(network, breakdown=True)
    first, rest = (block for block in blocks if block.name.startswith("model.layers"))
    assert (first.name, first.trainable) == ("model.layers.0", 0 if frozen else first.parameters)
    assert first.dtypes == ("bfloat16" if half else "float32",)
    assert (rest.name, rest.trainable, rest.dtypes) == ("model.layers.1–2 (2 layers)", rest.parameters, ("float32",))
    parts = blocks[blocks.index(rest) + 1 :][:4]
    assert [part.name for part in parts] == ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
    assert sum(part.parameters for part in parts) == rest.parameters
    text = printed(network, show_breakdown=True)
    assert "self_attn" in text and ("bfloat16" in text) == half
    assert f"{sum(p.numel() for p in network.parameters()):,}" in text
    assert "self_attn" not in printed(network)


def test_bytes_are_printed_in_powers_of_1000() -> None:
    assert "1,000,000 100.00% 4 MB float32" in " ".join(printed(nn.Linear(1000, 1000, bias=False)).split())


def test_adapters_are_a_block_of_their_own() -> None:
    network = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    blocks = {block.name: block for block in model_blocks(network)}
    adapters = blocks.pop("Adapters")
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert adapters.parameters == adapters.trainable == trainable
    assert not any(block.trainable for block in blocks.values())
    assert "model.layers (3 layers)" in blocks


def test_quantised_weights_by_real_number_and_bytes(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    network = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=nf4)
    [stack] = [block for block in model_blocks(network) if block.name.startswith("model.layers")]
    linear = [m for m in network.model.layers.modules() if isinstance(m, nn.Linear)]
    assert stack.parameters == sum(m.in_features * m.out_features for m in linear) + 6 * 32
    packed = sum(m.in_features * m.out_features // 2 for m in linear)
    assert stack.stored_bytes > packed + 6 * 32 * 4  # with the quantisation state
    assert stack.dtypes == ("nf4", "float32")


def test_encoder_decoder_and_models_without_layers() -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=50)
    names = [block.name for block in model_blocks(T5ForConditionalGeneration(config))]
    assert names[:3] == ["Embeddings", "encoder.block (2 layers)", "decoder.block (2 layers)"]
    [block] = model_blocks(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert (block.name, block.parameters) == ("Other", 16)
    assert "Total" in printed(nn.ReLU())


def test_model_info_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        print_model_info("gpt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="show_breakdown must be True or False, got 1"):
        print_model_info(make_model(), show_breakdown=1)  # type: ignore[arg-type]
