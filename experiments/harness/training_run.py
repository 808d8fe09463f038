"""What every training run has in common: where its model and data come from, and the recipe of its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from experiments.harness.experiment import UserError

if TYPE_CHECKING:
    from experiments.harness.training import TrainingPlan


def hidden() -> object:
    """Marks a field that is no option of the command line: ``Annotated[float, hidden()]``.

    Annotations are strings until tyro reads them, so that the list of experiments need not load it.
    """
    from tyro.conf import Suppress

    return Suppress


def unprefixed() -> object:
    """Marks a group of options whose names have no prefix on the command line; as lazy as ``hidden``."""
    from tyro.conf import arg

    return arg(name="")


@dataclass(frozen=True)
class TrainingRun:
    """Model, data and recipe of one training run; a task adds the size of its inputs and of its evaluations."""

    model: str
    """Embedded model, local folder, or hub id."""
    dataset: str
    """Embedded corpus, local file, or hub id."""
    method: str = "full"
    """What is trained."""
    random_init: bool = False
    """Build the model from its config alone, with random weights."""
    batch_size: int = 4
    """Sequences per optimizer step."""
    sequence_length: int = 128
    """Tokens per sequence."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 is autocast over fp32 weights."""

    def __post_init__(self) -> None:
        self._at_least_one("batch_size")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio}")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay must be at least 0, got {self.weight_decay}")

    def plan(self, seed: int, steps: int, schedule: str, **more: Any) -> TrainingPlan:
        """The recipe as a plan of ``steps`` optimizer steps; ``more`` are further fields of ``TrainingPlan``."""
        from experiments.harness.training import TrainingPlan

        return TrainingPlan(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule=schedule,
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            precision=self.precision,
            seed=seed,
            **more,
        )

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
