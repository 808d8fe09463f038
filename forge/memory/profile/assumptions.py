"""What a prediction takes for granted, in sentences that go with its figures."""

from __future__ import annotations

import torch
import transformers

from forge.memory.profile.step import StepSettings
from forge.presets import Preset

_CUDA = (
    "No GPU has checked this prediction: what CUDA does otherwise than a CPU is emulated on fake CPU tensors.",
    "Sizes are rounded up to 512 bytes; left out are the CUDA context, the workspaces of cuBLAS and the allocator's "
    "fragmentation: torch.cuda.max_memory_allocated sees the second of these, the device all.",
    "Fused attention is flash attention in 16 bits without a mask, the memory-efficient kernel otherwise, plain "
    "mathematics in fp32 with shared keys and values.",
    "Torch's optimizers update all parameters at once (foreach) unless fused; paged states count as on the GPU.",
)


def assumptions_of(settings: StepSettings, preset: Preset | None) -> list[str]:
    """Sentences about the step that was run."""
    micro_batches = settings.gradient_accumulation_steps
    said = [
        f"The second optimizer step of transformers.Trainer {transformers.__version__} on one device, torch "
        f"{torch.__version__}, {settings.optimizer}, {_clipping(settings)}.",
        f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} of {settings.batch_size} × "
        f"{settings.sequence_length} tokens, all sequences of that length, "
        f"{'some tokens masked as padding' if settings.padding else 'no token masked'}.",
        "Left out: what lives outside the step (data set, averages of the weights and other callbacks, evaluation), "
        "and memory that libraries take past torch's allocator.",
    ]
    if settings.target == "cuda":
        said += _CUDA
        if settings.bf16:
            said.append("Autocast follows the CPU's list of operations; CUDA's has more of them in fp32.")
    if preset is not None and preset.ema_decay is not None:
        said.append(f"The average of the weights that ema_decay={preset.ema_decay} asks for is one of these callbacks.")
    return said


def _clipping(settings: StepSettings) -> str:
    return (
        f"gradients clipped to norm {settings.max_grad_norm:g}" if settings.max_grad_norm else "gradients not clipped"
    )
