"""What MonitorCallback adds to a training step: one gradient check, as a share of the step.

    python benchmarks/monitor_overhead.py --threads 1

A step is forward, backward, clipping, AdamW and the release of the gradients. Each round runs the same step with and
without the check, in alternating order, and then times the check alone on the gradients of that step. The share is the
median over rounds of check / step within a round: the difference of two whole steps would drown in their noise, and is
shown beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from timing import build_model, measure, median_interval, paired_ratio

if TYPE_CHECKING:
    from torch import nn

PLAIN, WATCHED, CHECK = "step", "step with the check", "check alone"
TARGET = 0.02
"""Largest share of a step that the check may take."""


@dataclass(frozen=True)
class Settings:
    """Measure what one gradient check adds to a training step."""

    model_size: Literal["smollm2-135m", "tiny"] = "smollm2-135m"
    """Shapes of the model."""
    batch_size: int = 4
    """Sequences of a step."""
    sequence_length: int = 128
    """Tokens of a sequence."""
    threads: int = 1
    """CPU threads of torch."""
    rounds: int = 10
    """Measured rounds; each runs every contender once."""
    device: str = "cpu"
    """Where the model lives."""
    json: Path | None = None
    """File for the figures, in milliseconds."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; the default is a small step")
        if self.rounds < 6:
            raise ValueError(f"rounds must be at least 6 for an interval of the median, got {self.rounds}; give more")


def training_step(model: nn.Module, settings: Settings) -> Callable[[bool], None]:
    """A step that checks the gradients before clipping, or does not; it leaves them for the timing of the check."""
    import torch

    from forge.monitor import check_gradient_health

    rows = torch.randint(0, 1_000, (settings.batch_size, settings.sequence_length), device=settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(check: bool) -> None:
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        if check:
            check_gradient_health(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def report(milliseconds: dict[str, list[float]], settings: Settings) -> dict[str, Any]:
    """Print the table and return what it shows."""
    from rich.console import Console
    from rich.table import Table

    title = f"{settings.model_size}, {settings.batch_size} x {settings.sequence_length} tokens, {settings.device}"
    table = Table("", "median ms", "95 % interval", title=title)
    for name, values in milliseconds.items():
        low, high = median_interval(values)
        table.add_row(name, f"{statistics.median(values):.2f}", f"{low:.2f} … {high:.2f}")
    share, interval = paired_ratio(milliseconds[CHECK], milliseconds[PLAIN])
    whole, whole_interval = paired_ratio(milliseconds[WATCHED], milliseconds[PLAIN])
    met = "met" if interval[1] <= TARGET else "met within noise" if interval[0] <= TARGET else "missed"
    table.add_section()
    table.add_row(
        "check / step",
        f"{share:.2%}",
        f"{interval[0]:.2%} … {interval[1]:.2%} (target {TARGET:.0%}: {met})",
    )
    table.add_row(
        "step with / without − 1", f"{whole - 1:.2%}", f"{whole_interval[0] - 1:.2%} … {whole_interval[1] - 1:.2%}"
    )
    Console(width=110).print(table)
    plan = {key: str(value) for key, value in asdict(settings).items() if key != "json"}
    figures = {"share": share, "interval": interval, "target": TARGET, "met": met}
    return {"settings": plan, "ms": milliseconds, **figures, "whole_steps": whole - 1}


def main(settings: Settings) -> None:
    """Measure, print and, where asked, store the figures."""
    import torch

    from forge.monitor import check_gradient_health

    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model = build_model(settings.model_size, settings.device)
    step = training_step(model, settings)
    step(False)
    contenders = {
        PLAIN: lambda: step(False),
        WATCHED: lambda: step(True),
        CHECK: lambda: check_gradient_health(model),
    }
    if os.getloadavg()[0] > 0.5:
        print(f"the load average is {os.getloadavg()[0]:.1f}: the figures below are of a busy machine", file=sys.stderr)
    figures = report(measure(contenders, settings.rounds, settings.device), settings)
    if settings.json is not None:
        settings.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings))
