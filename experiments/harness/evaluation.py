"""Held-out loss by document, so that seeds and test items can be told apart as sources of variation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from experiments.harness.data import Blocks


@dataclass(frozen=True)
class HeldOutLoss:
    """Summed negative log-likelihood and token count of every document."""

    document_ids: tuple[str, ...]
    nll: tuple[float, ...]
    """nats"""
    tokens: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Mean over all tokens, nats/token."""
        return sum(self.nll) / sum(self.tokens)


@torch.no_grad()
def held_out_loss(
    model: nn.Module, blocks: Blocks, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
) -> HeldOutLoss:
    """Next-token loss of a causal language model, by document; documents without a predicted token are left out.

    Args:
        model: gives ``.logits`` of shape (batch, tokens, vocabulary).
        blocks: packed text; the first token of a block is not predicted.
        batch_size: blocks at a time.
        autocast: context manager under which the model is trained, used here too.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nll = np.zeros(len(blocks.document_ids))
    tokens = np.zeros(len(blocks.document_ids), dtype=np.int64)
    for start in range(0, len(blocks.input_ids), batch_size):
        ids = torch.from_numpy(blocks.input_ids[start : start + batch_size]).to(device)
        with autocast():
            logits = model(input_ids=ids).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        owner = blocks.document[start : start + batch_size, 1:].ravel()
        nll += np.bincount(owner, weights=losses.double().cpu().numpy(), minlength=len(nll))
        tokens += np.bincount(owner, minlength=len(tokens))
    model.train(was_training)
    seen = np.flatnonzero(tokens)
    return HeldOutLoss(
        tuple(blocks.document_ids[i] for i in seen), tuple(map(float, nll[seen])), tuple(map(int, tokens[seen]))
    )
