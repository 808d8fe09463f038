"""Measured peaks by hand, and of one step of the Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, default_data_collator

from forge.memory import MeasuredMemory, MeasureMemory, measure_peak_bytes, profile_training_memory
from tests.forge.memory.training import BATCH, TOKENS, half_frozen, llama, lora, measured, qlora, rows

KIB = 1024


def test_peak_by_hand() -> None:
    """1 KiB on top of 2, both gone, then 2 of their own."""
    held = torch.zeros(KIB, dtype=torch.uint8)

    def step() -> None:
        first = torch.zeros(2 * KIB, dtype=torch.uint8)
        second = torch.zeros(KIB, dtype=torch.uint8)
        del first, second
        torch.zeros(2 * KIB, dtype=torch.uint8)

    assert measure_peak_bytes(step, device="cpu", baseline_bytes=held.nbytes) == 4 * KIB


def test_a_step_that_allocates_nothing_and_one_that_fails() -> None:
    assert measure_peak_bytes(lambda: None, device="cpu", baseline_bytes=7) == 7
    with pytest.raises(ZeroDivisionError):
        measure_peak_bytes(lambda: 1 // 0, device="cpu", baseline_bytes=0)
    assert measure_peak_bytes(lambda: None, device="cpu", baseline_bytes=7) == 7, "the profiler is free again"
    with pytest.raises(ValueError, match="cpu and cuda, got meta; move the model there"):
        measure_peak_bytes(lambda: None, device="meta", baseline_bytes=0)


def test_components_are_those_of_the_tensors(tmp_path: Path) -> None:
    model = half_frozen(llama())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = sum(p.requires_grad for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    found = measured(model, tmp_path)
    buffers = sum(b.nbytes for b in model.buffers())
    assert found.parameters_bytes == 4 * total + buffers
    assert found.gradients_bytes == 4 * trainable
    assert found.optimizer_bytes == 8 * trainable + 4 * count
    assert found.device == "cpu"
    held = found.parameters_bytes + found.gradients_bytes + found.optimizer_bytes
    assert found.rest_bytes == found.peak_bytes - held > 0


def test_the_first_step_peaks_lower_than_the_others(tmp_path: Path) -> None:
    first, second, third = (measured(llama(), tmp_path, step=step) for step in (1, 2, 3))
    assert first.peak_bytes + second.optimizer_bytes == second.peak_bytes == third.peak_bytes


def test_measuring_changes_no_result(tmp_path: Path) -> None:
    def trained(callbacks: list[MeasureMemory]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = llama()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        )
        collator = default_data_collator
        Trainer(model, arguments, train_dataset=rows(model, False), data_collator=collator, callbacks=callbacks).train()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained([]), trained([MeasureMemory()]), strict=True))


def test_training_that_ends_before_the_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step must be one of this run's, 1 to 3, got 9"):
        measured(llama(), tmp_path, step=9)
    measure, stopped = MeasureMemory(3), TrainerState(global_step=2)
    with pytest.raises(
        RuntimeError, match="step 3 for its memory to be measured, got a run that was stopped at step 2"
    ):
        measure.on_train_end(TrainingArguments(str(tmp_path)), stopped, TrainerControl())
    with pytest.raises(ValueError, match="step must be one of this run's, 3 to 6, got 2"):
        MeasureMemory(2).on_train_begin(
            TrainingArguments(str(tmp_path)), TrainerState(global_step=2, max_steps=6), TrainerControl()
        )


@pytest.mark.parametrize("step", [0, -1, True, 1.5])
def test_a_step_is_a_whole_number_from_1(step: int) -> None:
    with pytest.raises(ValueError, match=f"step must be a whole number of at least 1, got {step!r}"):
        MeasureMemory(step)


def test_one_callback_measures_one_run_after_another(tmp_path: Path) -> None:
    measure = MeasureMemory()
    results: list[MeasuredMemory | None] = []
    for vocabulary in (300, 600):
        model = llama(vocab_size=vocabulary)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        )
        Trainer(
            model, arguments, train_dataset=rows(model, False), data_collator=default_data_collator, callbacks=[measure]
        ).train()
        results.append(measure.measured)
    first, second = results
    assert first is not None and second is not None
    assert second.parameters_bytes - first.parameters_bytes == 2 * 300 * 64 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full", "full, bf16", "full, autocast", "LoRA", "QLoRA"])
def test_prediction_is_near_the_real_peak_on_cuda(kind: str, tmp_path: Path) -> None:
    """Models of some size: cuBLAS keeps workspaces of 8 to 32 MiB that no prediction has."""
    torch.cuda.empty_cache()
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32_000}
    if kind == "QLoRA":
        model = qlora(tmp_path)
    else:
        model = llama(**sizes, num_attention_heads=16, num_key_value_heads=4)
        model = lora(model) if kind == "LoRA" else model.bfloat16() if kind == "full, bf16" else model
    autocast = torch.bfloat16 if kind in ("full, autocast", "QLoRA") else None
    report = profile_training_memory(model, BATCH, TOKENS, autocast=autocast, target="cuda")
    real = measured(model, tmp_path, use_cpu=False, bf16=autocast is not None)
    workspaces = 32 * 2**20
    assert report.peak_bytes * 0.97 <= real.peak_bytes <= report.peak_bytes * 1.03 + workspaces
