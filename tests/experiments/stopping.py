"""A trial's context that asks to stop."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass
class Context:
    """Asks to stop at the given call of ``should_stop``; 0: never."""

    work_dir: Path
    stop_at: int = 0
    asked: int = 0

    def report(self, step: int, total: int, **figures: object) -> None:
        """Nothing."""

    def should_stop(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_at

    def wandb_run_id(self) -> None:
        return None
