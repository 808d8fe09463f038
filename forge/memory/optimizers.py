"""Bytes of optimizer state, for the optimizers of ``TrainingArguments(optim=…)``, as they allocate it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor, nn

_STEP_BYTES = 4
"""torch.optim keeps the step of every parameter as an fp32 scalar."""
_BNB_BLOCK, _BNB_LEAST_8BIT, _BNB_CODE_BYTES = 256, 4096, 256 * 4
"""bitsandbytes: elements per block, smallest tensor with 8-bit state, and the fp32 code book of a state."""


def optimizer_state_bytes(parameters: Iterable[Tensor], optimizer: str, *, embeddings: Iterable[Tensor] = ()) -> int:
    """Bytes of optimizer state after the first step.

    ``adamw_torch``: two tensors of the parameter's own dtype, whatever it is, and the step counter. ``adafactor``: in
    fp32, a row and a column of second moments for each matrix (Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4; no
    first moment, as ``Trainer`` has it). 8-bit states (Dettmers et al. 2022, arXiv:2110.02861): a byte per element and
    an fp32 maximum per 256 of them; fp32 for tensors below 4096 elements and for embeddings. Paged states count like
    others, wherever the driver keeps them.

    Args:
        parameters: those that the optimizer holds and that get gradients; each once.
        optimizer: name for ``TrainingArguments(optim=…)``, or ``sgd_momentum`` for ``sgd`` with a momentum.
        embeddings: those of them that belong to ``nn.Embedding``, which ``Trainer`` keeps out of 8-bit states.

    Raises:
        ValueError: for a name that is not known (near misses listed).
    """
    rule = _rule(optimizer)
    in_fp32 = {id(p) for p in embeddings}
    held = list(parameters)
    total = sum(rule(p, id(p) in in_fp32) for p in held)
    if rule in _BNB_8BIT and any(_is_8bit(p, id(p) in in_fp32) for p in held):
        total += _BNB_8BIT[rule] * _BNB_CODE_BYTES
    return total


def embedding_parameters(model: nn.Module) -> list[Tensor]:
    """Weights of the ``nn.Embedding`` modules."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


Rule = Callable[[Tensor, bool], int]


def _of_own_dtype(states: int, p: Tensor, in_fp32: bool, *, step: int = _STEP_BYTES) -> int:
    return states * p.numel() * p.element_size() + step


def _of_fp32(states: int, p: Tensor, in_fp32: bool) -> int:
    return states * p.numel() * 4


def _of_8bit(states: int, p: Tensor, in_fp32: bool) -> int:
    if not _is_8bit(p, in_fp32):
        return _of_fp32(states, p, in_fp32)
    return states * (p.numel() + 4 * math.ceil(p.numel() / _BNB_BLOCK))


def _is_8bit(p: Tensor, in_fp32: bool) -> bool:
    return not in_fp32 and p.numel() >= _BNB_LEAST_8BIT


def _adafactor(p: Tensor, in_fp32: bool) -> int:
    """Row and column means of a matrix; ``RMS`` is an fp32 scalar (of the parameter's dtype when that is wider)."""
    elements = p.numel() if p.dim() < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2]
    width = max(4, torch.empty((), dtype=p.dtype).element_size())
    return elements * width + width


_NO_STATE = partial(_of_own_dtype, 0, step=0)
_ADAM, _ONE_AND_STEP = partial(_of_own_dtype, 2), partial(_of_own_dtype, 1)
_ADAM_32BIT, _ONE_32BIT = partial(_of_fp32, 2), partial(_of_fp32, 1)
_ADAM_8BIT, _ONE_8BIT = partial(_of_8bit, 2), partial(_of_8bit, 1)

_BNB_8BIT: dict[Rule, int] = {_ADAM_8BIT: 2, _ONE_8BIT: 1}
"""Code books that all tensors of such a state share."""

_RULES: dict[str, Rule] = {
    "adamw_torch": _ADAM,
    "adamw_torch_fused": _ADAM,
    "adafactor": _adafactor,
    "sgd": _NO_STATE,
    "sgd_momentum": partial(_of_own_dtype, 1, step=0),
    "adagrad": _ONE_AND_STEP,
    "rmsprop": _ONE_AND_STEP,
    "adamw_8bit": _ADAM_8BIT,
    "adamw_bnb_8bit": _ADAM_8BIT,
    "paged_adamw_8bit": _ADAM_8BIT,
    "paged_adamw_32bit": _ADAM_32BIT,
    "lion_8bit": _ONE_8BIT,
    "paged_lion_8bit": _ONE_8BIT,
    "lion_32bit": _ONE_32BIT,
    "paged_lion_32bit": _ONE_32BIT,
    "rmsprop_bnb_8bit": _ONE_8BIT,
    "rmsprop_bnb_32bit": _ONE_32BIT,
}

TRAINER_OPTIMIZERS = tuple(name for name in _RULES if name != "sgd_momentum")
"""Those of them that are names of ``TrainingArguments(optim=…)``."""


def _rule(optimizer: str) -> Rule:
    if isinstance(optimizer, str) and optimizer in _RULES:
        return _RULES[optimizer]
    near = get_close_matches(str(optimizer), _RULES, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(_RULES)}"
    raise ValueError(f"optimizer must be one whose state is known, got {optimizer!r}; {hint}")
