"""Gradient accumulation equal to the full batch, also where ``transformers`` 5.23 gets it wrong.

    L = Σ_i Σ_t ℓ(i, t) / N,    N = valid labels of all micro-batches together                                   (1)

The ``Trainer`` counts N and passes it to the model as ``num_items_in_batch``; models that compute their loss by
``self.loss_function`` (Llama, GPT-2 and most decoders) divide by it. Others (BERT, T5 and most older families) accept
it and ignore it, as does the loss of ``transformers`` for regression and multi-label classification: they return the
mean over their micro-batch, and since the Trainer trusts that N was used, it adds these means up. With four
micro-batches the gradient is about four times too large, and tokens of short micro-batches weigh more.
``normalise_over_batch`` repairs that; without accumulation it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForSequenceClassificationLoss

_COUNT = "num_items_in_batch"
_FUSED = "fused_linear_cross_entropy"


def normalise_over_batch(model: nn.Module) -> None:
    """Make the model's loss the sum over its micro-batch divided by N (equation 1), if its own code does not.

    The loss function of the model is watched during each forward pass: one that is given N is taken to divide by it,
    but for the squared errors and cross-entropies of ``ForSequenceClassificationLoss``, which never do. A loss that
    divides by N in the model's own ``forward`` is not seen (``check_fused_loss``).

    Args:
        model: wrapped by PEFT or not. Its loss must be a mean over the labels that are not −100.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    own_loss = base.loss_function
    shifts = LOSS_MAPPING.get(str(getattr(base, "loss_type", None))) is ForCausalLMLoss
    shifts &= not getattr(base.config, "is_encoder_decoder", False)  # the Trainer's rule for what it counts
    used_count = False

    def watched_loss(*args: Any, **kwargs: Any) -> Any:
        nonlocal used_count
        loss = own_loss(*args, **kwargs)  # first: it is what names the problem where the config does not
        used_count |= kwargs.get(_COUNT) is not None and not (
            own_loss is ForSequenceClassificationLoss and base.config.problem_type != "single_label_classification"
        )
        return loss

    def before(*_: Any) -> None:
        nonlocal used_count
        used_count = False

    def after(_: nn.Module, __: Any, inputs: dict[str, Any], output: Any) -> Any:
        labels, total = inputs.get("labels"), inputs.get(_COUNT)
        if used_count or total is None or labels is None:
            return output
        counted = (labels[..., 1:] if shifts else labels).ne(-100).sum()
        return _with_loss(output, counted / total)

    base.loss_function = watched_loss
    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, with_kwargs=True)


def check_fused_loss(arguments: Mapping[str, Any]) -> None:
    """Refuse (ValueError) training arguments with which Liger's forward pass would divide by N, beside equation 1."""
    kernels = arguments.get("liger_kernel_config") or {}
    if arguments.get("use_liger_kernel") and kernels.get(_FUSED, True):
        raise ValueError(
            f"use_liger_kernel must come without its fused loss, which divides by the labels of the step as prepare() "
            f"does, got liger_kernel_config={arguments.get('liger_kernel_config')!r}; add {_FUSED!r}: False to it"
        )


def _with_loss(output: Any, factor: Tensor) -> Any:
    """The output with its loss, the first entry of a tuple, multiplied."""
    if isinstance(output, tuple):
        return (output[0] * factor, *output[1:])
    if "loss" in output:
        output["loss"] = output["loss"] * factor
    return output
