"""Health of the gradients that a backward pass has left (THEORY.md, «Training Monitor»)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from forge.layers import NoLayersError, find_layers, layer_of

GradientProblem = Literal["nan", "inf", "exploding", "vanishing"]

ADVICE: Mapping[GradientProblem, str] = {
    "nan": "look for NaN in the data and for rows whose labels are all -100; try a lower learning rate, and bf16 in "
    "place of fp16",
    "inf": "numbers overflow: try bf16 in place of fp16, a lower learning rate, a longer warm-up",
    "exploding": "try a lower learning rate, a longer warm-up, clipping (max_grad_norm=1.0); look at the batch itself",
    "vanishing": "little signal arrives there: check that the labels are not all -100, that the learning rate has not "
    "already broken the model (dead or saturated units), and, with fp16 gradients, try bf16",
}
"""What to try, for each kind of finding."""

ZERO_ADVICE = (
    "a norm of exactly 0 says that this batch does not reach the parameter: normal for LoRA's A in the first step (B "
    "is still 0), for experts and embeddings that the batch does not use; otherwise look for a branch cut from the loss"
)
"""Added where a vanishing gradient is exactly zero."""


class NoGradientsError(ValueError):
    """No parameter of the model has a gradient."""


@dataclass(frozen=True)
class GradientFinding:
    """One parameter with a gradient that is not healthy."""

    parameter: str
    """Name as in ``model.named_parameters()``."""
    layer: str | None
    """Layer that holds it, by ``forge.layers.find_layers``; None outside the stack."""
    kind: GradientProblem
    norm: float
    """L2 norm of the parameter's gradient; NaN or inf for these kinds."""


@dataclass(frozen=True)
class GradientReport:
    """Gradient norms of one moment and what is wrong with them. ``str(report)`` is readable text."""

    norms: Mapping[str, float]
    """L2 norm of each parameter's gradient."""
    findings: tuple[GradientFinding, ...]
    without_gradient: tuple[str, ...]
    """Trainable parameters whose ``.grad`` is None: the loss does not depend on them. No finding by itself."""

    @property
    def healthy(self) -> bool:
        """Whether there is no finding."""
        return not self.findings

    @property
    def total_norm(self) -> float:
        """L2 norm of all gradients as one vector: what clipping compares with ``max_grad_norm``."""
        return math.hypot(*self.norms.values())

    def count(self, *kinds: GradientProblem) -> int:
        """Number of findings of these kinds."""
        return sum(finding.kind in kinds for finding in self.findings)

    def __str__(self) -> str:
        head = f"gradient norm {self.total_norm:.3g} over {len(self.norms)} parameters"
        lines = [f"{head}: {'unhealthy' if self.findings else 'healthy'}", *describe(self.findings)]
        if self.without_gradient:
            lines.append(f"  no gradient at all (not part of the loss): {_some(self.without_gradient)}")
        return "\n".join(lines)


def check_gradient_health(
    model: nn.Module, *, vanishing_below: float = 1e-7, exploding_above: float = 1e3, scale: float = 1.0
) -> GradientReport:
    """L2 norm of every parameter's gradient, and which of them are NaN, Inf, exploding or vanishing.

    Call it after ``backward()`` and before clipping. Norms are accumulated in fp32 by one fused
    ``torch._foreach_norm`` for each device and dtype (BLAS for fp32 on a CPU), and reach the host in one transfer.
    They are of whole parameter tensors: a dead row inside a healthy matrix does not show, and finite elements whose
    squares overflow fp32 (a norm above 1.8e19) show as Inf.

    Args:
        model: any model, wrapped by PEFT or not.
        vanishing_below: norms below it are «vanishing», exact zeros included.
        exploding_above: norms above it are «exploding».
        scale: factor that the loss was multiplied by, ``GradScaler.get_scale()`` under fp16; norms are divided by it.

    Raises:
        NoGradientsError: if no parameter has a gradient.
        TypeError: if ``model`` is not an ``nn.Module``, or a threshold is not a number.
        ValueError: if not 0 < vanishing_below < exploding_above, or the gradients are sharded (FSDP, tensor parallel).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; pass the model itself")
    check_thresholds(vanishing_below, exploding_above)
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(
            f"scale must be finite and positive, got {scale}; pass GradScaler.get_scale(), or leave it 1.0"
        )
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if not gradients:
        raise NoGradientsError(why_no_gradients(model))
    norms = {name: norm / scale for name, norm in _norms(gradients).items()}
    kinds = {name: kind for name, norm in norms.items() if (kind := _kind(norm, vanishing_below, exploding_above))}
    return GradientReport(
        norms=norms,
        findings=_findings(model, norms, kinds),
        without_gradient=tuple(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None),
    )


def check_thresholds(vanishing_below: float, exploding_above: float) -> None:
    """Raise unless both are numbers and 0 < vanishing_below < exploding_above."""
    for name, value in {"vanishing_below": vanishing_below, "exploding_above": exploding_above}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}; give a norm, such as 1e-7 or 1e3")
    if not 0 < vanishing_below < exploding_above:
        raise ValueError(
            f"thresholds must satisfy 0 < vanishing_below < exploding_above, got {vanishing_below} and "
            f"{exploding_above}; the defaults are 1e-7 and 1e3"
        )


def describe(findings: Iterable[GradientFinding]) -> list[str]:
    """One line for each kind of finding: how many parameters, which, and what to try."""
    lines: list[str] = []
    groups: dict[GradientProblem, list[GradientFinding]] = {}
    for finding in findings:
        groups.setdefault(finding.kind, []).append(finding)
    for kind, group in groups.items():
        names = _some([f"{f.parameter} ({f.norm:.3g})" for f in group])
        layers = list(dict.fromkeys(f.layer for f in group if f.layer is not None))
        where = f", in {_some(layers)}" if layers else ""
        lines.append(f"  {kind} in {len(group)} parameter{'s'[: len(group) > 1]}{where}: {names}; {ADVICE[kind]}")
        if kind == "vanishing" and any(f.norm == 0 for f in group):
            lines.append(f"  {ZERO_ADVICE}")
    return lines


def _norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms by one fused call for each (device, dtype), one stack and one transfer."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, gradient in gradients.items():
        if isinstance(gradient, DTensor):
            raise ValueError(
                f"gradients must be whole on every process, got a sharded one ({name}); check them without "
                "FSDP and tensor parallelism"
            )
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        groups.setdefault((values.device, values.dtype), {})[name] = values
    names = [name for group in groups.values() for name in group]
    with torch.no_grad():
        fused = [n for kind, group in groups.items() for n in _norms_of_kind(*kind, [*group.values()])]
        values = torch.stack([norm.to(fused[0].device, non_blocking=True) for norm in fused])
    return dict(zip(names, values.tolist(), strict=True))


def _norms_of_kind(device: torch.device, dtype: torch.dtype, gradients: list[Tensor]) -> list[Tensor]:
    """One fused call; on a CPU, where nothing is fused, BLAS takes half the time of the norm for fp32."""
    if device.type == "cpu" and dtype == torch.float32:
        return [torch.dot(flat, flat).sqrt() for flat in (gradient.reshape(-1) for gradient in gradients)]
    return [*torch._foreach_norm(gradients, 2, torch.promote_types(dtype, torch.float32))]


def _kind(norm: float, vanishing_below: float, exploding_above: float) -> GradientProblem | None:
    if math.isnan(norm):
        return "nan"
    if math.isinf(norm):
        return "inf"
    return "vanishing" if norm < vanishing_below else "exploding" if norm > exploding_above else None


def _findings(
    model: nn.Module, norms: Mapping[str, float], kinds: Mapping[str, GradientProblem]
) -> tuple[GradientFinding, ...]:
    if not kinds:
        return ()
    try:
        layers = find_layers(model)
    except NoLayersError:
        layers = []
    held_by = {name: layer_of(name, layers) for name in kinds}
    return tuple(
        GradientFinding(name, layer.name if (layer := held_by[name]) else None, kind, norms[name])
        for name, kind in kinds.items()
    )


def why_no_gradients(model: nn.Module) -> str:
    """What to say of a model without gradients: that all of it is frozen, or that the moment is wrong."""
    trainable = sum(p.requires_grad for p in model.parameters())
    rule = "the model must have gradients, got none in"
    if not trainable:
        return f"{rule} {type(model).__name__}: all parameters are frozen; unfreeze some, or add an adapter"
    return (
        f"{rule} its {trainable} trainable parameters; check after backward() and before zero_grad() (an optimizer "
        "that steps inside backward, such as LOMO or a layer-wise GaLore, leaves none)"
    )


def _some(names: Iterable[str], most: int = 3) -> str:
    """The first few of many names."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
