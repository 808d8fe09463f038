"""Predicted peaks of training steps beside real ones, and beside what others estimate.

    python benchmarks/memory_prediction.py --json memory.json
    python benchmarks/memory_prediction.py --device cuda --json memory_cuda.json

Every case is a model of random weights, trained for two optimizer steps by ``transformers.Trainer``; the second is
measured, on a CPU by torch's profiler, on CUDA by ``torch.cuda.max_memory_allocated``. The models have SmolLM2-135M's
shape; on CUDA there are Mistral-7B's, too (140 GB are enough; ``--max-gib`` leaves out what is predicted to be larger).
First, in processes of their own, come the time and the memory that predictions for Mistral-7B take.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from timing import SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MIB = 2**20
MISTRAL: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Settings:
    """Compare predicted with real peaks of training steps."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the real steps run."""
    only: str = ""
    """Run the cases whose names contain this."""
    max_gib: float = 130.0
    """Leave out cases that are predicted to need more."""
    mistral: bool = True
    """Time predictions for Mistral-7B, on the CPU."""
    threads: int = 1
    """CPU threads of torch."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")


@dataclass(frozen=True)
class Case:
    """One way to train one model."""

    name: str
    model: Literal["smollm2-135m", "mistral-7b"] = "smollm2-135m"
    batch_size: int = 1
    sequence_length: int = 128
    of_model: dict[str, Any] = field(default_factory=dict)
    """Options of ``model_from_config``."""
    of_step: dict[str, Any] = field(default_factory=dict)
    """Further options of ``profile_training_memory``."""


def cases(device: str) -> Iterator[Case]:
    """All cases of a device."""
    methods: dict[str, dict[str, Any]] = {
        "full": {},
        "half frozen": {"freeze_ratio": 0.5},
        "LoRA": {"preset": "lora"},
        "QLoRA": {"preset": "qlora", "gradient_checkpointing": False},
    }
    precisions: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"dtype": "bfloat16"}}
    one = {"gradient_accumulation_steps": 1}
    autocast = {"autocast": True}
    for name, method in methods.items():
        for precision, dtype in precisions.items():
            yield Case(f"{name}, {precision}", of_model=method | dtype, of_step=one)
        yield Case(f"{name}, fp32, autocast", of_model=method, of_step=one | autocast)
        checkpointed = method | {"gradient_checkpointing": True}
        yield Case(f"{name}, fp32, checkpointed", of_model=checkpointed, of_step=one)
        yield Case(f"{name}, fp32, checkpointed, 512 tokens", sequence_length=512, of_model=checkpointed, of_step=one)
    for name in ("full", "QLoRA"):
        accumulated = {"gradient_accumulation_steps": 3} | autocast
        yield Case(f"{name}, fp32, autocast, accumulated", of_model=methods[name], of_step=accumulated)
    for optimizer in ("adamw_torch", "adafactor", "sgd"):
        yield Case(f"full, fp32, {optimizer}", of_step=one | {"optimizer": optimizer})
    yield Case("full, fp32, padding", batch_size=2, of_step=one | {"padding": True})
    yield Case("full, fp32, eager", sequence_length=512, of_model={"attention": "eager"}, of_step=one)
    classifier = {"task": "sequence-classification"}
    yield Case("classifier, full, fp32", batch_size=4, of_model=classifier, of_step=one)
    yield Case("classifier, LoRA, fp32", batch_size=4, of_model=classifier | {"preset": "lora"}, of_step=one)
    if device == "cuda":
        yield from _large_cases(methods, one)


def _large_cases(methods: dict[str, dict[str, Any]], one: dict[str, Any]) -> Iterator[Case]:
    bf16 = {"dtype": "bfloat16"}
    for name, method in methods.items():
        for checkpointed in (False, True):
            of_model = method | bf16 | {"gradient_checkpointing": checkpointed}
            title = f"Mistral-7B, {name}, bf16{', checkpointed' if checkpointed else ''}"
            yield Case(title, "mistral-7b", sequence_length=2048, of_model=of_model, of_step=one)
    foreach = one | {"optimizer": "adamw_torch"}
    yield Case(
        "Mistral-7B, full, bf16, adamw_torch", "mistral-7b", sequence_length=2048, of_model=bf16, of_step=foreach
    )


def config_of(case: Case) -> PreTrainedConfig:
    """Config of the case's model."""
    from transformers import LlamaConfig, MistralConfig

    if case.model == "mistral-7b":
        return MistralConfig(**MISTRAL, sliding_window=4096)
    return LlamaConfig(**SIZES[case.model], pad_token_id=0)


def options_of(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the model and of the step, with torch's dtypes for their names."""
    import torch

    dtype = getattr(torch, case.of_model.get("dtype", "float32"))
    step = {key: value for key, value in case.of_step.items() if key != "autocast"}
    return case.of_model | {"dtype": dtype}, step | {"autocast": torch.bfloat16 if "autocast" in case.of_step else None}


def predict(case: Case, target: str) -> int:
    """Predicted peak in bytes."""
    from forge.memory import profile_training_memory

    of_model, of_step = options_of(case)
    shape = (case.batch_size, case.sequence_length)
    return profile_training_memory(config_of(case), *shape, target=target, **of_model, **of_step).peak_bytes


def measure(case: Case, device: str) -> int:
    """Real peak in bytes of the second of two steps."""
    import torch
    from transformers import Trainer, TrainingArguments, default_data_collator

    from forge import get_preset
    from forge.memory import MeasureMemory
    from forge.memory.profile import model_from_config
    from forge.memory.profile.structure import structural_copy

    of_model, of_step = options_of(case)
    model = structural_copy(model_from_config(config_of(case), **of_model), device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.02)
    preset = get_preset(of_model["preset"]) if "preset" in of_model else None
    norm = 1.0 if preset is None else preset.max_grad_norm
    callback = MeasureMemory()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=case.batch_size,
            gradient_accumulation_steps=of_step["gradient_accumulation_steps"],
            activation_checkpointing=of_model.get("gradient_checkpointing", False),
            bf16=of_step["autocast"] is not None,
            optim=of_step.get("optimizer", TrainingArguments.default_optim),
            max_grad_norm=norm,
            use_cpu=device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        data = _rows(case)
        Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator, callbacks=[callback]).train()
    assert callback.measured is not None
    return callback.measured.peak_bytes


def _rows(case: Case) -> Any:
    """Random tokens with labels; half of each sequence masked where the case has padding."""
    import torch

    ids = torch.randint(1, 32_000, (16, case.sequence_length), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    if case.of_model.get("task") == "sequence-classification":
        rows = [row | {"labels": torch.tensor(index % 2)} for index, row in enumerate(rows)]
    if case.of_step.get("padding"):
        mask = (torch.arange(case.sequence_length) < case.sequence_length // 2).long()
        rows = [row | {"attention_mask": mask} for row in rows]
    return rows


def others(case: Case) -> dict[str, int]:
    """What others estimate, and our closed form where it knows the model."""
    from forge.memory import estimate_model_memory, published_estimates
    from forge.memory.profile import model_from_config

    of_model, of_step = options_of(case)
    model = model_from_config(config_of(case), **of_model)
    closed = estimate_model_memory(
        model,
        case.batch_size,
        case.sequence_length,
        optimizer=of_step.get("optimizer", "adamw_torch"),
        gradient_checkpointing=of_model.get("gradient_checkpointing", False),
        autocast_dtype=of_step["autocast"],
    )
    estimates = published_estimates(model, autocast=of_step["autocast"] is not None)
    return estimates | {"closed form": round(closed["total_estimated_gb"] * 1e9)}


def cost_of_prediction(preset: str) -> dict[str, Any]:
    """Seconds and process memory of a prediction for Mistral-7B on CUDA, imports apart."""
    import resource

    import forge.memory.profile  # noqa: F401  (not part of the time)

    case = Case("", "mistral-7b", sequence_length=2048, of_model={"preset": preset, "dtype": "bfloat16"})
    began = time.perf_counter()
    peak = predict(case, "cuda")
    seconds, high_water = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"preset": preset, "seconds": seconds, "process_mib": high_water / 1024, "predicted_mib": peak / MIB}


def time_predictions() -> list[dict[str, Any]]:
    """Print and return what predictions for Mistral-7B cost, each in a fresh process."""
    from rich.console import Console
    from rich.table import Table

    presets = ("sft", "lora", "qlora")
    context = multiprocessing.get_context("spawn")
    costs = []
    for preset in presets:
        with context.Pool(1) as pool:
            costs.append(pool.apply(cost_of_prediction, (preset,)))
    table = Table("preset", "seconds", "process MiB", "predicted MiB", title="Predictions for Mistral-7B, 1 × 2048")
    for cost in costs:
        figures = (f"{cost['seconds']:.1f}", f"{cost['process_mib']:.0f}", f"{cost['predicted_mib']:,.0f}")
        table.add_row(cost["preset"], *figures)
    Console(width=120).print(table)
    return costs


def run_cases(settings: Settings) -> list[dict[str, Any]]:
    """Predict and measure each case."""
    import torch

    rows = []
    for case in (case for case in cases(settings.device) if settings.only in case.name):
        predicted = predict(case, settings.device)
        if predicted > settings.max_gib * 2**30:
            print(f"left out: {case.name}, predicted {predicted / 2**30:.1f} GiB", file=sys.stderr)
            continue
        measured = measure(case, settings.device)
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        rows.append({"case": case.name, "predicted": predicted, "measured": measured, "others": others(case)})
        print(f"{case.name}: {predicted / measured - 1:+.3%}", file=sys.stderr)
    return rows


def report(rows: list[dict[str, Any]], settings: Settings) -> None:
    """Print errors of all estimates, relative to what was measured."""
    import torch
    from rich.console import Console
    from rich.table import Table

    where = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    names = list(rows[0]["others"])
    columns = ("case", "measured MiB", "predicted", *names)
    table = Table(*columns, title=f"Errors of estimated peaks, {where}, torch {torch.__version__}")
    for row in rows:
        relative = [f"{row['others'][name] / row['measured'] - 1:+.0%}" for name in names]
        error = row["predicted"] / row["measured"] - 1
        table.add_row(row["case"], f"{row['measured'] / MIB:,.1f}", f"{error:+.3%}", *relative)
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    table.caption = f"{len(rows)} cases, largest error of the prediction {worst:.3%}"
    Console(width=140).print(table)


def main(settings: Settings) -> None:
    """Measure, print and, where asked, store the figures."""
    import torch

    torch.set_num_threads(settings.threads)
    if os.getloadavg()[0] > 0.5:
        print(f"the load average is {os.getloadavg()[0]:.1f}: the seconds below are of a busy machine", file=sys.stderr)
    costs = time_predictions() if settings.mistral else []
    rows = run_cases(settings)
    report(rows, settings)
    if settings.json is not None:
        plan = {key: str(value) for key, value in asdict(settings).items() if key != "json"}
        settings.json.write_text(json.dumps({"settings": plan, "mistral": costs, "rows": rows}, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings))
