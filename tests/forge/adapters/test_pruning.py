"""Importances of WeightLoRA adapters, and keeping the top K, by hand and during training."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from forge.adapters import (
    HoulsbyConfig,
    WeightLoraCallback,
    WeightLoraConfig,
    add_houlsby_adapters,
    get_weight_lora_model,
    importances,
    prune_to_top_k,
)
from forge.adapters.pruning import product_norm, unpruned
from forge.adapters.tuner import tuner_layers
from forge.adapters.weight_lora import WeightLoraLinear


def adapted(kit, shape="llama", **options):
    model = kit.tiny(shape)
    torch.manual_seed(3)
    return get_weight_lora_model(model, WeightLoraConfig(**{"r": 4, **options}))


def randomise(model):
    torch.manual_seed(4)
    for layer in tuner_layers(model, WeightLoraLinear).values():
        for parameter in layer.adapter_parameters("default"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("shapes", [((7, 3), (3, 5)), ((64, 8), (8, 64)), ((2, 1), (1, 9))])
def test_product_norm_is_that_of_the_product(shapes):
    torch.manual_seed(0)
    b, a = torch.randn(shapes[0]), torch.randn(shapes[1])
    torch.testing.assert_close(product_norm(b, a), torch.linalg.matrix_norm(b @ a))
    assert product_norm(torch.zeros_like(b), a) == 0


def test_importances_are_equation_2(kit, shape):
    model = randomise(adapted(kit, shape))
    layers = tuner_layers(model, WeightLoraLinear)
    parts = {n: m.adapter_parameters("default") for n, m in layers.items()}
    norms = {n: torch.linalg.matrix_norm(b @ a).item() for n, (a, b, _) in parts.items()}
    expected = {n: abs(parts[n][2].item()) * norms[n] / sum(norms.values()) for n in parts}
    assert importances(model) == pytest.approx(expected, rel=1e-5)


def test_importances_by_hand(kit):
    model = adapted(kit, r=1, target_modules=["q_proj"])
    first, second = tuner_layers(model, WeightLoraLinear).values()
    for layer, norm, weight in ((first, 3.0, -0.5), (second, 1.0, 2.0)):
        a, b, omega = layer.adapter_parameters("default")
        a.data.zero_()[0, 0] = 1
        b.data.zero_()[0, 0] = norm
        omega.data.fill_(weight)
    assert list(importances(model).values()) == pytest.approx([0.5 * 3 / 4, 2 * 1 / 4])
    assert prune_to_top_k(model, 1) == ["model.layers.0.self_attn.q_proj"]


def test_pruned_adapters_are_as_good_as_absent(kit, shape):
    model = randomise(adapted(kit, shape, target_modules="all-linear"))
    scores = importances(model)
    expected = sorted(scores, key=scores.get, reverse=True)[:2]
    dropped = prune_to_top_k(model, 2)
    assert set(dropped) == set(scores) - set(expected)
    assert {n for n, s in importances(model).items() if s > 0} == set(expected) == set(unpruned(model))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 2
    for name, layer in tuner_layers(model, WeightLoraLinear).items():
        assert (layer.wlora_omega["default"].item() == 0) == (name in dropped)
    before = kit.logits(model, shape)
    for name, layer in tuner_layers(model, WeightLoraLinear).items():
        if name in dropped:
            layer.wlora_A["default"].weight.data.fill_(float("nan"))
    assert torch.equal(kit.logits(model, shape), before)


def test_pruned_adapters_stay_frozen_through_peft(kit):
    model = randomise(adapted(kit))
    prune_to_top_k(model, 1)
    model.set_adapter("default")
    model.set_requires_grad("default")
    with model.disable_adapter():
        pass
    assert sum(p.requires_grad for p in model.parameters()) == 3


def test_pruned_state_is_saved_and_loaded(kit, tmp_path, shape):
    model = randomise(adapted(kit, shape))
    prune_to_top_k(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kit.tiny(shape), str(tmp_path), is_trainable=True)
    assert unpruned(loaded) == unpruned(model)
    assert sum(p.requires_grad for p in loaded.parameters()) == 6
    assert torch.equal(kit.logits(loaded, shape), kit.logits(model, shape))


def test_merging_a_pruned_model(kit):
    model = randomise(adapted(kit))
    prune_to_top_k(model, 2)
    dropped = [n for n in importances(model) if n not in unpruned(model)]
    expected = kit.logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(kit.logits(merged), expected, atol=1e-3, rtol=1e-3)
    base = dict(kit.tiny().named_parameters())
    assert all(torch.equal(merged.get_parameter(f"{n}.weight"), base[f"{n}.weight"]) for n in dropped)


def test_untrained_adapters_have_no_importance(kit):
    with pytest.raises(ValueError, match=r"got B A = 0 in every one.*train some steps first"):
        importances(adapted(kit))


@pytest.mark.parametrize(("k", "message"), [(0, "top_k must be a whole number"), (5, "at most the 4 adapters.*got 5")])
def test_impossible_k(kit, k, message):
    with pytest.raises(ValueError, match=message):
        prune_to_top_k(randomise(adapted(kit)), k)


def test_other_models_are_refused(kit):
    with pytest.raises(ValueError, match=r"of type WEIGHT_LORA, got a plain LlamaForCausalLM"):
        importances(kit.tiny())
    with pytest.raises(ValueError, match=r"of type WEIGHT_LORA, got HOULSBY"):
        importances(add_houlsby_adapters(kit.tiny(), HoulsbyConfig(bottleneck=2)))


def test_two_active_adapters_have_no_order_of_importance(kit):
    model = get_weight_lora_model(randomise(adapted(kit)), WeightLoraConfig(r=2), "other")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"exactly one adapter must be active, got \['default', 'other'\]; choose"):
        importances(model)


class Watch(TrainerCallback):
    """Copies the adapters after every optimizer step."""

    def __init__(self, kit):
        self.kit, self.steps, self.states = kit, [], []

    def on_step_end(self, args, state, control, **kw):
        self.steps.append(self.kit.adapter_weights(kw["model"]))
        self.states.append(len(kw["optimizer"].state))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_callback_prunes_once_and_pruned_adapters_stay_bitwise(kit, tmp_path, accumulation):
    model, watch = adapted(kit), Watch(kit)
    kit.trainer(
        model, tmp_path, WeightLoraCallback(3, top_k=1), watch, gradient_accumulation_steps=accumulation
    ).train()
    (kept,) = unpruned(model)
    assert watch.states == [12, 12, 3, 3, 3, 3, 3, 3]
    for name, last in watch.steps[-1].items():
        assert torch.equal(watch.steps[2][name], last) == (kept not in name), name
        assert not torch.equal(watch.steps[0][name], watch.steps[1][name]), name


def test_resuming_is_bitwise_before_and_after_the_pruning(kit, tmp_path):
    def run(**resume):
        model = adapted(kit, top_k=2)
        kit.trainer(model, tmp_path, WeightLoraCallback(3), save_steps=2).train(**resume)
        return kit.adapter_weights(model)

    whole = run()
    for step in (2, 4):
        assert kit.same(run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")), whole)


def test_resuming_unpruned_after_the_step_is_refused(kit, tmp_path):
    kit.trainer(adapted(kit), tmp_path, save_steps=4).train()
    later = kit.trainer(adapted(kit), tmp_path, WeightLoraCallback(3, top_k=1))
    with pytest.raises(ValueError, match=r"prune_at_step must be ahead.*got 3 at step 4.*prune_to_top_k\(model, 1\)"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (WeightLoraCallback(8, top_k=1), "prune_at_step must be below the 8 steps of this run, got 8"),
        (WeightLoraCallback(2, top_k=5), "top_k must be at most the 4 adapters of the model, got 5"),
        (WeightLoraCallback(2), "top_k must be given to WeightLoraCallback or to WeightLoraConfig, got neither"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused_at_the_start(kit, tmp_path, callback, message):
    with pytest.raises(ValueError, match=message):
        kit.trainer(adapted(kit), tmp_path, callback).train()


@pytest.mark.parametrize("options", [{"prune_at_step": 0}, {"prune_at_step": 2, "top_k": 0}])
def test_bad_callback_options(options):
    with pytest.raises(ValueError, match="must be a whole number of at least 1, got 0"):
        WeightLoraCallback(**options)
