"""What holds for bottleneck adapters as for WeightLoRA."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn


def adapted(kit, method, shape="llama", seed=3):
    model = kit.tiny(shape)
    torch.manual_seed(seed)
    return method(model)


def test_a_fresh_model_is_bitwise_the_base_model(kit, method, shape):
    before = kit.logits(kit.tiny(shape), shape)
    assert torch.equal(kit.logits(adapted(kit, method, shape), shape), before)


def test_same_seed_same_adapter(kit, method):
    weights, again, other = (kit.adapter_weights(adapted(kit, method, seed=seed)) for seed in (3, 3, 0))
    assert kit.same(weights, again)
    assert not kit.same(weights, other)


def test_save_and_load_are_bitwise(kit, method, shape, tmp_path):
    model = adapted(kit, method, shape)
    kit.train(model, shape)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(kit.tiny(shape), str(tmp_path))
    assert torch.equal(kit.logits(loaded, shape), kit.logits(model, shape))


def test_hot_swap_restores_bitwise(kit, method, shape):
    base = kit.tiny(shape)
    before, plain = kit.base_weights(base), kit.logits(base, shape)
    model = method(base, "first")
    kit.train(model, shape)
    of_first = kit.logits(model, shape)
    method(model, "other", size=8)
    assert all("first" in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("other")
    assert torch.equal(kit.logits(model, shape), plain)
    kit.train(model, shape, learning_rate=3e-2)
    assert not torch.equal(kit.logits(model, shape), of_first)
    model.set_adapter("first")
    assert torch.equal(kit.logits(model, shape), of_first)
    with model.disable_adapter():
        assert torch.equal(kit.logits(model, shape), plain)
    model.delete_adapter("other")
    assert kit.base_is_untouched(model, before)
    assert torch.equal(kit.logits(model.unload(), shape), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kit, method, shape, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = adapted(kit, method, shape)
        torch.manual_seed(0)
        for name in kit.adapter_weights(model):
            nn.init.normal_(model.get_parameter(name), std=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(**kit.batch(shape)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])
    assert all(g.abs().sum() > 0 for g in grads[1].values())
