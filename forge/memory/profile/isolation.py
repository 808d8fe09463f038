"""What building a Trainer changes around it, put back: random states, accelerate's state, the environment.

Without this, asking for a prediction between building a Trainer and training it would move that Trainer to the CPU.
"""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import masking_utils, modeling_attn_mask_utils
from transformers.utils import logging as transformers_logging

_MASK_CODE: tuple[Any, ...] = (masking_utils, modeling_attn_mask_utils)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave every global state as it was, and be quiet: warnings are about a run that does not take place."""
    verbosity, environment = transformers_logging.get_verbosity(), dict(os.environ)
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack, torch.random.fork_rng(), warnings.catch_warnings():
        for state in (PartialState, AcceleratorState, GradientState):
            stack.callback(_restore, state._shared_state, dict(state._shared_state))
            state._shared_state.clear()
        stack.callback(_restore, os.environ, environment)
        stack.callback(random.setstate, python)
        stack.callback(np.random.set_state, numpy)
        stack.callback(transformers_logging.set_verbosity, verbosity)
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


def _restore(state: Any, kept: dict[str, Any]) -> None:
    state.clear()
    state.update(kept)
