"""What ``profile_training_memory`` takes and refuses, what it leaves alone, and what its report says."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    LlamaConfig,
    MixtralConfig,
    Trainer,
    TrainingArguments,
)

from forge import get_preset
from forge.memory import (
    MemoryReport,
    estimate_model_memory,
    parameter_storage,
    profile_training_memory,
    published_estimates,
)
from forge.memory.profile import model_from_config
from tests.forge.memory.training import (
    BATCH,
    TOKENS,
    bert_config,
    half_frozen,
    llama,
    llama_classifier,
    llama_config,
    lora,
    measured,
    qlora,
)

ROOT = Path(__file__).resolve().parents[3]


def predicted(model: Any, **options: Any) -> MemoryReport:
    return profile_training_memory(model, BATCH, TOKENS, **options)


@pytest.fixture(scope="module")
def report() -> MemoryReport:
    return predicted(llama_config())


# What it takes --------------------------------------------------------------------------------------------------------


def test_a_config_a_model_on_meta_and_a_real_model_are_the_same(report: MemoryReport) -> None:
    with torch.device("meta"):
        on_meta = llama()
    assert predicted(on_meta) == predicted(llama()) == report


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_presets_prepare_on_meta_as_on_real_weights(dtype: torch.dtype | None) -> None:
    """LP-LoRA by the preset's own code, with what the preset sets of the step."""
    preset = get_preset("lora", freeze_ratio=0.5, gradient_accumulation_steps=2, gradient_checkpointing=True)
    real = preset.prepare(AutoModelForCausalLM.from_config(llama_config(), dtype=dtype or torch.float32))
    expected = predicted(real, gradient_accumulation_steps=2, gradient_checkpointing=True)
    assert predicted(llama_config(), preset=preset, dtype=dtype) == expected
    options: dict[str, Any] = {"freeze_ratio": 0.5, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    assert predicted(llama_config(), preset="lora", dtype=dtype, **options) == expected


def test_qlora_from_a_config_is_qlora_from_weights(tmp_path: Path) -> None:
    preset = get_preset("qlora", gradient_accumulation_steps=1, lora_r=8, lora_dropout=0.0, max_grad_norm=1.0)
    report = predicted(llama_config(), preset=preset)
    real = qlora(tmp_path)
    assert report == predicted(real, gradient_checkpointing=True)
    assert report.parameters_bytes == measured(real, tmp_path, activation_checkpointing=True).parameters_bytes


def test_adalora_by_name_needs_no_length_of_the_run() -> None:
    """The memory of a step does not depend on it."""
    expected = predicted(llama_config(), preset=get_preset("adalora", total_step=50))
    assert predicted(llama_config(), preset="adalora") == expected


@pytest.mark.parametrize(
    ("preset", "option"),
    [("adalora", {"freeze_ratio": 0.5}), ("prefix-tuning", {"gradient_checkpointing": True})],
)
def test_what_a_preset_refuses_is_refused_beside_it_too(preset: str, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"'{next(iter(option))}' for '{preset}': "):
        predicted(llama_config(), preset=preset, **option)


def test_freezing_without_a_preset() -> None:
    assert predicted(llama_config(), freeze_ratio=0.5) == predicted(half_frozen(llama()))


def test_the_head_is_what_the_architectures_name() -> None:
    config = llama_config(num_labels=2)
    config.architectures = ["LlamaForSequenceClassification"]
    report = predicted(config)
    assert report == predicted(llama_classifier())
    assert report == predicted(llama_config(num_labels=2), task="sequence-classification")


def test_tied_weights_count_once() -> None:
    untied, tied = predicted(llama()), predicted(llama(tie_word_embeddings=True))
    assert untied.parameters_bytes - tied.parameters_bytes == 300 * 64 * 4
    assert predicted(llama_config(tie_word_embeddings=True)) == tied


def test_two_views_of_one_storage_count_once(report: MemoryReport) -> None:
    model = llama()
    model.lm_head.weight.data = model.model.embed_tokens.weight.data
    assert report.parameters_bytes - predicted(model).parameters_bytes == 300 * 64 * 4


def test_components_are_those_of_the_closed_form(report: MemoryReport) -> None:
    closed = estimate_model_memory(llama(), BATCH, TOKENS)
    assert report.parameters_bytes == round(closed["parameters_gb"] * 1e9)
    assert report.optimizer_bytes == round(closed["optimizer_gb"] * 1e9)


# What it leaves alone -------------------------------------------------------------------------------------------------


def test_the_real_model_is_untouched(tmp_path: Path) -> None:
    model = lora(half_frozen(llama()), dropout=0.1).eval()
    model.train(False)
    before = copy.deepcopy(model.state_dict())
    flags = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    predicted(model, gradient_checkpointing=True, attention="eager")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert flags == [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert not model.training and not model.get_base_model().is_gradient_checkpointing
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())


def test_random_states_and_the_readers_trainer_are_untouched(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), bf16=True, use_cpu=True, report_to=[])
    trainer = Trainer(llama(), arguments)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    predicted(llama_config())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert trainer.accelerator.mixed_precision == "bf16"


def test_a_model_that_was_trained_before(tmp_path: Path) -> None:
    """Its forward pass is still wrapped in the autocast of that run, which is not the one asked for."""
    model = llama()
    expected = predicted(model)
    measured(model, tmp_path, bf16=True)
    assert predicted(model) == expected


# What it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ("llama", {}, TypeError, "or a PreTrainedConfig, got str; load it with transformers"),
        (nn.Linear(2, 2), {}, TypeError, r"must be a PreTrainedModel .* got Linear"),
        (BertModel(bert_config()), {}, ValueError, "must end in a head .* got BertModel"),
        (llama_config(), {"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1, got 0"),
        (llama_config(), {"sequence_length": True}, ValueError, "sequence_length must be .* got True"),
        (llama_config(), {"optimizer": "adamw_tourch"}, ValueError, "got 'adamw_tourch'; did you mean adamw_torch"),
        (llama_config(), {"target": "gpu"}, ValueError, "target must be one of cpu, cuda, got 'gpu'"),
        (llama_config(), {"autocast": torch.float16}, ValueError, r"torch.bfloat16 or None, got torch.float16"),
        (llama_config(), {"attention": "flash"}, ValueError, "attention must be one of sdpa, eager, got 'flash'"),
        (llama_config(), {"padding": 1}, ValueError, "padding must be True or False, got 1"),
        (llama_config(), {"task": "lm"}, ValueError, "task must be one of causal-lm, .* got 'lm'"),
        (llama_config(), {"preset": "qlorra"}, ValueError, "got 'qlorra'; did you mean qlora"),
        (llama_config(), {"preset": "dpo"}, ValueError, "got 'dpo', whose step is that of TRL"),
        (llama_config(), {"preset": get_preset("sft", offload="activations")}, ValueError, "got offload="),
        (llama_config(), {"freeze_ratio": 1.5}, ValueError, "got 1.5"),
        (llama_config(), {"gradient_checkpointing": "yes"}, ValueError, "gradient_checkpointing must be .* got 'yes'"),
        (llama_config(), {"gradient_accumulation_steps": 0}, ValueError, "whole number of at least 1, got 0"),
        (llama_config(), {"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be a number of at least 0, got -1.0"),
        (llama(), {"preset": "lora"}, ValueError, "preset goes with a config, got preset='lora' with a model"),
        (llama(), {"dtype": torch.bfloat16}, ValueError, "dtype goes with a config"),
        (llama(), {"freeze_ratio": 0.5}, ValueError, "freeze_ratio goes with a config"),
        (llama_config(num_labels=1), {"task": "sequence-classification"}, ValueError, "got num_labels=1"),
    ],
)  # fmt: skip
def test_bad_input_says_rule_value_and_fix(
    given: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    sizes = {"batch_size": BATCH, "sequence_length": TOKENS}
    with pytest.raises(error, match=message):
        profile_training_memory(given, **(sizes | options))


def test_weights_in_8_bits_are_refused() -> None:
    model = llama()
    model.lm_head.weight.SCB = torch.ones(300)
    with pytest.raises(ValueError, match="plain tensors or 4-bit ones of bitsandbytes, got Parameter"):
        predicted(model)


def test_more_tokens_than_positions_warn() -> None:
    with pytest.warns(UserWarning, match="at most the model's 32 positions, got 64"):
        predicted(llama_config(max_position_embeddings=32))


def test_experts_are_refused_where_values_decide() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(
        **sizes, intermediate_size=64, vocab_size=100, num_local_experts=2, experts_implementation="eager"
    )
    with pytest.raises(ValueError, match="must not depend on the values of tensors"):
        predicted(config)


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_report_adds_up(report: MemoryReport) -> None:
    assert sum(report.components.values()) == report.peak_bytes
    assert report.peak_bytes == max(report.phase_peaks.values()) == report.phase_peaks[report.phase]
    assert max(size for _, size in report.timeline) == report.peak_bytes
    assert {phase for phase, _ in report.timeline} == {"forward", "backward", "optimizer"}
    sizes = [tensor.bytes for tensor in report.largest]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == BATCH * TOKENS * 300 * 4
    assert report.timeline[-1][1] < report.timeline[0][1] + 4096, "gradients and activations are gone"


def test_large_tensors_name_their_module() -> None:
    named = {(t.operation, t.module) for t in predicted(llama_config()).largest}
    assert any(module.startswith("model.layers.") for _, module in named)


def test_the_report_is_printed_plotted_and_plain(report: MemoryReport, tmp_path: Path) -> None:
    printed = str(report)
    assert f"predicted peak {report.peak_bytes / 2**20:,.1f} MiB, in the backward phase" in printed
    assert "optimizer state" in printed and "second optimizer step" in printed
    report.plot(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads(json.dumps(report.to_dict()))
    assert again["peak_bytes"] == report.peak_bytes
    assert again["components"] == report.components


def test_cuda_says_that_no_gpu_has_checked_it(report: MemoryReport) -> None:
    on_cuda = predicted(llama_config(), target="cuda")
    assert "No GPU has checked this prediction" in str(on_cuda)
    assert not any("GPU" in sentence for sentence in report.assumptions)
    assert on_cuda.peak_bytes % 512 == 0


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_cuda_kernels_keep_no_scores(padding: bool, autocast: torch.dtype | None, checkpointed: bool) -> None:
    """Memory is linear in the tokens but for what the mathematical kernel (fp32, shared keys) keeps."""
    config = llama_config(num_key_value_heads=4, num_hidden_layers=1)
    options: dict[str, Any] = {"target": "cuda", "autocast": autocast, "gradient_checkpointing": checkpointed}
    one, two = (profile_training_memory(config, 1, t, padding=padding, **options) for t in (512, 1024))
    mask = padding * 6 * (1024**2 - 512**2)  # boolean, as a number and as it is added
    growth = two.components["activations"] - 2 * one.components["activations"]
    assert growth < mask + 2**16


def test_published_estimates_by_hand() -> None:
    model = half_frozen(llama())
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = {"accelerate": 16 * total, "deepspeed": 20 * total, "seed": 4 * total + 12 * trainable}
    assert published_estimates(model) == expected
    halved = published_estimates(model.bfloat16())
    assert halved == {"accelerate": 8 * total, "deepspeed": 20 * total, "seed": 2 * total + 6 * trainable}


def test_published_estimates_of_packed_weights_are_of_all_that_they_stand_for() -> None:
    model = model_from_config(llama_config(), preset="qlora")
    logical = sum(p.numel for p in parameter_storage(model))
    assert logical > 1.3 * sum(p.numel() for p in model.parameters())
    assert published_estimates(model)["accelerate"] == 16 * logical


# Command line ---------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "forge.memory", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_command_line_from_a_config_file(tmp_path: Path) -> None:
    config = LlamaConfig.from_dict(llama_config().to_dict() | {"architectures": ["LlamaForCausalLM"]})
    config.save_pretrained(tmp_path)
    sizes = ["--batch-size", str(BATCH), "--sequence-length", str(TOKENS)]
    files = ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "plot.png")]
    done = command(str(tmp_path / "config.json"), "--preset", "lora", *sizes, *files)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["report"]["peak_bytes"] == predicted(config, preset="lora").peak_bytes
    assert set(figures["other_estimates"]) == {"accelerate", "deepspeed", "seed"}
    assert (tmp_path / "plot.png").exists()
    assert "predicted peak" in done.stdout and "DeepSpeed ZeRO-2" in done.stdout


def test_wrong_input_on_the_command_line_is_one_line(tmp_path: Path) -> None:
    llama_config().save_pretrained(tmp_path)
    done = command(str(tmp_path), "--preset", "qlorra")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "did you mean qlora" in errors[0]
    assert "Traceback" not in done.stderr


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from forge.memory.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
