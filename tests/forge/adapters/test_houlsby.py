"""Bottleneck adapters (arXiv:1902.00751) as a PEFT method."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from forge.adapters import HoulsbyConfig, add_houlsby_adapters
from forge.layers import NoLayersError


def adapted(kit, shape="llama", seed=3, **options):
    model = kit.tiny(shape)
    torch.manual_seed(seed)
    return add_houlsby_adapters(model, HoulsbyConfig(**{"bottleneck": 4, **options}))


def layer_of(model):
    return model.get_base_model().model.layers[0].mlp.down_proj


def test_the_papers_initialisation_is_near_the_identity(kit, shape):
    before = kit.logits(kit.tiny(shape), shape)
    after = kit.logits(adapted(kit, shape, zero_init=False), shape)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, atol=1e-2, rtol=0)


def test_initial_weights_are_a_truncated_gaussian(kit):
    layer = layer_of(adapted(kit, bottleneck=64, init_std=0.02, zero_init=False))
    for linear in (layer.houlsby_down["default"], layer.houlsby_up["default"]):
        assert linear.weight.abs().max() <= 0.04
        assert 0.015 < linear.weight.std() < 0.02  # truncation at two deviations leaves 0.88 σ
        assert not linear.bias.any()


def test_forward_is_equation_1(kit):
    model = adapted(kit, zero_init=False, nonlinearity="gelu", init_std=0.3)
    layer, x = layer_of(model), torch.randn(2, 5, 64)
    y = layer.base_layer(x)
    down, up = layer.houlsby_down["default"], layer.houlsby_up["default"]
    expected = y + nn.functional.gelu(y @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(x), expected)


def test_parameters_are_2md_plus_d_plus_m_each(kit, shape):
    adapters = {"llama": 4, "gpt2": 4, "bert": 4, "t5": 10}[shape]
    trainable, _ = adapted(kit, shape).get_nb_trainable_parameters()
    assert trainable == adapters * (2 * 4 * 32 + 32 + 4)


def test_training_lowers_the_loss_and_leaves_the_base_untouched(kit, shape):
    base = kit.tiny(shape)
    before = kit.base_weights(base)
    torch.manual_seed(0)
    model = add_houlsby_adapters(base, HoulsbyConfig(bottleneck=4))
    losses = kit.train(model, shape, steps=8)
    assert losses[-1] < losses[0]
    assert kit.base_is_untouched(model, before)


def test_every_adapter_parameter_gets_a_gradient(kit, shape):
    model = adapted(kit, shape, zero_init=False)
    model(**kit.batch(shape)).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == ("houlsby_" in name), name


def test_save_and_load_are_bitwise(kit, shape, tmp_path):
    model = adapted(kit, shape, train_layer_norms=True)
    kit.train(model, shape)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(kit.tiny(shape), str(tmp_path))
    assert torch.equal(kit.logits(loaded, shape), kit.logits(model, shape))


def test_layer_norms_are_trained_in_copies(kit, shape):
    base = kit.tiny(shape)
    before, plain = kit.base_weights(base), kit.logits(base, shape)
    model = add_houlsby_adapters(base, HoulsbyConfig(bottleneck=4, train_layer_norms=True))
    norms = [n for n, p in model.named_parameters() if p.requires_grad and "houlsby_" not in n]
    assert norms and all("modules_to_save" in n for n in norms)
    kit.train(model, shape)
    assert kit.base_is_untouched(model, before)
    with model.disable_adapter():
        assert torch.equal(kit.logits(model, shape), plain)


def test_a_second_adapter_has_copies_of_the_same_norms(kit, shape):
    config = HoulsbyConfig(bottleneck=4, train_layer_norms=True)
    model = add_houlsby_adapters(kit.tiny(shape), config, "first")
    add_houlsby_adapters(model, config, "other")
    first, other = (model.peft_config[name].modules_to_save for name in ("first", "other"))
    assert first == other and first


def test_named_modules_and_a_regular_expression(kit):
    assert len(kit.adapter_weights(adapted(kit, target_modules=["down_proj"]))) == 2 * 4
    assert len(kit.adapter_weights(adapted(kit, target_modules=r".*layers\.1.*o_proj"))) == 4


def test_the_callers_config_stays_as_it_is(kit):
    config = HoulsbyConfig(bottleneck=4, train_layer_norms=True)
    add_houlsby_adapters(kit.tiny("llama"), config)
    assert config == dataclasses.replace(config)
    assert config.target_modules is None and config.modules_to_save is None
    add_houlsby_adapters(kit.tiny("bert"), config)


def test_it_is_a_peft_method_like_any_other(kit):
    model = get_peft_model(kit.tiny(), HoulsbyConfig(task_type="CAUSAL_LM", bottleneck=4))
    tokens = model.generate(**{k: v for k, v in kit.batch().items() if k != "labels"}, max_new_tokens=2)
    assert tokens.shape == (2, 10)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_and_changes_nothing(kit, call):
    model = adapted(kit)
    kit.train(model)
    before = kit.logits(model)
    with pytest.raises(NotImplementedError, match=r"non-linear.*unload\(\)"):
        getattr(model, call)()
    assert torch.equal(kit.logits(model), before)


def test_bf16_base_keeps_adapters_in_fp32(kit):
    model = add_houlsby_adapters(kit.tiny().bfloat16(), HoulsbyConfig(bottleneck=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = kit.train(model, steps=6)
    assert losses[-1] < losses[0] and kit.logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": 0}, "bottleneck must be a whole number of at least 1, got 0"),
        ({"bottleneck": True}, "bottleneck must be a whole number of at least 1, got True"),
        ({"init_std": 0.0}, r"init_std must be a number in \(0, 1\), got 0.0"),
        ({"init_std": "x"}, "init_std must be a number"),
        ({"nonlinearity": "rellu"}, "nonlinearity must be known, got 'rellu'; did you mean .*relu"),
        ({"nonlinearity": "prelu"}, "nonlinearity must have no parameters, got 'prelu'"),
        ({"target_modules": "all-linear"}, "got 'all-linear'.*leave target_modules=None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HoulsbyConfig(**options)


def test_a_target_that_matches_nothing_is_refused_though_another_matches(kit):
    base = kit.tiny()
    with pytest.raises(ValueError, match=r"got 'dwn_proj', which matches none; did you mean .*down_proj"):
        add_houlsby_adapters(base, HoulsbyConfig(target_modules=["o_proj", "dwn_proj"]))
    assert not any("houlsby" in name for name, _ in base.named_modules())


def test_a_target_that_is_no_linear_map_is_refused(kit):
    with pytest.raises(ValueError, match=r"must name linear maps.*got 'mlp', which matches model.layers.0.mlp"):
        add_houlsby_adapters(kit.tiny(), HoulsbyConfig(target_modules=["mlp"]))


def test_a_projection_that_is_read_but_never_called_is_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"called as modules.*got 'out_proj'"):
        add_houlsby_adapters(model, HoulsbyConfig(target_modules=["out_proj"]))


def test_a_model_without_layers_is_refused():
    with pytest.raises(NoLayersError, match="target_modules"):
        add_houlsby_adapters(nn.Sequential(nn.Linear(4, 4)))
    model = add_houlsby_adapters(nn.Sequential(nn.Linear(4, 4)), HoulsbyConfig(target_modules=["0"], bottleneck=2))
    assert model(torch.ones(1, 4)).shape == (1, 4)
