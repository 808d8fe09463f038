"""Offload to host memory: activations, optimizer state, parameters; each by what torch, bitsandbytes and FSDP have.

What needs which hardware is in ``docs/memory_tactics.md``. A tactic that the machine cannot carry out raises here:
``transformers`` ignores ``fsdp`` on a CPU, and bitsandbytes falls back to ordinary optimizers there, both silently.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from forge.presets.checks import check_choice

TACTICS = ("activations", "optimizer", "parameters")
"""What can be offloaded."""


def validated_offload(offload: object) -> tuple[str, ...]:
    """The tactics as a tuple of names; None is none of them.

    Raises:
        ValueError: for a tactic that does not exist or is named twice, or two that exclude each other.
    """
    given = () if offload is None else (offload,) if isinstance(offload, str) else offload
    if not isinstance(given, tuple | list) or not all(isinstance(tactic, str) for tactic in given):
        raise ValueError(f"offload must be None, a name or several of {', '.join(TACTICS)}, got {offload!r}; name one")
    for tactic in given:
        check_choice("offload", tactic, TACTICS)
    if len(set(given)) < len(given):
        raise ValueError(f"offload must name each tactic once, got {given}; drop the repeated one")
    if {"optimizer", "parameters"} <= set(given):
        raise ValueError(
            f"offload must not name both 'optimizer' and 'parameters', got {given}; "
            "'parameters' keeps the optimizer state of its shards on the host already: leave 'optimizer' out"
        )
    return tuple(given)


def offload_arguments(offload: tuple[str, ...]) -> dict[str, Any]:
    """Training arguments that carry out the offload of optimizer state or of parameters.

    Raises:
        RuntimeError: if there is no CUDA device, or, for parameters, the process was not started by ``torchrun`` or
            ``accelerate launch``.
        ImportError: if bitsandbytes, which has the paged optimizer, is missing.
    """
    arguments: dict[str, Any] = {}
    if "optimizer" in offload:
        _need_cuda("optimizer", "paged optimizer state lives in CUDA's unified memory")
        if find_spec("bitsandbytes") is None:
            raise ImportError("offload='optimizer' needs bitsandbytes, got none; pip install bitsandbytes")
        arguments["optim"] = "paged_adamw_32bit"
    if "parameters" in offload:
        _need_cuda("parameters", "FSDP streams parameters from the host to a GPU")
        if "LOCAL_RANK" not in os.environ:
            raise RuntimeError(
                "offload='parameters' must run under torchrun or accelerate launch (one process is enough), got a "
                "plain Python process; start it with: torchrun --nproc_per_node 1 train.py"
            )
        arguments |= {"fsdp": True, "fsdp_config": {"cpu_offload": True}}
    return arguments


def offload_activations(model: nn.Module) -> None:
    """Keep what the forward pass saves for the backward pass in host memory, in every training step from now on.

    Weights, which autograd saves too, stay where they are: the device holds them anyway. With activation checkpointing
    it is the checkpoints that move.

    Args:
        model: hooks are put on it; gradients stay bitwise the same.
    """
    open_contexts: list[ExitStack] = []

    def enter(module: nn.Module, *_: Any) -> None:
        stack = ExitStack()
        if module.training and torch.is_grad_enabled():
            stack.enter_context(_activations_on_host(module))
        open_contexts.append(stack)

    def leave(*_: Any) -> None:
        open_contexts.pop().close()

    model.register_forward_pre_hook(enter, prepend=True)
    model.register_forward_hook(leave, always_call=True)


def _activations_on_host(module: nn.Module) -> saved_tensors_hooks:
    accelerator = torch.accelerator.current_accelerator()
    device_type = "cpu" if accelerator is None else accelerator.type
    host = save_on_cpu(pin_memory=device_type == "cuda", device_type=device_type)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in weights else host.pack_hook(tensor)

    def unpack(saved: Any) -> Tensor:
        return saved if isinstance(saved, Tensor) else host.unpack_hook(saved)

    return saved_tensors_hooks(pack, unpack)


def _need_cuda(tactic: str, reason: str) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"offload={tactic!r} must have a CUDA device ({reason}), got none; run it on a GPU, or leave it out"
        )
