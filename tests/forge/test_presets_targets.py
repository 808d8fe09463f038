"""LoRA targets: found in any architecture, and refused where they match nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from forge import get_preset
from forge.targets import resolve_target_modules
from tests.forge.presets_models import FAMILIES, make_examples, make_model

ATTENTION_OF = {
    "llama": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "mistral": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "gpt2": ["attn.c_proj", "c_attn"],
    "bert": ["attention.output.dense", "key", "query", "value"],
    "bert-classifier": ["attention.output.dense", "key", "query", "value"],
    "t5": ["k", "o", "q", "v"],
    "bart": ["k_proj", "out_proj", "q_proj", "v_proj"],
    "opt": ["k_proj", "out_proj", "q_proj", "v_proj"],
    "falcon": ["dense", "query_key_value"],
    "bloom": ["dense", "query_key_value"],
    "gpt-neox": ["dense", "query_key_value"],
}


def adapted(model: nn.Module) -> set[str]:
    """Dotted paths of the modules that carry LoRA, as they were in the base model."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in model.named_modules()
        if name.endswith("lora_A.default")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_projections_are_found(family: str) -> None:
    model = make_model(family)
    assert resolve_target_modules(model) == ATTENTION_OF[family]
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(s in name.lower() for s in ("attn.", "attention."))
    }
    assert adapted(get_peft_model(model, get_preset("lora").get_lora_config(model))) == expected != set()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_model_the_same_modules_are_adapted(family: str) -> None:
    """``get_peft_model(model, preset.get_lora_config())`` of seed 001, on every family."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it sets fan_in_fan_out for GPT-2
        blind = get_peft_model(make_model(family), get_preset("qlora", target_modules="attention").get_lora_config())
    model = make_model(family)
    seeing = get_peft_model(model, get_preset("lora").get_lora_config(model))
    assert adapted(blind) == adapted(seeing)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier", "t5"])
def test_all_linear_adapts_feed_forward_too_and_no_head(family: str) -> None:
    model = get_preset("lora-all-linear").prepare(make_model(family))
    found = adapted(model)
    assert any("mlp" in n or "intermediate" in n or "DenseReluDense" in n for n in found)
    assert not any("lm_head" in n or "classifier" in n for n in found)


def test_a_new_classifier_trains_with_the_adapters() -> None:
    model = get_preset("lora").prepare(make_model("bert-classifier"))
    assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)


def test_no_warning_and_no_change_at_the_start_for_gpt2() -> None:
    base = make_model("gpt2").eval()
    batch = {k: v[None] for k, v in make_examples("gpt2")[0].items()}
    before = base(**batch).loss
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_preset("lora").prepare(base).eval()
    assert torch.equal(model(**batch).loss, before)
    assert model.peft_config["default"].fan_in_fan_out is True


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], r".*layers\.1\..*\.(q|v)_proj", ["model.layers.0.mlp.up_proj"]]
)
def test_named_targets_are_kept(targets: list[str] | str) -> None:
    model = get_preset("lora", target_modules=targets).prepare(make_model("llama"))
    assert isinstance(model, PeftModel)
    assert adapted(model) and len(adapted(model)) == {2: 4, 1: 1}.get(len(targets), 2)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_prj"], r"got 'v_prj', which matches none; near misses: v_proj"),
        (["c_attn"], r"got 'c_attn', which matches none; near misses: "),
        (".*attnn.*", r"got '\.\*attnn\.\*', which as a regular expression for whole names matches none"),
        ("q_proj", r"got 'q_proj', which as a regular expression for whole names matches none; near misses: q_proj"),
    ],
)
def test_targets_that_match_nothing(targets: list[str] | str, message: str) -> None:
    """PEFT would be content with ["q_proj", "v_prj"], and adapt the queries alone."""
    model = make_model("llama")
    names = [n for n, _ in model.named_modules()]
    for name in ("lora", "adalora", "weightlora"):
        needed = {"total_step": 10} if name == "adalora" else {}
        with pytest.raises(ValueError, match=f"target_modules must match modules of the model, {message}"):
            get_preset(name, target_modules=targets, **needed).prepare(model)
    assert [n for n, _ in model.named_modules()] == names


def test_a_model_without_attention() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))
    with pytest.raises(
        ValueError, match=r"linear maps inside modules named .*got none in Sequential; use 'all-linear'"
    ):
        resolve_target_modules(model)
