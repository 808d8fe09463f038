"""Which WeightLoRA adapters matter, and keeping only those (section «WeightLoRA» of THEORY.md).

    s_i = |ω_i| ‖B_i A_i‖_F / Σ_j ‖B_j A_j‖_F                                                                   (2)

Equation (2) and «keep the K with the largest s_i, set the other ω_i = 0» are the lecture's. The paper
(arXiv:2506.02724) poses the choice as a constraint ‖ω‖₀ ≤ K on training: for the first T steps ω, with a learning rate
of its own, follows stochastic iterative hard thresholding, which after a gradient step keeps the K largest ω_i and
zeroes the rest (its authors' code does not look at B and A); afterwards the adapters with ω_i = 0 are switched off.
WeightLoRA+ then raises the rank of those that are left. Neither the thresholding nor WeightLoRA+ is implemented here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from forge.adapters.tuner import active_adapter, tuner_layers
from forge.adapters.weight_lora import WEIGHT_LORA, WeightLoraLinear
from forge.checks import check_whole


def product_norm(b: Tensor, a: Tensor) -> Tensor:
    """‖B A‖_F without forming B A: √tr((BᵀB)(AAᵀ)), two Gram matrices of shape (r, r), in fp32.

    Args:
        b: B, shape (out, r).
        a: A, shape (r, in).
    """
    a, b = a.detach().float(), b.detach().float()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def importances(model: nn.Module) -> dict[str, float]:
    """Importance s_i (equation 2) of every adapter of the active set, by the name of its module in the base model.

    The sum over j is over adapters that are not pruned; pruned ones have importance 0.

    Raises:
        ValueError: if the model has no active WeightLoRA adapter, or every B A is zero: there is nothing to compare.
    """
    name = active_adapter(model, WEIGHT_LORA)
    layers = {k: m for k, m in tuner_layers(model, WeightLoraLinear).items() if name in m.wlora_A}
    live = {k: m for k, m in layers.items() if not m.pruned.get(name, False)}
    norms = {k: product_norm(m.wlora_B[name].weight, m.wlora_A[name].weight).item() for k, m in live.items()}
    total = sum(norms.values())
    if total == 0:
        raise ValueError("importances need trained adapters, got B A = 0 in every one of them; train some steps first")
    return {k: abs(m.wlora_omega[name].item()) * norms[k] / total if k in live else 0.0 for k, m in layers.items()}


def prune_to_top_k(model: nn.Module, k: int) -> list[str]:
    """Keep the k most important adapters of the active set; the others get ω = 0 and are frozen for good.

    A pruned adapter no longer trains, is skipped in the forward pass and stays bitwise as it is. An optimizer that has
    stepped before keeps its state for it: ``WeightLoraCallback`` releases that too.

    Args:
        k: how many adapters stay; of equally important ones those nearest the input.

    Returns:
        Names of the modules whose adapters this call has pruned.

    Raises:
        ValueError: if k is no whole number from 1 to the number of adapters that are left, or ``importances`` raises.
    """
    check_whole("top_k", k)
    name = active_adapter(model, WEIGHT_LORA)
    layers = tuner_layers(model, WeightLoraLinear)
    live = unpruned(model)
    if k > len(live):
        raise ValueError(f"top_k must be at most the {len(live)} adapters that are left, got {k}; lower it")
    scores = importances(model)
    kept = sorted(live, key=lambda module: -scores[module])[:k]
    dropped = [module for module in live if module not in kept]
    for module in dropped:
        layers[module].prune(name)
    return dropped


def unpruned(model: nn.Module) -> list[str]:
    """Names of the modules whose adapter of the active set is not pruned."""
    name = active_adapter(model, WEIGHT_LORA)
    layers = tuner_layers(model, WeightLoraLinear)
    return [key for key, layer in layers.items() if name in layer.wlora_A and not layer.pruned.get(name, False)]


class WeightLoraCallback(TrainerCallback):
    """Prunes a WeightLoRA model to its ``top_k`` adapters after ``prune_at_step`` optimizer steps.

    The optimizer's state of pruned adapters is released. The pruned state is in the saved adapter (ω = 0), so that
    ``resume_from_checkpoint`` continues a pruned run as a pruned one.

    Args:
        prune_at_step: the optimizer step after which adapters are pruned, once.
        top_k: how many adapters stay; by default ``WeightLoraConfig.top_k``.
    """

    def __init__(self, prune_at_step: int, top_k: int | None = None) -> None:
        check_whole("prune_at_step", prune_at_step)
        if top_k is not None:
            check_whole("top_k", top_k)
        self.prune_at_step = prune_at_step
        self.top_k = top_k

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Refuse a plan that cannot be carried out, before the first step."""
        model, left = kw["model"], len(unpruned(kw["model"]))
        top_k = self._resolved_top_k(model)
        if self.prune_at_step >= state.max_steps:
            raise ValueError(
                f"prune_at_step must be below the {state.max_steps} steps of this run, got {self.prune_at_step}; the "
                "adapters that stay need steps too: lower it"
            )
        if top_k > left:
            raise ValueError(f"top_k must be at most the {left} adapters of the model, got {top_k}; lower it")
        if state.global_step >= self.prune_at_step and left > top_k:
            raise ValueError(
                f"prune_at_step must be ahead when training resumes from an unpruned checkpoint, got "
                f"{self.prune_at_step} at step {state.global_step}; raise it, or call prune_to_top_k(model, {top_k})"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Prune when the step has come, and release the optimizer's state of what is pruned."""
        if state.global_step == self.prune_at_step:
            model = kw["model"]
            name, layers = active_adapter(model, WEIGHT_LORA), tuner_layers(model, WeightLoraLinear)
            dropped = prune_to_top_k(model, self._resolved_top_k(model))
            _release(kw["optimizer"], [p for module in dropped for p in layers[module].adapter_parameters(name)])

    def _resolved_top_k(self, model: nn.Module) -> int:
        config: Any = model.peft_config[active_adapter(model, WEIGHT_LORA)]  # type: ignore[index]
        top_k = config.top_k if self.top_k is None else self.top_k
        if top_k is None:
            raise ValueError("top_k must be given to WeightLoraCallback or to WeightLoraConfig, got neither")
        return int(top_k)


def _release(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of the optimizer: a resumed run, whose frozen ones never enter it, has the same groups."""
    gone = {id(parameter): parameter for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
