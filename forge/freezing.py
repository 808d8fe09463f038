"""Freezing: train the upper layers of a model only (section «Layer Freezing» of THEORY.md).

``setup_lp_lora_style`` freezes the lower share of the layers of a plain or a PEFT model; ``freeze_layers``,
``freeze_by_name`` and ``freeze_embeddings`` choose otherwise, ``unfreeze`` takes one of them back, and
``GradualUnfreezing`` lets training begin at the top and work its way down. A frozen parameter has no gradient, so
optimizers neither move nor decay it and hold no state for it. Nothing here ever makes a parameter trainable that
was not so before, thus no base weight under an adapter.

With everything below some layer frozen, the backward pass stops at that layer, activations below it are not kept.
That is why the embeddings are frozen with the lower layers unless told otherwise. Activation checkpointing is kept
right: ``transformers`` then marks the embeddings as requiring gradients, for the reentrant kind, which loses all
gradients without; the other kind, the default, does without the mark, and is spared the backward pass that it costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Real
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import ParallelMode, TrainingArguments

from forge.checks import check_whole
from forge.layers import Layer, find_layers
from forge.memory.optimizers import embedding_parameters, optimizer_state_bytes


@dataclass(frozen=True)
class FreezeReport:
    """What one call has frozen; ``unfreeze`` takes it back."""

    layers: tuple[str, ...]
    """Names of the layers that are frozen."""
    total_layers: int
    """Layers that the choice was made from; 0 if it was not made by layer."""
    parameters: tuple[str, ...]
    """Names of the parameters that trained before the call and do not now."""
    frozen_params: int
    """Numbers in them."""
    trainable_params: int
    """Numbers that are left to train."""
    head_frozen: bool
    """Whether the output head is frozen because it is tied to frozen embeddings."""

    def __str__(self) -> str:
        layers = f"{len(self.layers)} of {self.total_layers} layers frozen, " if self.total_layers else ""
        head = "; the output head is tied to the embeddings and frozen with them" if self.head_frozen else ""
        return f"{layers}{self.frozen_params:,} parameters newly frozen, {self.trainable_params:,} left to train{head}"


def setup_lp_lora_style(
    model: nn.Module, freeze_ratio: float = 0.5, *, freeze_embeddings: bool = True, stack: str | None = None
) -> FreezeReport:
    """Freeze the lower share of the layers, and the embeddings below them; under LoRA the upper adapters train then.

    Layers count in forward order: of an encoder–decoder the encoder's come first, so that half of T5 is its encoder;
    of a multimodal model the towers come before the language model, see ``find_layers``. What lies above all layers
    (norm, head) goes on training.

    Args:
        model: plain or wrapped by PEFT, quantised or not.
        freeze_ratio: share of the layers in [0, 1]; ⌊share · layers⌋ are frozen. 0 changes nothing.
        freeze_embeddings: freeze the embeddings too. Left trainable, they force the backward pass through every frozen
            layer, which saves gradients and optimizer state but hardly time or activations. A tied output head is
            frozen with them (the report says so); to train it, leave them trainable.
        stack: count only the layers of this stack (``Layer.stack``), such as ``model.language_model.layers``.

    Raises:
        NoLayersError: if the model has no stack of layers.
        ValueError: if ``freeze_ratio`` is outside [0, 1] or less than one layer, if ``stack`` is unknown, or if no
            parameter of the layers trains, or none at all would.
    """
    if not isinstance(freeze_ratio, Real) or isinstance(freeze_ratio, bool) or not 0 <= freeze_ratio <= 1:
        raise ValueError(f"freeze_ratio must be a number in [0, 1], got {freeze_ratio!r}; 0.5 freezes the lower half")
    total = len(_stacked(find_layers(model), stack))
    count = math.floor(round(freeze_ratio * total, 9))  # 0.29 · 100 is 28.999… in floating point
    if freeze_ratio > 0 and count == 0:
        raise ValueError(
            f"freeze_ratio must be 0 or cover at least one of {total} layers, got {freeze_ratio}; "
            f"use {1 / total:.3g} or more"
        )
    return freeze_layers(model, count, freeze_embeddings=freeze_embeddings, stack=stack)


def freeze_layers(
    model: nn.Module, count: int, *, freeze_embeddings: bool = True, stack: str | None = None
) -> FreezeReport:
    """Freeze the lowest ``count`` layers, as ``setup_lp_lora_style`` does with a share of them.

    A parameter that a frozen layer shares with one that trains (Zamba) is frozen.

    Raises:
        ValueError: if ``count`` is not from 0 to the number of layers; else as ``setup_lp_lora_style``.
    """
    layers = find_layers(model)
    chosen = _stacked(layers, stack)
    check_whole("count", count, 0, at_most=len(chosen), hint="that is the number of layers")
    lower = chosen[:count]
    if count and not any(p.requires_grad for layer in layers for p in layer.module.parameters()):
        raise ValueError(
            f"freezing layers needs layers that train, got none in {type(model).__name__}: what trains lies outside "
            "them (prompt learning) or everything is frozen already; make layers trainable first, or do not freeze"
        )
    below = _embeddings(model, layers) if count and freeze_embeddings else []
    return _freeze(model, [*_parameters_of(lower), *below], lower, len(chosen))


def freeze_by_name(model: nn.Module, patterns: str | Sequence[str]) -> FreezeReport:
    """Freeze the parameters whose dotted names match a pattern, such as ``*.mlp.*`` or ``model.layers.[0-3].*``.

    Args:
        model: plain or wrapped by PEFT, whose names begin with ``base_model.model.``.
        patterns: shell-style patterns (``fnmatch``) of whole names; a tied parameter answers to each of its names.

    Raises:
        ValueError: if a pattern matches nothing, or nothing would be left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    matched: list[Tensor] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [p for name, p in named.items() if fnmatchcase(name, pattern)]
        if not hits:
            known = [*named, *(f"{name}.*" for name, _ in model.named_modules() if name)]
            raise ValueError(
                f"each pattern must match a parameter, got {pattern!r}, which matches none; "
                f"near misses: {get_close_matches(pattern, known, n=5)}"
            )
        matched += hits
    return _freeze(model, matched)


def freeze_embeddings(model: nn.Module) -> FreezeReport:
    """Freeze the embeddings of tokens, positions and types with their norms and projections (and a head tied to them).

    These are, outside the layers and the output head, all parameters of an ``nn.Embedding`` and those that have
    ``emb`` in their name. The vectors of prompt learning are none of them.

    Raises:
        ValueError: if there are none, or nothing would be left to train.
    """
    found = _embeddings(model, find_layers(model))
    if not found:
        raise ValueError(f"the model must have embeddings, got {type(model).__name__} without; use freeze_by_name")
    return _freeze(model, found)


def unfreeze(model: nn.Module, report: FreezeReport) -> None:
    """Make exactly those parameters trainable again that the reported call froze.

    Raises:
        ValueError: if the model lacks one of them.
    """
    named = dict(model.named_parameters())
    if missing := [name for name in report.parameters if name not in named]:
        raise ValueError(f"the report must be of this model, got one with {missing[0]}; pass the model it was made on")
    for name in report.parameters:
        named[name].requires_grad_(True)


def get_memory_savings_estimate(model: nn.Module, optimizer: str = "adamw_torch") -> dict[str, float]:
    """Memory of gradients and optimizer state that the model as it stands does without, in GB (10⁹ bytes).

    Exact from the shapes and dtypes of the parameters that are frozen, a tied one counted once. The comparison is with
    the same model with everything training that can: under PEFT the active adapters, for base weights have no
    gradients in either case; otherwise all but quantised weights. Activations, of which freezing from below saves the
    more the higher it reaches, are not part of it.

    Args:
        model: plain or wrapped by PEFT, after freezing.
        optimizer: as for ``forge.memory.optimizer_state_bytes``, mostly a name for ``TrainingArguments(optim=…)``.

    Returns:
        ``gradient_saved_gb``, ``optimizer_saved_gb`` and ``total_saved_gb``.

    Raises:
        ValueError: if the optimizer is unknown.
    """
    everything, embeddings = _can_train(model), embedding_parameters(model)
    training = [p for p in everything if p.requires_grad]
    gradient = sum(p.numel() * p.element_size() for p in everything if not p.requires_grad)
    before, now = (optimizer_state_bytes(held, optimizer, embeddings=embeddings) for held in (everything, training))
    return {
        "gradient_saved_gb": gradient / 1e9,
        "optimizer_saved_gb": (before - now) / 1e9,
        "total_saved_gb": (gradient + before - now) / 1e9,
    }


class GradualUnfreezing(TrainerCallback):
    """Train the top layers first and let lower ones join, stage by stage, the embeddings last of all.

    ``Trainer(callbacks=[GradualUnfreezing(2, every=1, unit="epoch")])``. What is trainable when training begins is
    what is unfrozen in the end, and is trainable again after it: give the Trainer an unfrozen model. So the optimizer
    knows every parameter from the start; those of lower layers have no gradients, and for the optimizer no weight
    decay and no state, until their stage begins. The stage follows from the step alone: a resumed run takes the same
    path. Heads above the layers train from the beginning, except one tied to the embeddings. Put the callback after
    ``EMACallback``, which averages what is trainable when it starts.

    Source: Howard & Ruder 2018, arXiv:1801.06146, §3.3 (one layer more each epoch).

    Args:
        top_layers: layers that train from the beginning.
        every: length of a stage in ``unit``.
        unit: ``"epoch"`` or ``"step"`` (of the optimizer).
        layers_per_stage: layers that join at each stage.

    Raises:
        ValueError: for a number below 1 or another unit; from ``train()`` if there is nothing left to unfreeze.
        NotImplementedError: from ``train()`` with sharded parameters (FSDP, DeepSpeed), or with DDP that does not look
            for unused parameters.
    """

    def __init__(
        self,
        top_layers: int = 1,
        *,
        every: int = 1,
        unit: Literal["epoch", "step"] = "epoch",
        layers_per_stage: int = 1,
    ) -> None:
        for name, value in {"top_layers": top_layers, "every": every, "layers_per_stage": layers_per_stage}.items():
            check_whole(name, value)
        if unit not in ("epoch", "step"):
            raise ValueError(f"unit must be 'epoch' or 'step', got {unit!r}; a stage lasts `every` of them")
        self.top_layers = top_layers
        self.every = every
        self.unit = unit
        self.layers_per_stage = layers_per_stage
        self.frozen_levels = 0
        """Layers, and the embeddings as one more, that wait for their stage."""
        self._levels: list[list[nn.Parameter]] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Freeze all but the top layers, or what the stage of the resumed step leaves frozen."""
        self._hold(0)  # an interrupted run may have left some frozen
        self._levels = _trainable_levels(kw["model"])
        if self.top_layers >= len(self._levels):
            raise ValueError(
                f"top_layers must be less than the {len(self._levels)} layers that train (embeddings count as one), "
                f"got {self.top_layers}; leave GradualUnfreezing out to train all from the start"
            )
        _check_parallel(args, kw["model"])
        known = {id(p) for group in kw["optimizer"].param_groups for p in group["params"]}
        if any(id(p) not in known for level in self._levels for p in level):
            raise ValueError(
                "the optimizer must hold every parameter that is to be unfrozen, got one that lacks some; "
                "create it while they are trainable"
            )
        _check_rank_allocation(kw["model"])
        _keep_checkpointing_right(kw["model"])
        self._follow(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Begin the stage that is due."""
        self._follow(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Leave the model as trainable as it was before."""
        self._hold(0)

    def _follow(self, state: TrainerState) -> None:
        past = state.global_step if self.unit == "step" else int(state.epoch or 0)
        training = self.top_layers + past // self.every * self.layers_per_stage
        count = max(0, len(self._levels) - training)
        if count != self.frozen_levels:
            self._hold(count)

    def _hold(self, count: int) -> None:
        """Freeze the lowest ``count`` levels and no others; what two levels share goes with the lower one."""
        self.frozen_levels = count
        for level in self._levels[count:]:
            _set_trainable(level, True)
        for level in self._levels[:count]:
            _set_trainable(level, False)


def _freeze(model: nn.Module, chosen: Iterable[Tensor], layers: Sequence[Layer] = (), total: int = 0) -> FreezeReport:
    """Freeze what trains of the chosen parameters, unless nothing would be left."""
    ids = {id(p) for p in chosen}
    newly = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in ids}
    left = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in ids)
    if newly and not left:
        raise ValueError(
            f"something must be left to train, got all {sum(p.numel() for p in newly.values()):,} trainable parameters "
            "to freeze; freeze fewer layers"
        )
    if newly:
        _check_rank_allocation(model)
        _keep_checkpointing_right(model)
    _set_trainable(newly.values(), False)
    return FreezeReport(
        layers=tuple(layer.name for layer in layers),
        total_layers=total,
        parameters=tuple(newly),
        frozen_params=sum(p.numel() for p in newly.values()),
        trainable_params=left,
        head_frozen=any(p is frozen for p in _head(model).parameters() for frozen in newly.values()),
    )


def _set_trainable(parameters: Iterable[Tensor], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None  # a gradient that is left would still be applied by the next optimizer step


def _parameters_of(layers: Iterable[Layer]) -> list[nn.Parameter]:
    return [p for layer in layers for p in layer.module.parameters()]


def _stacked(layers: list[Layer], stack: str | None) -> list[Layer]:
    stacks = list(dict.fromkeys(layer.stack for layer in layers))
    if stack is not None and stack not in stacks:
        raise ValueError(f"stack must be one of {', '.join(stacks)}, got {stack!r}")
    return [layer for layer in layers if stack in (None, layer.stack)]


def _head(model: nn.Module) -> nn.Module:
    """The output projection, an empty module if there is none."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else nn.Module()


def _embeddings(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Parameter]:
    inside, head = {id(p) for p in _parameters_of(layers)}, set(_head(model).modules())
    around = {layer.stack[:end] for layer in layers for end, c in enumerate(layer.stack) if c == "."}
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        outer = max((a for a in around if f"{path}.".startswith(f"{a}.")), key=len, default="")
        named = "emb" in path[len(outer) :].lower()
        if module in head or "prompt_encoder" in path.split("."):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in inside and (named or isinstance(module, nn.Embedding) or "emb" in name.lower()):
                found.append(parameter)
    return found


def _trainable_levels(model: nn.Module) -> list[list[nn.Parameter]]:
    """What can be unfrozen at once, from the bottom: the embeddings, then layer after layer; none is empty."""
    layers = find_layers(model)
    levels = [_embeddings(model, layers), *(_parameters_of([layer]) for layer in layers)]
    trainable = [[p for p in level if p.requires_grad] for level in levels]
    return [level for level in trainable if level]


def _can_train(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that would train if nothing were frozen, each once: the active adapters, or all of a plain model."""
    parameters = _adapters(model) if hasattr(model, "peft_config") else model.parameters()
    plain = (p for p in parameters if type(p) is nn.Parameter and p.is_floating_point() and p.element_size() > 1)
    return list({id(p): p for p in plain}.values())


def _adapters(model: Any) -> Iterable[nn.Parameter]:
    """Parameters of the active adapters of a PEFT model, of its modules to save and of its prompt encoder."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    active = model.active_adapters
    names = active() if callable(active) else active  # a method where transformers itself holds the adapters
    biases = {getattr(model.peft_config[name], "bias", "none") for name in names}
    holders: list[Any] = [getattr(model, "prompt_encoder", {})]
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            holders += [attrgetter(name)(module) for name in module.adapter_layer_names]
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter) and any(kind.endswith("_only") for kind in biases):
                yield bias
    held: list[Any] = [holder[name] for holder in holders for name in names if name in holder]
    for adapter in held:
        yield from [adapter] if isinstance(adapter, nn.Parameter) else adapter.parameters()
    if "all" in biases:
        yield from (p for name, p in model.named_parameters() if "bias" in name)


def _keep_checkpointing_right(model: nn.Module) -> None:
    """Before every forward pass, see to it that activation checkpointing goes with frozen embeddings."""
    outermost = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if outermost is not None and _match_checkpointing not in outermost._forward_pre_hooks.values():
        outermost.register_forward_pre_hook(_match_checkpointing)


def _match_checkpointing(model: PreTrainedModel, _: Any) -> None:
    """Mark the embeddings' output as requiring gradients under reentrant checkpointing, and under that alone.

    The reentrant kind gives no gradient to a block whose inputs require none; the other kind does.
    """
    if not model.training or torch.compiler.is_compiling():
        return
    checkpointed = next((m for m in model.modules() if getattr(m, "gradient_checkpointing", False)), None)
    if checkpointed is None:
        return
    options = getattr(checkpointed._gradient_checkpointing_func, "keywords", {})
    if not options.get("use_reentrant", True):
        model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    elif getattr(model, "_require_grads_hook", None) is None:
        model.enable_input_require_grads()  # type: ignore[no-untyped-call]


def _check_rank_allocation(model: nn.Module) -> None:
    for config in getattr(model, "peft_config", {}).values():
        if str(getattr(config.peft_type, "value", "")) == "ADALORA":
            raise ValueError(
                "every adapter must train under AdaLoRA, whose rank allocation reads all their gradients, got some "
                "to freeze; give AdaLoraConfig(layers_to_transform=[...]) the upper layers instead"
            )


def _check_parallel(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse what freezes no parameter once the model is wrapped."""
    if args.deepspeed or args.fsdp:
        raise NotImplementedError(
            "GradualUnfreezing needs whole parameters, got sharded ones (FSDP, DeepSpeed); use DDP, or freeze once"
        )
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    finds = args.ddp_find_unused_parameters
    if finds is None:
        finds = not (isinstance(model, PreTrainedModel) and checkpointing)
    if args.parallel_mode == ParallelMode.DISTRIBUTED and not finds:
        raise NotImplementedError(
            "GradualUnfreezing under DDP needs ddp_find_unused_parameters=True, got False (the Trainer's default with "
            "activation checkpointing); set it"
        )
