"""Held-out outcomes by document, so that seeds and test items can be told apart as sources of variation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from experiments.harness.data import Blocks, Examples

Outcome = TypeVar("Outcome")


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


@dataclass(frozen=True)
class HeldOutClasses:
    """What a classifier says of every example."""

    document_ids: tuple[str, ...]
    tokens: tuple[int, ...]
    labels: NDArray[np.int64]
    """Number of the true class, shape (examples,)."""
    logits: NDArray[np.float64]
    """Shape (examples, classes)."""

    @property
    def nll(self) -> NDArray[np.float64]:
        """−log p(true class) of every example, nats."""
        return _nll(self.logits, self.labels)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the class with the largest logit is the true one."""
        return self.logits.argmax(axis=1) == self.labels

    @property
    def metrics(self) -> dict[str, float]:
        """As ``classification_metrics``."""
        return classification_metrics(self.logits, self.labels)


def classification_metrics(logits: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, float]:
    """``cross_entropy`` (nats/example), ``accuracy`` and ``macro_f1`` of a split.

    Macro-F1 is the unweighted mean of F1 = 2·TP / (2·TP + FP + FN) over the classes that are true or predicted
    somewhere in the split.

    Args:
        logits: shape (examples, classes).
        labels: number of the true class, shape (examples,).
    """
    predicted, classes = logits.argmax(axis=1), logits.shape[1]
    found = np.bincount(labels[predicted == labels], minlength=classes)
    true_and_predicted = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    occurs = true_and_predicted > 0
    return {
        "cross_entropy": float(_nll(logits, labels).mean()),
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float((2 * found[occurs] / true_and_predicted[occurs]).mean()),
    }


def _nll(logits: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    wide = torch.from_numpy(np.asarray(logits, dtype=np.float64))
    nll: NDArray[np.float64] = nn.functional.cross_entropy(wide, torch.from_numpy(labels), reduction="none").numpy()
    return nll


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, and the former mode again; gives the model's device."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def over_arms(
    arms: Mapping[str, Callable[[], AbstractContextManager[None]]], evaluate: Callable[[], Outcome]
) -> tuple[dict[str, Outcome], float]:
    """Outcome of every arm, each under the context that puts its weights in place, and the seconds that it took."""
    began, outcomes = time.monotonic(), {}
    for arm, weights in arms.items():
        with weights():
            outcomes[arm] = evaluate()
    return outcomes, time.monotonic() - began


def held_out_classes(
    model: nn.Module,
    examples: Examples,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]],
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> HeldOutClasses:
    """Logits of a classifier for every example.

    Args:
        model: gives ``.logits`` of shape (batch, classes).
        examples: in the order in which they are put into batches.
        collator: pads a batch.
        batch_size: examples at a time.
        autocast: context manager under which the model is trained, used here too.
    """
    logits = []
    with _evaluating(model) as device:
        for start in range(0, len(examples), batch_size):
            batch = collator([examples[i] for i in range(start, min(start + batch_size, len(examples)))])
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            with autocast():
                logits.append(model(**inputs).logits.double().cpu().numpy())
    tokens = tuple(map(len, examples.input_ids))
    return HeldOutClasses(examples.document_ids, tokens, examples.labels, np.concatenate(logits))


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
    nll = np.zeros(len(blocks.document_ids))
    tokens = np.zeros(len(blocks.document_ids), dtype=np.int64)
    with _evaluating(model) as device:
        for start in range(0, len(blocks), batch_size):
            ids = torch.from_numpy(blocks.input_ids[start : start + batch_size]).to(device)
            with autocast():
                logits = model(input_ids=ids).logits
            losses = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
            )
            owner = blocks.document[start : start + batch_size, 1:].ravel()
            nll += np.bincount(owner, weights=losses.double().cpu().numpy(), minlength=len(nll))
            tokens += np.bincount(owner, minlength=len(tokens))
    seen = np.flatnonzero(tokens)
    return HeldOutLoss(
        tuple(blocks.document_ids[i] for i in seen), tuple(map(float, nll[seen])), tuple(map(int, tokens[seen]))
    )
