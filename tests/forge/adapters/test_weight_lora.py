"""WeightLoRA (arXiv:2506.02724) as a PEFT method: the forward pass, merging, saving, swapping."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from forge.adapters import WeightLoraConfig, get_weight_lora_model


def adapted(kit, shape="llama", seed=3, **options):
    model = kit.tiny(shape)
    torch.manual_seed(seed)
    return get_weight_lora_model(model, WeightLoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))


def q_proj(model):
    return model.get_base_model().model.layers[0].self_attn.q_proj


def set_omega(model, value):
    for name, p in model.named_parameters():
        if "wlora_omega" in name:
            p.data.fill_(value)


def test_forward_is_equation_1(kit):
    model = adapted(kit, r=4, lora_alpha=8)
    layer, x = q_proj(model), torch.randn(2, 5, 32)
    a, b, omega = layer.adapter_parameters("default")
    nn.init.normal_(b)
    omega.data.fill_(-0.7)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + -0.7 * (8 / 4) * (x @ a.T @ b.T))


def test_with_omega_one_it_is_pefts_lora(kit, shape):
    torch.manual_seed(3)
    lora = get_peft_model(kit.tiny(shape), LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))
    model = adapted(kit, shape, lora_alpha=32)
    state = {n.replace("lora_", "wlora_"): p for n, p in lora.named_parameters() if "lora_" in n}
    for n, p in model.named_parameters():
        if n in state:
            p.data.copy_(torch.randn_like(p))
            state[n].data.copy_(p)
    assert len(state) * 3 == 2 * len(kit.adapter_weights(model))
    torch.testing.assert_close(kit.logits(model, shape), kit.logits(lora, shape))
    for m in (model, lora):
        m(**kit.batch(shape)).loss.backward()
    for n, p in model.named_parameters():
        if n in state:
            torch.testing.assert_close(p.grad, state[n].grad, atol=1e-6, rtol=1e-4)


def test_the_gradient_of_omega(kit):
    """dL/dω = ⟨dL/dh, (α / r) B A x⟩; with L = Σ h it is the sum over the update."""
    layer = q_proj(adapted(kit, r=4, lora_alpha=8))
    x = torch.randn(2, 5, 32)
    a, b, omega = layer.adapter_parameters("default")
    nn.init.normal_(b)
    layer(x).sum().backward()
    torch.testing.assert_close(omega.grad, (2 * (x @ a.T @ b.T)).sum().reshape(1), rtol=1e-4, atol=1e-3)


def test_training_moves_every_omega_and_leaves_the_base_untouched(kit, shape):
    base = kit.tiny(shape)
    before = kit.base_weights(base)
    model = get_weight_lora_model(base, WeightLoraConfig(r=4, target_modules="all-linear"))
    losses = kit.train(model, shape, steps=8)
    assert losses[-1] < losses[0]
    omegas = [p for n, p in model.named_parameters() if "wlora_omega" in n]
    assert omegas and all(p.item() != 1 for p in omegas)
    assert kit.base_is_untouched(model, before)


def test_default_targets_are_those_of_pefts_lora(kit, shape):
    model = kit.tiny(shape)
    lora = get_peft_model(kit.tiny(shape), LoraConfig(r=4))
    ours = get_weight_lora_model(model, WeightLoraConfig(r=4))
    assert ours.base_model.targeted_module_names == lora.base_model.targeted_module_names


def test_merge_is_exactly_the_sum(kit):
    model = adapted(kit, lora_alpha=8)
    kit.train(model)
    layer = q_proj(model)
    a, b, omega = (p.detach().clone() for p in layer.adapter_parameters("default"))
    expected = layer.base_layer.weight.detach() + (b @ a) * (omega * (8 / 4))
    model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, expected)


def test_merged_model_gives_the_same_logits(kit, shape):
    model = adapted(kit, shape)
    kit.train(model, shape)
    set_omega(model, -0.5)
    expected, plain = kit.logits(model, shape), kit.logits(kit.tiny(shape), shape)
    model.merge_adapter()
    torch.testing.assert_close(kit.logits(model, shape), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(kit.logits(model, shape), expected, atol=1e-5, rtol=1e-4)
    merged = model.merge_and_unload()
    assert not any("wlora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(kit.logits(merged, shape), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_a_merged_model_without_its_adapter_is_the_base_model(kit, shape):
    model = adapted(kit, shape)
    kit.train(model, shape)
    set_omega(model, 2.0)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(kit.logits(model, shape), kit.logits(kit.tiny(shape), shape), atol=1e-5, rtol=1e-4)


def test_modules_that_another_adapter_alone_has_are_passed_over(kit):
    base = kit.tiny()
    before, plain = kit.base_weights(base), kit.logits(base)
    model = get_weight_lora_model(base, WeightLoraConfig(r=4, target_modules=["q_proj"]), "first")
    kit.train(model)
    get_weight_lora_model(model, WeightLoraConfig(r=2, target_modules="all-linear"), "other")
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"} <= model.peft_config[
        "other"
    ].target_modules
    expected = kit.logits(model)
    model.set_adapter("other")
    assert torch.equal(kit.logits(model), plain)
    model.set_adapter("first")
    model.merge_adapter()
    torch.testing.assert_close(kit.logits(model), expected, atol=1e-5, rtol=1e-4)
    assert kit.base_is_untouched(model, {name: weight for name, weight in before.items() if "q_proj" not in name})


def test_safe_merge_refuses_what_is_not_finite(kit):
    model = adapted(kit)
    set_omega(model, float("inf"))
    weight = q_proj(model).base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"merged weights must be finite.*'default'"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(q_proj(model).base_layer.weight, weight)


def test_loading_on_the_meta_device_first_is_bitwise_too(kit, tmp_path):
    model = adapted(kit)
    kit.train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kit.tiny(), str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(kit.logits(loaded), kit.logits(model))


def test_dropout_acts_in_training_only(kit):
    layer, x = q_proj(adapted(kit, lora_dropout=0.5)), torch.randn(2, 5, 32)
    nn.init.normal_(layer.adapter_parameters("default")[1])
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": 4.0}, "r must be a whole number of at least 1, got 4.0"),
        ({"lora_alpha": 0}, r"lora_alpha must be a number in \(0, inf\), got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be a number in \[0, 1\), got 1.0"),
        ({"top_k": False}, "top_k must be a whole number of at least 1, got False"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        WeightLoraConfig(**options)


def test_a_target_that_matches_nothing_is_refused_though_another_matches(kit):
    with pytest.raises(ValueError, match=r"got 'q_prj', which matches none; did you mean .*q_proj"):
        adapted(kit, target_modules=["v_proj", "q_prj"])


def test_embeddings_are_no_target(kit):
    with pytest.raises(ValueError, match=r"linear maps.*got 'embed_tokens', which matches model.embed_tokens"):
        adapted(kit, target_modules=["embed_tokens"])


def test_a_model_of_unknown_type_needs_targets():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"target_modules must be given.*'all-linear'"):
        get_weight_lora_model(model)
