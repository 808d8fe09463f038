"""What a callback needs of the ``Trainer`` that calls it, and is not given."""

from __future__ import annotations

import sys
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
