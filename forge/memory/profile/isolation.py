"""What building a Trainer changes around it, kept from it: random states, accelerate's state, the environment.

Without this, asking for a prediction between building a Trainer and training it would move that Trainer to the CPU.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import masking_utils, modeling_attn_mask_utils
from transformers import trainer as trainer_module
from transformers.utils import logging as transformers_logging

_MASK_CODE: tuple[Any, ...] = (masking_utils, modeling_attn_mask_utils)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave every global state as it was, and be quiet: warnings are about a run that does not take place."""
    trainer_code: Any = trainer_module
    with ExitStack() as stack, warnings.catch_warnings():
        for state in (PartialState, AcceleratorState, GradientState):
            stack.callback(_restore, state._shared_state, dict(state._shared_state))
            state._shared_state.clear()
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(setattr, trainer_code, "set_seed", trainer_code.set_seed)
        trainer_code.set_seed = lambda *_, **__: None  # fake tensors draw nothing
        stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity(logging.ERROR)
        warnings.simplefilter("ignore")
        yield


@contextmanager
def masks_as_in_training() -> Iterator[None]:
    """Have ``transformers`` build its attention masks as for real tensors.

    It takes fake tensors for the tracing of a graph, in which it builds masks that training does without. The choice
    between the two reads the padding, which the recorder answers for.
    """
    kept: list[Callable[..., bool]] = [module.is_tracing for module in _MASK_CODE]
    for module in _MASK_CODE:
        module.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        for module, is_tracing in zip(_MASK_CODE, kept, strict=True):
            module.is_tracing = is_tracing


def _restore_environment(kept: dict[str, str]) -> None:
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    for name, value in kept.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _restore(state: dict[str, Any], kept: dict[str, Any]) -> None:
    state.clear()
    state.update(kept)
