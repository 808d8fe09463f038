"""Weights & Biases: one run per trial (group = experiment, job type = factor levels), offline unless logged in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from experiments.harness.experiment import UserError
from experiments.harness.record import TrialSpec

WandbMode = Literal["offline", "online", "disabled"]


def default_mode() -> WandbMode:
    """``$WANDB_MODE`` if set, else online for a user who is logged in, else offline."""
    chosen = os.environ.get("WANDB_MODE")
    if chosen in ("offline", "online", "disabled"):
        return chosen  # type: ignore[return-value]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    import netrc

    try:
        return "online" if "api.wandb.ai" in netrc.netrc().hosts else "offline"
    except (FileNotFoundError, netrc.NetrcParseError):
        return "offline"


@contextmanager
def wandb_run(spec: TrialSpec, mode: WandbMode, folder: Path) -> Iterator[str | None]:
    """The trial's W&B run, to which the Trainer logs; yields its id, or None when disabled.

    Args:
        spec: becomes the run's config.
        mode: offline runs are uploaded later with ``wandb sync``.
        folder: where W&B keeps its files.

    Raises:
        UserError: if W&B cannot start the run. Where it cannot end one, a warning must do: the trial has its outcome.
    """
    if mode == "disabled":
        yield None
        return
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            id=spec.trial_id,
            resume="allow",
            project="transformers-forge",
            group=f"{spec.experiment}-v{spec.version}-{spec.scale}",
            job_type=" ".join(f"{k}={v}" for k, v in spec.factors.items()),
            name=f"{spec.trial_id} seed={spec.seed}",
            config=spec.model_dump(mode="json"),
            mode=mode,
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise UserError(f"W&B cannot start a run ({error}); mend that, or give --wandb offline or disabled") from error
    exit_code = 1
    try:
        yield run.id
        exit_code = 0
    finally:
        try:
            run.finish(exit_code=exit_code)
        except wandb.Error as error:
            print(f"warning: W&B run {run.id} did not end well ({error}); the trial is not touched", file=sys.stderr)
