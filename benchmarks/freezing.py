"""Time of a training step with 0, 50 and 75 % of the layers frozen.

    python benchmarks/freezing.py --threads 1

A step is forward pass, backward pass and AdamW (fused where the device has it) on one batch of random tokens. Every
share has a model of its own, of the same weights, so that optimizer state is only where it would be; the embeddings
(and the tied head with them) are frozen with the layers, unless ``--no-freeze-embeddings``. With
``--activation-checkpointing`` layers are recomputed in the backward pass.

Beside each ratio stands the share of the arithmetic that is left, with a forward pass as one unit and a backward pass
as two (input and weight gradients), weights and head by their number of multiplications; attention scores are left
out. It says what to expect where matrix products take all the time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from timing import SIZES, Update, build_model, measure, median_interval, paired_ratio

if TYPE_CHECKING:
    from torch import Tensor, nn

RATIOS = (0.0, 0.5, 0.75)


@dataclass(frozen=True)
class Settings:
    """Compare the time of a training step under shares of frozen layers."""

    model_size: Literal["smollm2-135m", "tiny"] = "smollm2-135m"
    """Shapes of the model."""
    threads: int = 1
    """CPU threads of torch."""
    rounds: int = 15
    """Measured rounds; each runs every share once."""
    batch_size: int = 1
    """Sequences per step."""
    sequence_length: int = 128
    """Tokens per sequence."""
    freeze_embeddings: bool = True
    """Freeze the embeddings with the layers."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    device: str = "cpu"
    """Where the model lives."""
    json: Path | None = None
    """File for the figures, in milliseconds."""

    def __post_init__(self) -> None:
        for name in ("threads", "batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < 6:
            raise ValueError(f"rounds must be at least 6 for an interval of the median, got {self.rounds}")


def label(ratio: float) -> str:
    return f"{ratio:.0%} frozen"


def training_step(ratio: float, tokens: Tensor, settings: Settings) -> tuple[Update, nn.Module]:
    """A step on a model of its own, and the model."""
    import torch

    from forge.freezing import setup_lp_lora_style

    torch.manual_seed(0)
    model = build_model(settings.model_size, settings.device).train()
    setup_lp_lora_style(model, ratio, freeze_embeddings=settings.freeze_embeddings)
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def arithmetic_left(ratio: float, settings: Settings) -> float:
    """Multiplications of a step with frozen layers over those of a full one, attention scores left out."""
    from forge.layers import find_layers

    model = build_model(settings.model_size, "meta")
    layers = [sum(p.numel() for p in layer.module.parameters()) for layer in find_layers(model)]
    head = model.get_output_embeddings().weight.numel()
    recompute = 1 if settings.activation_checkpointing else 0
    frozen = int(ratio * len(layers))
    head_passes = 2 if frozen and settings.freeze_embeddings else 3  # forward, input gradient, weight gradient
    lower_passes = 1 if settings.freeze_embeddings else 2 + recompute
    left = sum(layers[:frozen]) * lower_passes + sum(layers[frozen:]) * (3 + recompute) + head * head_passes
    return left / (sum(layers) * (3 + recompute) + 3 * head)


def report(milliseconds: dict[str, list[float]], models: dict[str, nn.Module], settings: Settings) -> dict[str, Any]:
    """Print the table and return what it shows."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from forge.freezing import get_memory_savings_estimate

    total = sum(p.numel() for p in models[label(0.0)].parameters())
    title = (
        f"One training step of {settings.model_size}, {total:,} fp32 parameters, {settings.batch_size} × "
        f"{settings.sequence_length} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    columns = ("layers", "median ms", "95 % interval", "of a full step", "95 % interval", "arithmetic", "GB saved")
    table, rows = Table(*columns, title=title, caption="GB: gradients and AdamW state"), []
    for ratio in RATIOS:
        values = milliseconds[label(ratio)]
        share, interval = paired_ratio(values, milliseconds[label(0.0)])
        saved = get_memory_savings_estimate(models[label(ratio)])["total_saved_gb"]
        row = {"ratio": ratio, "median": statistics.median(values), "of_full_step": share, "interval": interval}
        rows.append(row | {"arithmetic": arithmetic_left(ratio, settings), "total_saved_gb": saved})
        (low, high), (least, most) = median_interval(values), interval
        figures = (f"{row['median']:.1f}", f"{low:.1f} … {high:.1f}", f"{share:.3f}", f"{least:.3f} … {most:.3f}")
        table.add_row(label(ratio), *figures, f"{rows[-1]['arithmetic']:.3f}", f"{saved:.4f}")
    Console(width=120).print(table)
    plan = {key: str(value) for key, value in asdict(settings).items() if key != "json"}
    return {"settings": plan, "parameters": total, "ms": milliseconds, "rows": rows}


def main(settings: Settings) -> None:
    """Measure, print and, where asked, store the figures."""
    import torch

    torch.set_num_threads(settings.threads)
    shape = (settings.batch_size, settings.sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SIZES[settings.model_size]["vocab_size"], shape, generator=generator).to(settings.device)
    steps = {label(ratio): training_step(ratio, tokens, settings) for ratio in RATIOS}
    if os.getloadavg()[0] > 0.5:
        print(f"the load average is {os.getloadavg()[0]:.1f}: the figures below are of a busy machine", file=sys.stderr)
    milliseconds = measure({name: step for name, (step, _) in steps.items()}, settings.rounds, settings.device)
    figures = report(milliseconds, {name: model for name, (_, model) in steps.items()}, settings)
    if settings.json is not None:
        settings.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings))
