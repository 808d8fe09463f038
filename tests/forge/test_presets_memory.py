"""Memory tactics: accumulation equals the full batch, offload changes no gradient, and what cannot work says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, ViTConfig, ViTForImageClassification, set_seed

from forge import get_preset
from forge.presets.offload import offload_arguments
from tests.forge.presets_models import FAMILIES, make_examples, make_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LENGTHS = (2, 3, 5, 9)
"""Valid labels of the four sequences, unequal on purpose."""


class Gradients(TrainerCallback):
    """The gradient at the first optimizer step, before clipping."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient(family: str, folder: Path, name: str = "sft", examples: Any = None, **overrides: Any) -> Tensor:
    """Gradient of the first optimizer step over the four sequences."""
    set_seed(0)
    preset = get_preset(name, max_grad_norm=0, output_dir=str(folder), **overrides)
    model = preset.prepare(make_model(family))
    seen = Gradients()
    arguments = preset.get_training_args(max_steps=1, save_strategy="no", report_to=[], disable_tqdm=True)
    examples = make_examples(family, LENGTHS) if examples is None else examples
    Trainer(model, arguments, train_dataset=examples, callbacks=[seen]).train()
    return seen.flat


@pytest.mark.parametrize("name", ["sft", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bert-classifier", "t5", "bart"])
def test_accumulation_equals_the_full_batch(family: str, name: str, tmp_path: Path) -> None:
    """4 micro-batches of 1 against 1 batch of 4, tokens unequal; also where the model ignores num_items_in_batch."""
    full = gradient(family, tmp_path, name, per_device_train_batch_size=4)
    accumulated = gradient(family, tmp_path, name, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert full.norm() > 1e-3
    torch.testing.assert_close(accumulated, full, rtol=0, atol=1e-6)


class ForgetfulForCausalLM(LlamaForCausalLM):
    """It predicts the next token, as a Llama does, and does not pass on how many labels there are."""

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


def test_accumulation_counts_the_labels_that_are_left_after_the_shift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_model("llama").config
    monkeypatch.setitem(FAMILIES, "forgetful", lambda: ForgetfulForCausalLM(config))
    full = gradient("forgetful", tmp_path, per_device_train_batch_size=4)
    torch.testing.assert_close(full, gradient("llama", tmp_path, per_device_train_batch_size=4))
    parts = gradient("forgetful", tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(parts, full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("labels", [1, 3])
def test_accumulation_of_losses_that_are_given_the_number_of_labels_and_ignore_it(
    labels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squared errors of one label, binary cross-entropies of several: the config need not name the problem."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=8, patch_size=4, num_labels=labels, **sizes)
    monkeypatch.setitem(FAMILIES, "vit", lambda: ViTForImageClassification(config))
    drawn = torch.Generator().manual_seed(0)
    examples = [
        {"pixel_values": torch.randn(3, 8, 8, generator=drawn), "labels": torch.rand(labels, generator=drawn)}
        for _ in range(4)
    ]
    full = gradient("vit", tmp_path, examples=examples, per_device_train_batch_size=4)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert full.norm() > 1e-3
    torch.testing.assert_close(gradient("vit", tmp_path, examples=examples, **parts), full, rtol=0, atol=1e-6)


def test_the_fused_loss_of_liger_is_refused() -> None:
    """Its forward divides by the number of labels itself, past the loss function that ``prepare`` watches."""
    preset = get_preset("lora", gradient_accumulation_steps=4)
    for config in ({}, {"liger_kernel_config": {"rope": True}}):
        with pytest.raises(ValueError, match=r"use_liger_kernel must come without its fused loss.*add 'fused_linear"):
            preset.get_training_args(use_liger_kernel=True, **config)
    kernels = {"fused_linear_cross_entropy": False}
    assert preset.get_training_args(use_liger_kernel=True, liger_kernel_config=kernels).use_liger_kernel


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_mean_of_micro_batches_is_another_gradient(family: str, tmp_path: Path) -> None:
    full = gradient(family, tmp_path, per_device_train_batch_size=4)
    parts = [
        gradient(family, tmp_path, examples=[example], per_device_train_batch_size=1)
        for example in make_examples(family, LENGTHS)
    ]
    assert (torch.stack(parts).mean(0) - full).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_transformers_alone_adds_up_the_means(family: str, tmp_path: Path) -> None:
    """Why ``normalise_over_batch`` exists; if this fails, transformers has been repaired and it can go."""
    preset = get_preset("sft", max_grad_norm=0, output_dir=str(tmp_path), per_device_train_batch_size=1)
    gradients = []
    for steps in (1, 4):
        seen = Gradients()
        arguments = preset.get_training_args(
            max_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, gradient_accumulation_steps=steps
        )
        same = [make_examples(family, (4,))[0]] * 4
        Trainer(make_model(family), arguments, train_dataset=same, callbacks=[seen]).train()
        gradients.append(seen.flat)
    torch.testing.assert_close(gradients[1], 4 * gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_give_the_same_gradients(family: str, checkpointing: bool, tmp_path: Path) -> None:
    common = {"gradient_checkpointing": checkpointing, "per_device_train_batch_size": 4}
    plain = gradient(family, tmp_path, **common)
    offloaded = gradient(family, tmp_path, offload="activations", **common)
    assert plain.numel() and torch.equal(offloaded, plain)


def test_what_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations pass through torch's save_on_cpu, weights do not; in training alone."""
    packed: list[int] = []
    torch_init = save_on_cpu.__init__

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        torch_init(self, *args, **kwargs)
        pack = self.pack_hook
        self.pack_hook = lambda tensor: packed.append(tensor.untyped_storage().data_ptr()) or pack(tensor)

    monkeypatch.setattr(save_on_cpu, "__init__", spy)
    model = get_preset("sft", offload="activations").prepare(make_model("llama"))
    batch = {k: torch.stack([e[k] for e in make_examples("llama")]) for k in make_examples("llama")[0]}
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    assert not packed
    model(**batch).loss.backward()
    assert len(packed) > 20
    assert not set(packed) & {p.untyped_storage().data_ptr() for p in model.parameters()}


def test_an_error_in_the_forward_pass_ends_the_offload() -> None:
    model = get_preset("sft", offload="activations").prepare(make_model("llama")).train()
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10_000))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
@pytest.mark.parametrize("tactic", ["optimizer", "parameters"])
def test_offload_that_needs_cuda(tactic: str) -> None:
    """bitsandbytes and transformers would both go on without it, silently."""
    with pytest.raises(RuntimeError, match=f"offload='{tactic}' must have a CUDA device .*got none; run it on a GPU"):
        get_preset("sft", offload=tactic).get_training_args()


def test_offload_arguments_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert offload_arguments(("optimizer",)) == {"optim": "paged_adamw_32bit"}
    with pytest.raises(
        RuntimeError, match=r"must run under torchrun or accelerate launch .*got a plain Python process"
    ):
        offload_arguments(("parameters",))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert offload_arguments(("parameters",)) == {"fsdp": True, "fsdp_config": {"cpu_offload": True}}
    monkeypatch.setattr("forge.presets.offload.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs bitsandbytes, got none"):
        offload_arguments(("optimizer",))


@pytest.mark.gpu
def test_offloaded_activations_leave_the_gpu(tmp_path: Path) -> None:
    peaks, gradients = [], []
    for offload in (None, "activations"):
        set_seed(0)
        model = get_preset("sft", offload=offload).prepare(make_model("llama")).cuda().train()
        tokens = torch.randint(3, 100, (8, 512), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=tokens, labels=tokens).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert peaks[1] < 0.8 * peaks[0]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.gpu
def test_offloaded_optimizer_trains(tmp_path: Path) -> None:
    assert gradient("llama", tmp_path, offload="optimizer").numel()
