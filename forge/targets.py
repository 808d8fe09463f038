"""Which modules LoRA adapts: the attention projections (q, k, v, o) of any architecture, or what the user names.

Nothing is looked up by model name. A linear map counts as an attention projection if the name of a module that holds it
says «attention»: ``self_attn.q_proj`` of Llama, the fused ``attn.c_attn`` of GPT-2, ``attention.self.query`` and
``attention.output.dense`` of BERT, ``EncDecAttention.o`` of T5, ``query_key_value`` of Falcon, BLOOM and GPT-NeoX.

Source: arXiv:2106.09685 §4.2 adapts attention weights only; arXiv:2305.14314 §4 needs every linear map.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from torch import nn
from transformers.pytorch_utils import Conv1D

ATTENTION = "attention"
"""Stands for the attention projections, whatever they are called."""

ALL_LINEAR = "all-linear"
"""Stands for every linear map but the output head; PEFT resolves it itself."""

_ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)

ATTENTION_PATTERN = (
    r".*(?i:attn|attention)[^.]*\.(?:[^.]+\.)*"
    r"(?:[qkvo]_proj|out_proj|qkv_proj|in_proj|query_proj|key_proj|value_proj|query|key|value|query_key_value|dense|"
    r"c_attn|c_proj|Wqkv|Wo|[qkv]_lin|out_lin|[qkvo])"
)
"""Regular expression for ``target_modules`` that finds the attention projections where no model is at hand.

It knows the names that the families in the module's docstring use; ``resolve_target_modules`` needs no such list.
"""


def resolve_target_modules(model: nn.Module, target_modules: str | Sequence[str] = ATTENTION) -> list[str] | str:
    """``target_modules`` for a PEFT config on this model, checked: every name in it matches a module.

    Args:
        model: the model before adapters are added.
        target_modules: ``"attention"``, ``"all-linear"``, names (a whole dotted path or the end of one), or one regular
            expression for whole dotted paths.

    Returns:
        For ``"attention"`` the shortest names that match these projections and nothing else; otherwise what was given.

    Raises:
        ValueError: if there are no attention projections, or a name or the expression matches nothing (PEFT is
            content when one of several names matches); near misses are listed.
    """
    names = [name for name, _ in model.named_modules() if name]
    if target_modules == ATTENTION:
        return _shortest_names(_attention_projections(model), names)
    if target_modules == ALL_LINEAR:
        return ALL_LINEAR
    if isinstance(target_modules, str):
        if not any(re.fullmatch(target_modules, name) for name in names):
            raise _no_match(target_modules, names, "as a regular expression for whole names ")
        return target_modules
    for target in target_modules:
        if not any(_matches(name, target) for name in names):
            raise _no_match(target, names)
    return list(target_modules)


def is_transposed(model: nn.Module, targets: list[str] | str) -> bool:
    """Whether the targets are GPT-2's ``Conv1D``, which stores its weight as (in, out): PEFT's ``fan_in_fan_out``."""
    return any(isinstance(m, Conv1D) for name, m in model.named_modules() if _is_target(name, targets))


def _is_target(name: str, targets: list[str] | str) -> bool:
    if isinstance(targets, str):
        return targets == ALL_LINEAR or re.fullmatch(targets, name) is not None
    return any(_matches(name, target) for target in targets)


def _attention_projections(model: nn.Module) -> set[str]:
    fused = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    found = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and _ATTENTION_NAME.search(name.rpartition(".")[0])
        and not name.startswith(fused)  # reads the weights of its parts without calling them
    }
    if not found:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
        raise ValueError(
            f"target_modules='attention' needs linear maps inside modules named «attention», got none in "
            f"{type(model).__name__}; use 'all-linear', or name some of {linear}"
        )
    return found


def _shortest_names(chosen: set[str], names: Iterable[str]) -> list[str]:
    """Ends of dotted paths that match the chosen modules and no other."""
    exact: dict[str, bool] = {}
    short = set()
    for name in chosen:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            end = ".".join(parts[-length:])
            if end not in exact:
                exact[end] = all(other in chosen for other in names if _matches(other, end))
            if exact[end]:
                short.add(end)
                break
    return sorted(short)


def _matches(name: str, target: str) -> bool:
    """PEFT's rule for a name in a list."""
    return name == target or name.endswith(f".{target}")


def _no_match(target: str, names: list[str], how: str = "") -> ValueError:
    leaves = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    close = get_close_matches(target, leaves, n=4, cutoff=0.5) or leaves
    return ValueError(
        f"target_modules must match modules of the model, got {target!r}, which {how}matches none; "
        f"near misses: {', '.join(close)}"
    )
