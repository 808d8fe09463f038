"""Memory of a training step before it is run: ``python -m forge.memory mistralai/Mistral-7B-v0.1 --preset qlora``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from forge.memory.profile import MemoryReport

WRONG_INPUT = 2
"""Exit code."""


@dataclass(frozen=True)
class Arguments:
    """Predict the peak memory of a training step from a model's config alone: no weights, no GPU."""

    model: tyro.conf.Positional[str]
    """Hub id, folder, or config.json."""
    preset: str | None = None
    """Recipe that prepares the model, such as sft, lora or qlora; see docs/presets.md."""
    batch_size: int = 1
    """Sequences of a micro-batch on one device."""
    sequence_length: int = 2048
    """Tokens of each sequence."""
    target: Literal["cpu", "cuda"] = "cpu"
    """Device that the step would run on; cuda is emulated."""
    task: Literal["causal-lm", "sequence-classification", "masked-lm", "seq2seq-lm"] | None = None
    """Head of the model. Default: what the config names."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights that are not quantised. Default: what the config names."""
    autocast: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run in bf16 autocast, as TrainingArguments(bf16=True); else as the preset has it."""
    optimizer: str | None = None
    """Name for TrainingArguments(optim=...). Default: as TrainingArguments has it."""
    freeze_ratio: float | None = None
    """Share of the layers, from the bottom, that does not train."""
    gradient_checkpointing: bool | None = None
    """Recompute layers in the backward pass. Default: as the preset has it."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches of an optimizer step. Default: as the preset has it, else 1."""
    max_grad_norm: float | None = None
    """To which gradients are clipped; 0: no clipping. Default: as the preset has it, else 1."""
    attention: Literal["sdpa", "eager"] | None = None
    """Implementation of attention."""
    padding: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Batches have an attention mask with padding."""
    json: Path | None = None
    """File for the report and the other estimates."""
    plot: Path | None = None
    """Image file for memory over the step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 2 wrong input)."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m forge.memory")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    try:
        report, others = _predict(arguments)
        if arguments.json is not None:
            figures = {"report": report.to_dict(), "other_estimates": others}
            arguments.json.write_text(json.dumps(figures, indent=1))
        if arguments.plot is not None:
            report.plot(arguments.plot)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return WRONG_INPUT
    print(report)
    print()
    print(_comparison(report, others))
    return 0


def _predict(arguments: Arguments) -> tuple[MemoryReport, dict[str, int]]:
    """Our report, and what others estimate for the same model."""
    import torch
    from transformers import AutoConfig, TrainingArguments

    from forge.memory.profile import model_from_config, profile_training_memory
    from forge.memory.rivals import published_estimates

    config = AutoConfig.from_pretrained(arguments.model)
    of_model: dict[str, Any] = {
        "task": arguments.task,
        "dtype": None if arguments.dtype is None else getattr(torch, arguments.dtype),
        "preset": arguments.preset,
        "freeze_ratio": arguments.freeze_ratio,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "attention": arguments.attention,
    }
    report = profile_training_memory(
        config,
        arguments.batch_size,
        arguments.sequence_length,
        autocast=torch.bfloat16 if arguments.autocast else None,
        optimizer=arguments.optimizer or TrainingArguments.default_optim,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        max_grad_norm=arguments.max_grad_norm,
        padding=arguments.padding,
        target=arguments.target,
        **of_model,
    )
    return report, published_estimates(model_from_config(config, **of_model), autocast=arguments.autocast)


def _comparison(report: MemoryReport, others: dict[str, int]) -> str:
    names = {
        "accelerate": "accelerate estimate-memory, training with Adam (no batch)",
        "deepspeed": "DeepSpeed ZeRO-2 on one GPU, no offload (no batch; frozen weights count)",
        "seed": "seed document, 4P + 4G + 8G (no activations)",
    }
    lines = [f"{report.peak_bytes / 2**30:10.2f} GiB  this prediction"]
    lines += [f"{others[name] / 2**30:10.2f} GiB  {text}" for name, text in names.items()]
    return "\n".join(["Estimates of the same training:", *lines])


if __name__ == "__main__":
    sys.exit(main())
