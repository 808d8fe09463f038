"""Where bottleneck adapters go, in families whose modules have nothing in common but their order."""

from __future__ import annotations

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from forge.adapters import find_sublayer_outputs
from forge.adapters.placement import linear_shape
from forge.layers import NoLayersError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}

PARTS = {"layers": 2, "ffn_dim": 64, "attention_heads": 4}
SMALL = {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}

FAMILIES = {
    "LlamaModel": (SIZES, ["self_attn.o_proj", "mlp.down_proj"]),
    "MistralModel": ({**SIZES, "num_key_value_heads": 2}, ["self_attn.o_proj", "mlp.down_proj"]),
    "Qwen3Model": ({**SIZES, "num_key_value_heads": 2, "head_dim": 8}, ["self_attn.o_proj", "mlp.down_proj"]),
    "Phi3Model": (SIZES, ["self_attn.o_proj", "mlp.down_proj"]),
    "Gemma2Model": ({**SIZES, "num_key_value_heads": 2, "head_dim": 8}, ["self_attn.o_proj", "mlp.down_proj"]),
    "PhiModel": (SIZES, ["self_attn.dense", "mlp.fc2"]),
    "GPTJModel": (
        {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        ["attn.out_proj", "mlp.fc_out"],
    ),
    "BloomModel": (SMALL, ["self_attention.dense", "mlp.dense_4h_to_h"]),
    "FalconModel": (SIZES, ["self_attention.dense", "mlp.dense_4h_to_h"]),
    "MptModel": ({"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4}, ["attn.out_proj", "ffn.down_proj"]),
    "RobertaModel": (SIZES, ["attention.output.dense", "output.dense"]),
    "AlbertModel": ({**SIZES, "num_hidden_groups": 2}, ["attention.dense", "ffn_output"]),
    "DebertaV2Model": (SIZES, ["attention.output.dense", "output.dense"]),
    "ViTModel": (
        {k: v for k, v in SIZES.items() if k not in ("vocab_size", "pad_token_id")},
        ["attention.o_proj", "mlp.fc2"],
    ),
    "GPTNeoXModel": (SIZES, ["attention.dense", "mlp.dense_4h_to_h"]),
    "GPT2Model": ({"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}, ["attn.c_proj", "mlp.c_proj"]),
    "OPTModel": ({**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}, ["self_attn.out_proj", "fc2"]),
    "BertModel": (SIZES, ["attention.output.dense", "output.dense"]),
    "DistilBertModel": (
        {"vocab_size": 100, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        ["attention.out_lin", "ffn.lin2"],
    ),
    "ModernBertModel": (SIZES, ["attn.Wo", "mlp.Wo"]),
}


def build(name, options):
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_two_outputs_a_layer(name):
    options, expected = FAMILIES[name]
    found = find_sublayer_outputs(build(name, options))
    assert len(found) == 4
    assert all(path.endswith(end) for path, end in zip(found, expected * 2, strict=True))


@pytest.mark.parametrize("name", ["BartModel", "WhisperModel"])
def test_other_encoder_decoders_have_three_in_the_decoder_too(name):
    layers = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in PARTS.items()}
    found = find_sublayer_outputs(build(name, {"vocab_size": 100, "d_model": 32, "pad_token_id": 0, **layers}))
    ends = [path.split("layers.0.")[1] for path in found if "decoder.layers.0." in path]
    assert ends == ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"]
    assert len(found) == 10


def test_t5_has_two_in_the_encoder_and_three_in_the_decoder(kit):
    found = find_sublayer_outputs(kit.tiny("t5"))
    assert len([path for path in found if path.startswith("encoder.")]) == 4
    decoder = [path.rpartition(".")[2] for path in found if path.startswith("decoder.block.0.")]
    assert decoder == ["o", "o", "wo"]


def test_a_wrapped_model_has_the_same_places(kit, shape):
    plain = find_sublayer_outputs(kit.tiny(shape))
    wrapped = get_peft_model(kit.tiny(shape), LoraConfig(target_modules=plain))
    assert find_sublayer_outputs(wrapped.get_base_model()) == plain


def test_linear_shape_sees_every_kind_of_linear_map(kit):
    assert linear_shape(nn.Linear(3, 5)) == (3, 5)
    assert linear_shape(kit.tiny("gpt2").transformer.h[0].attn.c_attn) == (32, 96)
    assert linear_shape(nn.LayerNorm(3)) is None


def test_a_model_without_layers_is_told_how_to_name_modules():
    with pytest.raises(NoLayersError, match=r"target_modules=\[\.\.\.\]"):
        find_sublayer_outputs(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("kind", ["mamba", "mixtral", "torch"])
def test_layers_without_such_projections_are_refused_with_what_they_have(kind):
    if kind == "mamba":
        model = build("MambaModel", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2})
        part, has = "attention", "mixer.out_proj"
    elif kind == "mixtral":
        model = build("MixtralModel", {**SIZES, "num_key_value_heads": 2, "num_local_experts": 2})
        part, has = "feed-forward", "self_attn.o_proj"
    else:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2, enable_nested_tensor=False)
        part, has = "attention", "linear2"
    with pytest.raises(ValueError, match=rf"none for the {part} part of .*{has}.*target_modules=\[\.\.\.\]"):
        find_sublayer_outputs(model)
