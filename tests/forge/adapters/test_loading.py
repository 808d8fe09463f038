"""Loading what does not fit is refused before anything is changed; k-bit bases."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn

from forge.adapters import (
    HoulsbyConfig,
    WeightLoraConfig,
    add_houlsby_adapters,
    get_weight_lora_model,
    load_adapter,
)


@pytest.fixture
def saved(kit, method, tmp_path):
    model = method(kit.tiny())
    kit.train(model)
    model.save_pretrained(tmp_path)
    return tmp_path, kit.logits(model)


def test_load_adapter_onto_a_base_model(kit, saved):
    folder, expected = saved
    model = load_adapter(kit.tiny(), folder)
    assert torch.equal(kit.logits(model), expected)
    assert not any(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in load_adapter(kit.tiny(), folder, is_trainable=True).parameters())


def test_load_adapter_beside_another(kit, method, saved):
    folder, expected = saved
    model = method(kit.tiny())
    fresh = kit.logits(model)
    assert load_adapter(model, folder, "second") is model
    assert torch.equal(kit.logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(kit.logits(model), fresh)


def test_another_width_is_refused_before_the_base_is_wrapped(kit, saved):
    folder, _ = saved
    wide = kit.tiny(width=64)
    with pytest.raises(ValueError, match=r"got \[4, \d+\] for model\.layers\.0\..*, which is \[4, \d+\] here"):
        load_adapter(wide, folder)
    assert type(wide).__name__ == "LlamaForCausalLM" and not hasattr(wide, "peft_config")
    assert all(p.requires_grad for p in wide.parameters())
    assert not any("houlsby" in n or "wlora" in n for n, _ in wide.named_modules())


def test_another_architecture_is_refused(kit, saved):
    folder, _ = saved
    with pytest.raises(ValueError, match=r"parameters for model.layers.0.*, which GPT2LMHeadModel does not have"):
        load_adapter(kit.tiny("gpt2"), folder)


def test_peft_itself_refuses_another_shape_before_a_weight_is_written(kit, method, saved):
    folder, _ = saved
    model = method(kit.tiny(), size=8)
    kit.train(model)
    before = kit.adapter_weights(model)
    with pytest.raises(ValueError, match=r"have the shapes of the model, got \[4.*\] for .*, which is \[8.*\] here"):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    with pytest.raises(ValueError, match=r"must have the shapes of the model"):
        model.load_adapter(str(folder), "default")
    assert kit.same(kit.adapter_weights(model), before)
    with pytest.raises(ValueError, match=r"must have the shapes of the model"):
        PeftModel.from_pretrained(kit.tiny(width=64), str(folder))


def test_missing_parameters_are_refused(kit, saved):
    folder, _ = saved
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    gone = next(iter(state))
    save_file({k: v for k, v in state.items() if k != gone}, path)
    with pytest.raises(ValueError, match=r"must be complete, but .* is missing"):
        load_adapter(kit.tiny(), folder)


def test_a_taken_name_and_an_empty_folder_are_refused(kit, saved, tmp_path):
    folder, _ = saved
    with pytest.raises(ValueError, match="adapter_name must be new, got 'default', which is taken"):
        load_adapter(load_adapter(kit.tiny(), folder), folder)
    with pytest.raises(FileNotFoundError, match=r"must hold adapter_model.safetensors"):
        load_adapter(kit.tiny(), tmp_path / "nowhere")


def test_pefts_own_adapters_load_too(kit, tmp_path):
    model = get_peft_model(kit.tiny(), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(kit.logits(load_adapter(kit.tiny(), tmp_path)), kit.logits(model))


def test_a_classifier_is_saved_with_the_adapter(kit, tmp_path):
    for name, config in (
        ("h", HoulsbyConfig(task_type="SEQ_CLS", bottleneck=4)),
        ("w", WeightLoraConfig(task_type="SEQ_CLS", r=4)),
    ):
        model = get_peft_model(kit.tiny("bert"), config)
        kit.train(model, "bert")
        model.save_pretrained(tmp_path / name)
        assert any("classifier" in key for key in load_file(tmp_path / name / "adapter_model.safetensors"))
        loaded = load_adapter(kit.tiny("bert", seed=0), tmp_path / name)
        assert torch.equal(kit.logits(loaded, "bert"), kit.logits(model, "bert"))


def test_a_classifier_of_another_size_is_refused_before_the_base_is_wrapped(kit, tmp_path):
    add_houlsby_adapters(kit.tiny("bert"), HoulsbyConfig(task_type="SEQ_CLS", bottleneck=4)).save_pretrained(tmp_path)
    model = kit.tiny("bert")
    model.classifier = nn.Linear(32, 3)
    with pytest.raises(ValueError, match=r"got \[2.*\] for classifier\.\w+, which is \[3.*\] here"):
        load_adapter(model, tmp_path)
    assert not any("houlsby" in name for name, _ in model.named_modules())


def test_the_saved_config_names_the_method(saved):
    config = json.loads((saved[0] / "adapter_config.json").read_text())
    assert config["peft_type"] in ("HOULSBY", "WEIGHT_LORA")


@pytest.fixture
def four_bit(kit):
    """The tiny Llama with NF4 linear maps, as ``load_in_4bit`` makes it."""
    bnb = pytest.importorskip("bitsandbytes")
    model = kit.tiny(width=64)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            packed = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, packed.to("cpu"))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would repack the weights at the first evaluation
    return model


def test_four_bit_bases_train_and_stay_packed(kit, method, four_bit, tmp_path):
    before = {n: p.detach().clone() for n, p in four_bit.named_parameters() if p.dtype == torch.uint8}
    assert before
    plain = kit.logits(four_bit)
    model = method(four_bit)
    assert torch.equal(kit.logits(model), plain)
    losses = kit.train(model, steps=6)
    assert losses[-1] < losses[0]
    packed = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(packed[n], weight) for n, weight in before.items())
    expected = kit.logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(kit.logits(load_adapter(model.unload(), tmp_path)), expected)


def test_merging_into_four_bit_weights_is_refused(four_bit):
    model = get_weight_lora_model(four_bit)
    with pytest.raises(NotImplementedError, match=r"merged into unquantised weights.*bf16"):
        model.merge_and_unload()
