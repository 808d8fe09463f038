"""What a callback needs of the ``Trainer`` that calls it, and is not given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import Trainer


def trainer_call(argument: str) -> dict[str, Any]:
    """Locals of the innermost Trainer method on the call stack that has ``argument``, its ``self`` included.

    Callbacks are not given the Trainer, and only it can evaluate as it does, or knows what it resumes from.

    Raises:
        RuntimeError: if no Trainer is calling.
    """
    frame = sys._getframe()
    while frame is not None:
        if argument in frame.f_locals and isinstance(frame.f_locals.get("self"), Trainer):
            return dict(frame.f_locals)
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("this callback must be called by a transformers Trainer; pass it in Trainer(callbacks=[...])")


def saved_checkpoint(step: int) -> Path:
    """Folder of the checkpoint that the Trainer has just written, in ``on_save``.

    ``output_dir`` alone does not tell: ``hyperparameter_search`` gives each of its trials a folder there.
    """
    call = trainer_call("trial")
    return Path(call["self"]._get_output_dir(call["trial"])) / f"checkpoint-{step}"
