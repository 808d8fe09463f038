"""The curve of loss against averaging length that one training gives (section «EMA» of THEORY.md): its settings.

``experiments.harness.posthoc`` follows and evaluates it. A length is the width σ_rel of a power-function profile, as a
share of the run (Karras et al. 2024, arXiv:2312.02696).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.harness.experiment import UserError
from experiments.harness.record import EVAL_LOSS, Measurements, Metric, Observation

CHOSEN_LENGTH = Metric("chosen_sigma_rel", "1", "none")
"""Averaging length of an arm; the condition ``inside`` is False at an end of the grid, where it is a mere bound."""

NEARBY = 2.05
"""Lengths within this factor of the chosen one are near it: 2, and what the rounding of the grid takes."""

WIDEST = 12**-0.5
"""σ_rel of the uniform average of the whole run."""

LENGTHS = tuple(float(f"{0.25 * 2 ** (-i / 3):.3g}") for i in reversed(range(12)))
"""From 0.0197 to 0.25 in steps of the cube root of 2, so that a factor of 2 is three steps."""

FOLLOWED = (0.025, 0.15)
"""Widths of the two averages that are followed. With ten snapshots, the profiles of ``LENGTHS`` at the end of the run
come out of them within 11 % (a property of the profiles, whatever the run); with the widths 0.05 and 0.10 of the paper,
which stores far more snapshots, the shortest would be 20 % off."""


@dataclass(frozen=True)
class AveragingCurve:
    """How a curve is followed and which lengths are on it."""

    sigma_rel: tuple[float, ...] = LENGTHS
    """Averaging lengths as shares of the run, rising."""
    snapshots: int = 10
    """Snapshots of the two followed averages, evenly spread over the run, in half precision."""
    follow_every: int = 4
    """Optimizer steps between updates of the two: an update moves three times the bytes of the weights."""

    def __post_init__(self) -> None:
        for width in self.sigma_rel:
            if not 0 < width <= WIDEST:
                raise UserError(f"sigma_rel must be in (0, {WIDEST:.4f}], got {width}; 0.1 is a tenth of the run")
        if len(self.sigma_rel) < 2 or list(self.sigma_rel) != sorted(set(self.sigma_rel)):
            raise UserError(f"sigma_rel must be two or more rising widths, got {' '.join(map(str, self.sigma_rel))}")
        for name in ("snapshots", "follow_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> AveragingCurve:
        """From the settings of a trial, where tuples may have become lists."""
        return cls(**{**settings, "sigma_rel": tuple(settings["sigma_rel"])})

    def snapshot_every(self, steps: int) -> int:
        """Optimizer steps between snapshots of a run: a multiple of ``follow_every``."""
        return self.follow_every * max(1, round(steps / self.snapshots / self.follow_every))

    def snapshot_steps(self, steps: int) -> tuple[int, ...]:
        """Steps of the snapshots of a run, the last step among them."""
        every = self.snapshot_every(steps)
        return tuple(sorted({*range(every, steps + 1, every), steps}))

    def spread(self, count: int, steps: int) -> tuple[int, ...]:
        """``count`` of the snapshot steps, evenly spread over the run, the last step among them."""
        at = self.snapshot_steps(steps)
        return tuple(at[round(len(at) * (i + 1) / count) - 1] for i in range(count))

    def check_steps(self, steps: int) -> None:
        """Refuse (UserError) a run that is too short for two updates."""
        if steps < 2 * self.follow_every:
            raise UserError(f"steps must be at least {2 * self.follow_every}, twice curve.follow_every, got {steps}")

    @property
    def arms(self) -> tuple[dict[str, str], ...]:
        """Selectors of the lengths, for claims."""
        return tuple({"arm": posthoc_arm(width)} for width in self.sigma_rel)


SMOKE_CURVE = AveragingCurve(snapshots=3, follow_every=1)
"""For runs of a few steps."""


def posthoc_arm(sigma_rel: float) -> str:
    """Name of the arm of a length: ``posthoc_0.125``."""
    return f"posthoc_{sigma_rel:g}"


def observe_choice(into: Measurements, losses: Mapping[str, Mapping[float, float]], step: int) -> None:
    """Add the length that validation chose, and the one near it that is worst on test.

    Args:
        into: gets the outcomes; nothing where a loss was not finite.
        losses: by split, the loss of each length, in rising order.
        step: the step up to which was averaged.
    """
    if into.diverged:
        return
    validation, test = losses["validation"], losses["test"]
    widths, chosen = list(test), min(validation, key=validation.__getitem__)
    near = [width for width in widths if 1 / NEARBY < width / chosen < NEARBY]
    for arm, width in (("posthoc_chosen", chosen), ("posthoc_nearby", max(near, key=test.__getitem__))):
        inside = widths[0] < width < widths[-1]
        for metric, value, told in ((EVAL_LOSS, test[width], {}), (CHOSEN_LENGTH, width, {"inside": inside})):
            into.observations.append(Observation.of(metric, value, step, split="test", arm=arm, **told))
