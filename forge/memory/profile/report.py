"""What a profiled step says: its peak, where it falls, what it is made of."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from forge.memory.profile.trace import Allocation, Component, Curve, Phase, rounded_up

MIB = 2**20
_LARGEST = 10
"""Tensors that the report names."""


@dataclass(frozen=True)
class LargeTensor:
    """One of the largest tensors that are alive at the peak."""

    bytes: int
    component: Component
    operation: str
    """That made it, such as ``aten::mm``; what it is, for parameters, optimizer state and inputs."""
    module: str
    """Whose forward pass made it; empty elsewhere."""
    phase: Phase
    """In which it was made."""


@dataclass(frozen=True)
class MemoryReport:
    """Predicted memory of one optimizer step, all sizes in bytes."""

    peak_bytes: int
    """Highest sum of what is allocated at once."""
    phase: Phase
    """In which the peak falls: forward, backward or optimizer (clipping included)."""
    components: dict[Component, int]
    """What is alive at the peak; the sum is ``peak_bytes``."""
    phase_peaks: dict[Phase, int]
    """Peak of each phase."""
    largest: tuple[LargeTensor, ...]
    """Largest tensors alive at the peak that the step itself has made: activations, temporaries, gradients."""
    timeline: tuple[tuple[Phase, int], ...]
    """Memory over the step: the phase and the bytes, wherever the curve turns."""
    assumptions: tuple[str, ...]
    """What the prediction takes for granted."""

    @property
    def parameters_bytes(self) -> int:
        """Parameters, buffers and quantisation state."""
        return self.components["parameters"]

    @property
    def gradients_bytes(self) -> int:
        """Gradients that are alive at the peak."""
        return self.components["gradients"]

    @property
    def optimizer_bytes(self) -> int:
        """State of the optimizer."""
        return self.components["optimizer_state"]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, texts, lists and dictionaries."""
        return asdict(self)

    def __str__(self) -> str:
        """A printed table."""
        text = io.StringIO()
        console = Console(file=text, width=120)
        console.print(self._component_table())
        console.print(self._tensor_table())
        for assumption in self.assumptions:
            console.print(f"- {assumption}", highlight=False, markup=False)
        return text.getvalue().rstrip()

    def plot(self, path: str | Path) -> None:
        """Draw memory over the step, with the peak marked, into an image file."""
        from forge.memory.profile.plot import plot_timeline

        plot_timeline(self, Path(path))

    def _component_table(self) -> Table:
        table = Table(title=f"predicted peak {self.peak_bytes / MIB:,.1f} MiB, in the {self.phase} phase", min_width=70)
        table.add_column("at the peak")
        table.add_column("MiB", justify="right")
        table.add_column("share", justify="right")
        for component, size in self.components.items():
            table.add_row(component.replace("_", " "), f"{size / MIB:,.1f}", f"{size / self.peak_bytes:.1%}")
        table.add_section()
        for phase, peak in self.phase_peaks.items():
            table.add_row(f"peak of {phase}", f"{peak / MIB:,.1f}", f"{peak / self.peak_bytes:.1%}")
        return table

    def _tensor_table(self) -> Table:
        table = Table(title="largest tensors that the step has made")
        table.add_column("MiB", justify="right")
        for name in ("component", "operation", "module", "made in"):
            table.add_column(name)
        for tensor in self.largest:
            size = f"{tensor.bytes / MIB:,.1f}"
            table.add_row(size, tensor.component, tensor.operation, tensor.module or "–", tensor.phase)
        return table


def report_of(curve: Curve, assumptions: Sequence[str], *, round_to: int) -> MemoryReport:
    """Sum up a recorded step.

    Args:
        curve: memory over the step.
        assumptions: sentences that go with the figures.
        round_to: multiple to which sizes are rounded up, as they are in the curve.
    """
    components: dict[Component, int] = dict.fromkeys(get_args(Component), 0)
    for allocation in curve.alive_at_peak:
        components[allocation.component] += rounded_up(allocation.bytes, round_to)
    peaks: dict[Phase, int] = dict.fromkeys(get_args(Phase), 0)
    for phase, balance in zip(curve.phases, curve.balances, strict=True):
        peaks[phase] = max(peaks[phase], balance)
    made = [a for a in curve.alive_at_peak if a.component in ("activations", "temporaries", "gradients")]
    return MemoryReport(
        peak_bytes=curve.balances[curve.peak_index],
        phase=curve.phases[curve.peak_index],
        components=components,
        phase_peaks=peaks,
        largest=tuple(_large(allocation) for allocation in made[:_LARGEST]),
        timeline=_turning_points(curve),
        assumptions=tuple(assumptions),
    )


def _large(made: Allocation) -> LargeTensor:
    return LargeTensor(made.bytes, made.component, made.operation, made.module, made.phase)


def _turning_points(curve: Curve) -> tuple[tuple[Phase, int], ...]:
    """Where the curve changes direction or phase, and its ends: it is straight between."""
    points = list(zip(curve.phases, curve.balances, strict=True))
    kept = [points[0]]
    for before, here, after in zip(points, points[1:], points[2:], strict=False):
        rises_on = (here[1] - before[1]) * (after[1] - here[1]) > 0
        if not rises_on or here[0] != after[0]:
            kept.append(here)
    return (*kept, points[-1])
