"""Which modules of a model are its task head: new weights, which have to train whole beside any adapter.

PEFT knows some of them by name, and for three of its task types only: ``classification_head`` of BART, ``pooler`` of
DeBERTa and the head of every image or audio classifier would stay as they were drawn.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from forge.layers import NoLayersError, find_layers


def task_head(model: nn.Module) -> list[str]:
    """Names of the modules with weights beside the body; none in a bare body, and none in a language model, whose head
    is no new one.

    The body is ``model.base_model``; a model without one (CLIP's and Whisper's classifiers) is all head but for its
    layers and embeddings.

    Raises:
        ValueError: if PEFT, which finds modules by the end of their names, would take others for the head too.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    if model.get_output_embeddings() is not None:  # type: ignore[no-untyped-call]
        return []
    bodies = _bodies(model)
    head = [
        name
        for name, module in model.named_children()
        if bodies and name not in bodies and any(True for _ in module.parameters())
    ]
    for name, _ in model.named_modules():
        if name not in head and name.endswith(tuple(head)):
            raise ValueError(
                f"the names of a task head must end no other module's name, got {head} in {type(model).__name__}: PEFT "
                f"would take {name!r} too; train this model with 'sft', or add adapters with PEFT itself"
            )
    return head


def _bodies(model: PreTrainedModel) -> set[str]:
    """Names of the top-level modules that are no head; empty where there is nothing to tell them by."""
    if model.base_model is not model:
        return {model.base_model_prefix}
    if "For" not in type(model).__name__:
        return set()
    embeddings = {name for name, module in model.named_children() if isinstance(module, nn.Embedding)}
    try:
        return embeddings | {layer.name.partition(".")[0] for layer in find_layers(model)}
    except NoLayersError:
        return set()
