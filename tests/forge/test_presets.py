"""Options, checks, training arguments and the order in which a preset is applied."""

from __future__ import annotations

import importlib.util
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed
from trl.trainer.dpo_config import DPOConfig

from forge import get_preset
from forge.adapters import WeightLoraCallback
from forge.ema import EMACallback
from forge.presets import PRESETS, AdapterPreset
from forge.presets.adapters import task_type_of
from tests.forge.presets_models import make_examples, make_model
from tests.forge.tensors import names_moved, weights_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NEEDED = {"adalora": {"total_step": 4, "tinit": 1, "tfinal": 1, "deltaT": 1}}
"""Options without which a preset cannot prepare a model."""


def preset_for(name: str, **overrides: Any) -> Any:
    return get_preset(name, **(NEEDED.get(name, {}) | overrides))


def test_seed_001_options() -> None:
    preset = get_preset("qlora", lora_r=32, lora_alpha=64, learning_rate=2e-4, num_train_epochs=3)
    assert (preset.lora_r, preset.lora_alpha, preset.learning_rate, preset.num_train_epochs) == (32, 64, 2e-4, 3)
    arguments = preset.get_training_args()
    arguments.output_dir = "elsewhere"
    assert (arguments.learning_rate, arguments.num_train_epochs, arguments.output_dir) == (2e-4, 3, "elsewhere")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sft", {"learning_rate": 2e-5, "warmup_steps": 0.1, "lr_scheduler_type": "cosine"}),
        (
            "lora",
            {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "attention", "learning_rate": 2e-4},
        ),
        ("lora-all-linear", {"target_modules": "all-linear"}),
        ("qlora", {"target_modules": "all-linear", "max_grad_norm": 0.3, "gradient_checkpointing": True}),
        ("dpo", {"beta": 0.1, "learning_rate": 1e-6}),
        (
            "classic",
            {"warmup_steps": 500, "weight_decay": 0.01, "bf16": False, "num_train_epochs": 3, "learning_rate": 2e-5},
        ),
    ],
)
def test_documented_numbers(name: str, expected: dict[str, Any]) -> None:
    assert {option: getattr(get_preset(name), option) for option in expected} == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_defaults_without_findings_and_training_arguments(name: str) -> None:
    preset = get_preset(name)
    assert preset.validate() == []
    arguments = preset.get_training_args(max_steps=7)
    assert isinstance(arguments, DPOConfig if name == "dpo" else TrainingArguments)
    assert arguments.max_steps == 7
    for option in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "gradient_accumulation_steps"):
        assert getattr(arguments, option) == getattr(preset, option)
    assert arguments.lr_scheduler_type == preset.lr_scheduler_type
    assert arguments.activation_checkpointing == preset.gradient_checkpointing
    with pytest.raises(FrozenInstanceError):
        preset.learning_rate = 1.0


CHANGED: dict[str, Any] = {
    "lora_r": 5,
    "lora_alpha": 7,
    "lora_dropout": 0.25,
    "target_modules": ["q_proj"],
    "task_type": "TOKEN_CLS",
    "init_r": 13,
    "target_r": 3,
    "total_step": 77,
    "tinit": 2,
    "tfinal": 2,
    "deltaT": 3,
    "orth_reg_weight": 0.3,
    "top_k": 2,
    "bottleneck": 3,
    "num_virtual_tokens": 3,
    "encoder_hidden_size": 9,
}
"""Another value than its default for every option that PEFT's configuration of an adapter must have."""


@pytest.mark.parametrize("name", [name for name, kind in PRESETS.items() if issubclass(kind, AdapterPreset)])
def test_every_option_of_an_adapter_reaches_its_configuration(name: str) -> None:
    def config(**overrides: Any) -> dict[str, Any]:
        return preset_for(name, **({"task_type": "CAUSAL_LM"} | overrides)).get_peft_config().to_dict()

    elsewhere = {"prune_at_step", "bnb_4bit_use_double_quant"}
    own = set(PRESETS[name].option_names()) - set(PRESETS["sft"].option_names()) - elsewhere
    assert own
    for option in own:
        needed = {"prune_at_step": 1} if option == "top_k" else {}
        assert config(**{option: CHANGED[option]}, **needed) != config(), option


@pytest.mark.parametrize(
    ("class_name", "encoder_decoder", "task"),
    [
        ("T5ForConditionalGeneration", True, "SEQ_2_SEQ_LM"),
        ("LlavaForConditionalGeneration", False, "CAUSAL_LM"),
        ("LlamaForCausalLM", False, "CAUSAL_LM"),
        ("GPT2LMHeadModel", False, "CAUSAL_LM"),
        ("BertForSequenceClassification", False, "SEQ_CLS"),
        ("BertForTokenClassification", False, "TOKEN_CLS"),
        ("BertForQuestionAnswering", False, "QUESTION_ANS"),
        ("BertForMaskedLM", False, None),
    ],
)
def test_the_task_is_that_of_the_head(class_name: str, encoder_decoder: bool, task: str | None) -> None:
    model = type(class_name, (torch.nn.Module,), {})()
    model.config = SimpleNamespace(is_encoder_decoder=encoder_decoder)
    assert task_type_of(model) == task


def test_dpo_arguments_carry_beta() -> None:
    assert get_preset("dpo", beta=0.3).get_training_args().beta == 0.3  # type: ignore[attr-defined]


def test_bf16_is_automatic_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_preset("sft").get_training_args().bf16 is False or torch.cuda.is_available()
    assert get_preset("sft", bf16=True).get_training_args().bf16 is True
    monkeypatch.setattr("forge.presets.base.is_torch_bf16_gpu_available", lambda: True)
    assert get_preset("sft")._use_bf16() is True
    assert get_preset("sft", bf16=False)._use_bf16() is False
    assert get_preset("classic")._use_bf16() is False


def test_training_arguments_beside_the_preset() -> None:
    preset = get_preset("lora")
    arguments = preset.get_training_args(learning_rate=1e-3, max_steps=5)
    assert (arguments.learning_rate, arguments.max_steps, preset.learning_rate) == (1e-3, 5, 2e-4)
    with pytest.raises(ValueError, match="learning_rate must be above 0, got -1"):
        preset.get_training_args(learning_rate=-1)
    for name, value in (("freeze_ratio", 0.5), ("gradient_checkpointing", True), ("activation_checkpointing", True)):
        with pytest.raises(ValueError, match=rf"{name} is decided by the preset.*set it in get_preset"):
            preset.get_training_args(**{name: value})


def test_print_info_shows_every_option_and_findings(capsys: pytest.CaptureFixture[str]) -> None:
    get_preset("lora", learning_rate=0.1).print_info()
    printed = capsys.readouterr().out
    for option in PRESETS["lora"].option_names():
        assert option in printed
    assert "warning: learning_rate=0.1 is above" in " ".join(printed.split())
    get_preset("adalora").print_info()
    assert "lora_r" not in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_every_option_has_a_docstring_and_a_doc_entry(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text()
    assert f"`{name}`" in page
    for option in PRESETS[name].option_names():
        assert f"`{option}`" in page, f"docs/presets.md does not mention {option}"


# Bad input


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("qlorra", {}, r"preset must be one of sft, .*, got 'qlorra'; did you mean qlora"),
        ("lora", {"learning_rat": 1e-4}, r"got 'learning_rat' for 'lora'; did you mean learning_rate"),
        ("lora", {"r": 8}, r"got 'r' for 'lora'; "),
        ("sft", {"lora_r": 8}, r"got 'lora_r' for 'sft', which would ignore it; it belongs to lora, .*qlora"),
        ("lora", {"beta": 0.1}, r"which would ignore it; it belongs to dpo"),
        ("adalora", {"lora_r": 8}, r"AdaLoRA has init_r and target_r instead; leave it out"),
        ("adalora", {"freeze_ratio": 0.5}, r"allocates its ranks by the gradients of all adapters; leave it out"),
        ("prefix-tuning", {"freeze_ratio": 0.5}, r"the layers of the model do not train anyway"),
        ("p-tuning-v2", {"gradient_checkpointing": True}, r"PEFT cannot recompute"),
        ("sft", {"warmup_ratio": 0.1}, r"use warmup_steps: below 1 it is a share of the run"),
        ("lora", {"lora_r": "16"}, r"lora_r must be a whole number, got '16' \(str\); pass it without quotes"),
        ("lora", {"lora_r": 16.0}, r"lora_r must be a whole number, got 16.0 \(float\)"),
        ("lora", {"lora_r": True}, r"lora_r must be a whole number, got True \(bool\)"),
        ("lora", {"learning_rate": "2e-4"}, r"learning_rate must be a finite number, got '2e-4' \(str\)"),
        ("lora", {"learning_rate": True}, r"learning_rate must be a finite number, got True"),
        ("lora", {"learning_rate": float("nan")}, r"learning_rate must be a finite number, got nan"),
        ("lora", {"learning_rate": 0}, r"learning_rate must be above 0, got 0"),
        ("lora", {"lora_r": 0}, r"lora_r must be at least 1, got 0"),
        ("lora", {"lora_dropout": 1.0}, r"lora_dropout must be at least 0 and at most 0.99, got 1.0"),
        ("sft", {"bf16": 1}, r"bf16 must be True or False or None, got 1"),
        ("sft", {"gradient_checkpointing": None}, r"gradient_checkpointing must be True or False, got None"),
        ("sft", {"output_dir": 3}, r"output_dir must be a string, got 3"),
        ("sft", {"freeze_ratio": 1.5}, r"freeze_ratio must be at least 0 and at most 1, got 1.5"),
        ("sft", {"ema_decay": 1.0}, r"decay must be a number in \(0, 1\), got 1.0"),
        ("sft", {"lr_scheduler_type": "cosin"}, r"lr_scheduler_type must be one of .*did you mean cosine"),
        ("sft", {"lr_scheduler_type": "constant"}, r"'constant' has no warm-up, got warmup_steps=0.1; use"),
        ("sft", {"offload": "activation"}, r"offload must be one of .*did you mean activations"),
        ("sft", {"offload": 3}, r"offload must be None, a name or several"),
        ("sft", {"offload": ("optimizer", "parameters")}, r"must not name both"),
        ("sft", {"offload": ("optimizer", "optimizer")}, r"each tactic once"),
        ("lora", {"target_modules": []}, r"target_modules must be 'attention', 'all-linear'.*got \[\]"),
        ("lora", {"target_modules": 3}, r"target_modules must be .*got 3"),
        ("lora", {"task_type": "CAUSAL"}, r"task_type must be one of .*did you mean CAUSAL_LM"),
        ("adalora", {"target_r": 20}, r"target_r must be at least 1 and at most 11, got 20"),
        ("weightlora", {"top_k": 2}, r"top_k and prune_at_step go together, got 2 and None"),
        ("dpo", {"beta": 0.0}, r"beta must be above 0"),
        ("prompt-tuning", {"num_virtual_tokens": 0}, r"num_virtual_tokens must be at least 1, got 0"),
    ],
)
def test_bad_options(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_preset(name, **overrides)


def test_an_option_that_is_refused_stays_so_after_a_replacement() -> None:
    for name, option in (("adalora", {"freeze_ratio": 0.5}), ("prefix-tuning", {"gradient_checkpointing": True})):
        with pytest.raises(ValueError, match=f"'{next(iter(option))}' for '{name}': .*; leave it out"):
            replace(get_preset(name), **option)  # type: ignore[arg-type]


def test_both_ends_of_a_range_belong_to_it() -> None:
    assert [get_preset("sft", freeze_ratio=end).freeze_ratio for end in (0, 1)] == [0, 1]


def test_presets_without_lora_or_quantisation_say_so() -> None:
    with pytest.raises(ValueError, match="get_lora_config\\(\\) needs a preset with LoRA, got 'sft'; use 'lora'"):
        get_preset("sft").get_lora_config()
    with pytest.raises(ValueError, match="get_bnb_config\\(\\) needs a preset that quantises, got 'lora'; use 'qlora'"):
        get_preset("lora").get_bnb_config()
    with pytest.raises(ValueError, match="got total_step=None; get_preset\\('adalora', total_step="):
        get_preset("adalora").get_lora_config()
    with pytest.raises(ValueError, match="tinit \\+ tfinal must be below total_step, got 8 \\+ 3 of 10"):
        get_preset("adalora", total_step=10, tinit=8).get_lora_config()


def test_bitsandbytes_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.presets.quantisation.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="4-bit loading needs bitsandbytes, got none installed; pip install"):
        get_preset("qlora").get_bnb_config()


# What is known to hurt


@pytest.mark.parametrize(
    ("name", "overrides", "finding"),
    [
        ("sft", {"learning_rate": 0.1}, "learning_rate=0.1 is above"),
        ("sft", {"learning_rate": 2e-4}, "learning_rate=0.0002 is above"),
        ("lora", {"learning_rate": 0.1}, "learning_rate=0.1 is above"),
        ("lora", {"learning_rate": 2e-5}, "learning_rate=2e-05 is below"),
        ("lora", {"lora_alpha": 256}, "lora_alpha / rank = 16"),
        ("lora", {"lora_alpha": 2}, "lora_alpha / rank = 0.125"),
        ("adalora", {"gradient_accumulation_steps": 4}, "orthogonality penalty once a micro-batch"),
        ("sft", {"warmup_steps": 0}, "no warm-up"),
        ("sft", {"max_grad_norm": 0}, "max_grad_norm=0"),
        ("classic", {"per_device_train_batch_size": 64}, "a batch of 64 sequences"),
        ("classic", {"per_device_train_batch_size": 2}, "a batch of 2 sequences"),
        ("classic", {"learning_rate": 8e-5}, "above the 5e-5"),
    ],
)
def test_findings(name: str, overrides: dict[str, Any], finding: str) -> None:
    preset = get_preset(name, **overrides)
    with pytest.warns(UserWarning, match=finding.replace(".", r"\.")):
        findings = preset.validate()
    assert len(findings) == 1
    with pytest.warns(UserWarning, match=finding.replace(".", r"\.")):
        preset.get_training_args()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without an accelerator")
def test_findings_without_an_accelerator() -> None:
    assert "bf16=True without a GPU" in get_preset("sft", bf16=True).validate()[0]
    assert "in host memory already" in get_preset("sft", offload="activations").validate()[0]


def test_warm_up_longer_than_the_run() -> None:
    assert "warmup_steps=500 of 100 steps" in get_preset("classic").validate(total_steps=100)[0]
    assert "warmup_steps=500 of 500 steps" in get_preset("classic").validate(total_steps=500)[0]
    assert get_preset("classic").validate(total_steps=501) == []


# prepare()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier", "t5"])
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("qlora", "dpo")])
def test_every_preset_trains_every_shape(name: str, family: str, tmp_path: Path) -> None:
    """A few steps: what should train moves, what should not stays bitwise."""
    preset = preset_for(name, warmup_steps=0, output_dir=str(tmp_path))
    set_seed(0)
    model = preset.prepare(make_model(family))
    assert isinstance(model, PeftModel) == isinstance(preset, AdapterPreset)
    before = weights_of(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    arguments = preset.get_training_args(max_steps=4, report_to=[], save_strategy="no", disable_tqdm=True)
    Trainer(model, arguments, train_dataset=make_examples(family) * 8, callbacks=preset.callbacks()).train()
    moved = names_moved(before, model)
    assert moved <= trainable
    assert len(moved) > 0.4 * len(trainable), f"only {moved} moved"


@pytest.mark.parametrize("name", ["sft", "lora"])
def test_a_prepared_model_keeps_no_cache(name: str) -> None:
    base = make_model("llama")
    assert base.config.use_cache
    assert not get_preset(name).prepare(base).config.use_cache


def test_lora_and_freezing_train_the_upper_layers_only() -> None:
    model = get_preset("lora", freeze_ratio=0.5).prepare(make_model("llama"))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("layers.1." in n and "lora_" in n for n in trainable)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """Also to adapters on frozen embeddings, and under freezing."""
    for overrides in ({}, {"freeze_ratio": 0.5}):
        gradients = []
        for checkpointing in (False, True):
            set_seed(1)
            preset = get_preset("lora", gradient_checkpointing=checkpointing, **overrides)
            model = preset.prepare(make_model("llama")).train()
            assert model.is_gradient_checkpointing is checkpointing
            batch = {k: v[None] for k, v in make_examples("llama")[3].items()}
            model(**batch).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() != set()
        assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_prepare_refuses_a_second_preparation_and_foreign_models() -> None:
    model = make_model("llama")
    get_preset("sft").prepare(model)
    with pytest.raises(ValueError, match="can be prepared once, got one prepared as 'sft'; load it anew"):
        get_preset("lora").prepare(model)
    base = make_model("llama")
    prepared = get_preset("lora").prepare(base)
    for again in (base, prepared):
        with pytest.raises(ValueError, match=r"prepared once|without adapters"):
            get_preset("lora").prepare(again)
    with pytest.raises(ValueError, match="needs a model without adapters, got PeftModel"):
        get_preset("lora").prepare(get_peft_model(make_model("llama"), get_preset("lora").get_lora_config()))
    with pytest.raises(TypeError, match="needs a PreTrainedModel, got Linear"):
        get_preset("sft").prepare(torch.nn.Linear(2, 2))


def test_storage_is_checked_against_the_preset() -> None:
    with pytest.raises(
        ValueError, match=r"'classic' trains in fp32, got weights in torch\.bfloat16; load the model with"
    ):
        get_preset("classic").prepare(make_model("llama").bfloat16())
    with pytest.raises(ValueError, match=r"'qlora' needs 4-bit weights, got LlamaForCausalLM in torch\.float32; load"):
        get_preset("qlora").prepare(make_model("llama"))


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_too_coarse_for_the_steps_are_warned_of(name: str, dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=rf"which are in {dtype}: .*lost to rounding; load .*dtype=torch\.float32"):
        get_preset(name).prepare(make_model("llama").to(dtype))


def test_no_weights_are_too_coarse_in_fp32_or_frozen(recwarn: pytest.WarningsRecorder) -> None:
    get_preset("sft").prepare(make_model("llama"))
    get_preset("lora").prepare(make_model("llama").bfloat16())
    assert not [w for w in recwarn if "lost to rounding" in str(w.message)]


def test_callbacks() -> None:
    assert get_preset("sft").callbacks() == []
    callbacks = get_preset("lora", ema_decay=0.99).callbacks()
    assert [type(c) for c in callbacks] == [EMACallback] and callbacks[0].decays == (0.99,)
    assert [type(c).__name__ for c in get_preset("adalora", ema_decay=0.9).callbacks()] == [
        "AdaLoraCallback",
        "EMACallback",
    ]
    assert get_preset("weightlora").callbacks() == []
    (pruning,) = get_preset("weightlora", top_k=2, prune_at_step=3).callbacks()
    assert isinstance(pruning, WeightLoraCallback) and pruning.prune_at_step == 3


def test_prompt_learning_needs_a_task_that_peft_knows() -> None:
    with pytest.raises(ValueError, match=r"prompt-tuning needs a task that PEFT knows .*got BertForMaskedLM"):
        get_preset("prompt-tuning").prepare(make_model("bert"))
    assert get_preset("prompt-tuning", task_type="CAUSAL_LM").get_peft_config().task_type == "CAUSAL_LM"  # type: ignore[attr-defined]


def test_lora_config_is_the_harness_one() -> None:
    """What experiments/harness/models.py builds by hand today."""
    config = get_preset("lora").get_lora_config(make_model("llama"))
    by_hand = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=["k_proj", "o_proj", "q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    assert config.to_dict() == by_hand.to_dict()


def test_every_field_is_documented_in_the_source() -> None:
    for preset in set(PRESETS.values()):
        source = "".join(
            Path(importlib.util.find_spec(kind.__module__).origin).read_text()  # type: ignore[union-attr, arg-type]
            for kind in preset.__mro__
            if kind.__module__.startswith("forge")
        )
        for field in fields(preset):
            line = next(i for i, text in enumerate(source.splitlines()) if text.startswith(f"    {field.name}: "))
            assert source.splitlines()[line + 1].startswith('    """'), field.name
