"""PEFT's own methods on the four shapes: what ``docs/adapters.md`` says of them is so."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}

METHODS = {
    "lora": lambda **o: LoraConfig(r=4, **o),
    "lora_all_linear": lambda **o: LoraConfig(r=4, target_modules="all-linear", **o),
    "adalora": lambda **o: AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=10, **o),
    "prefix_tuning": lambda **o: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16, **o
    ),
    "p_tuning": lambda **o: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **o),
    "p_tuning_v2": lambda **o: PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=False, **o),
    "prompt_tuning": lambda **o: PromptTuningConfig(num_virtual_tokens=4, **o),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_trains_saves_loads_and_swaps(kit, shape, method, tmp_path):
    inputs = kit.batch(shape)
    if method == "adalora":
        inputs = {k: v for k, v in inputs.items() if k != "labels"}  # PEFT: a loss needs a trainable AdaLoRA adapter
        if shape == "t5":
            inputs["decoder_input_ids"] = inputs["input_ids"]

    def output(model):
        with torch.no_grad():
            return model.eval()(**inputs).logits

    base = kit.tiny(shape)
    before = kit.base_weights(base)
    torch.manual_seed(0)
    model = get_peft_model(base, METHODS[method](task_type=TASKS[shape]))
    fresh = output(model)
    kit.train(model, shape)
    trained = output(model)
    assert not torch.equal(trained, fresh)
    heads = {"classifier.weight", "classifier.bias"} if shape == "bert" else set()
    assert kit.base_is_untouched(model, {n: p for n, p in before.items() if n not in heads})
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()

    loaded = PeftModel.from_pretrained(kit.tiny(shape), str(tmp_path), adapter_name="first")
    assert torch.equal(output(loaded), trained)
    loaded.add_adapter("other", METHODS[method](task_type=TASKS[shape], inference_mode=True))
    loaded.set_adapter("other")
    assert not torch.equal(output(loaded), trained)
    loaded.set_adapter("first")
    assert torch.equal(output(loaded), trained)


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning_v2"])
def test_prefixes_refuse_gradient_checkpointing(kit, shape, method):
    model = kit.tiny(shape)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        get_peft_model(model, METHODS[method](task_type=TASKS[shape]))


def test_adalora_loaded_for_inference_has_no_loss(kit, tmp_path):
    get_peft_model(kit.tiny(), METHODS["adalora"](task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kit.tiny(), str(tmp_path))
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        loaded(**kit.batch())
    trainable = PeftModel.from_pretrained(kit.tiny(), str(tmp_path), is_trainable=True)
    assert trainable(**kit.batch()).loss > 0
